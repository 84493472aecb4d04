"""Parameters that would change an answer and are not honoured: refused by their names.

What is neither here nor read asks nothing of the answer (`user`, `metadata`, `store`, `tools`,
`keep_alive`, `cache_prompt`, ...) and is ignored, as the other servers of OpenAI's API do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_llava.serving.errors import unsupported

#: The values that change nothing, beside null, by whose parameter it is.
_OPENAI: Mapping[str, tuple[Any, ...]] = {
    "audio": ({},),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "instructions": ("",),
    "logit_bias": ({}, []),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_SAMPLERS = "penalties dry top_n_sigma top_k typ_p top_p min_p xtc temperature".split()
_LLAMA_CPP: Mapping[str, tuple[Any, ...]] = {
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar": ("",),
    "ignore_eos": (False,),
    "json_schema": ({},),
    "mirostat": (0,),
    "n_predict": (),
    "samplers": (_SAMPLERS, "edkypmxt"),
    "tfs_z": (1,),
    "top_n_sigma": (-1, 0),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
_OLLAMA: Mapping[str, tuple[Any, ...]] = {
    "format": ("",),
    "images": ([],),
    "options": ({},),
    "system": ("",),
    "template": ("",),
    "think": (False,),
}
#: vLLM's and SGLang's.
_VLLM: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template": ("",),
    "chat_template_kwargs": ({}, {"enable_thinking": False}, {"thinking": False}),
    "continue_final_message": (False,),
    "documents": ([],),
    "ebnf": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": ({}, ""),
    "guided_regex": ("",),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora_path": ("",),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "prompt_logprobs": (0,),
    "regex": ("",),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": ({},),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
#: mlx-lm's, and those of text-generation-webui.
_OTHERS: Mapping[str, tuple[Any, ...]] = {
    "adapters": ("",),
    "character": ("",),
    "do_sample": (True,),
    "encoder_repetition_penalty": (1,),
    "extra_body": ({},),
    "guidance_scale": (1,),
    "instruction_template": ("",),
    "negative_prompt": ("",),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "repetition_context_size": (20,),
    "role_mapping": ({},),
    "smoothing_factor": (0,),
}
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    **_OPENAI,
    **_LLAMA_CPP,
    **_OLLAMA,
    **_VLLM,
    **_OTHERS,
}


def check_parameters(data: Mapping[str, Any]) -> None:
    """Refuses what would change the answer and is not honoured.

    Raises:
        ApiError: It names the first.
    """
    for name in sorted(UNSUPPORTED.keys() & data.keys()):
        neutral = UNSUPPORTED[name]
        if data[name] is not None and data[name] not in neutral:
            raise unsupported(name, " or ".join(map(repr, neutral)) or "null")
