"""Parameters that would change an answer and are not honoured: refused by their names.

What is neither here nor read asks nothing of the answer (`user`, `metadata`, `store`, `tools`,
`keep_alive`, `cache_prompt`, ...) and is ignored, as the other servers of OpenAI's API do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_llava.serving.errors import unsupported

_SAMPLERS = "penalties dry top_n_sigma top_k typ_p top_p min_p xtc temperature".split()
#: The values that change nothing, beside null, by whose parameter it is.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
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
    # llama.cpp's
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
    # Ollama's
    "format": ("",),
    "images": ([],),
    "options": ({},),
    "system": ("",),
    "template": ("",),
    "think": (False,),
    # vLLM's and SGLang's
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
    # mlx-lm's, and those of text-generation-webui
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
#: What would be lost if it were left out, and the values that say nothing.
_OF_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "audio": ({},),
    "files": ([],),
    "function_call": ({},),
    "images": ([],),
    "partial": (False,),
    "prefix": (False,),
    "refusal": ("",),
    "tool_calls": ([],),
}


def check_parameters(data: Mapping[str, Any]) -> None:
    """Refuses what would change the answer, or says more than texts and pictures.

    Raises:
        ApiError: It names the first.
    """
    for name in _set(data, UNSUPPORTED):
        raise unsupported(name, " or ".join(map(repr, UNSUPPORTED[name])) or "null")
    messages = data.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in _set(message if isinstance(message, dict) else {}, _OF_MESSAGES):
            raise unsupported(f"messages.{index}.{name}", "null")


def _set(data: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """The names whose values say something."""
    names = sorted(neutral.keys() & data.keys())
    return [name for name in names if data[name] is not None and data[name] not in neutral[name]]
