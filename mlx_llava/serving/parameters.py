"""Parameters that would change an answer and are not honoured: refused by their names.

They are OpenAI's, and those of llama.cpp, mlx-lm, Ollama, vLLM, SGLang, text-generation-webui.
What is neither here nor read asks nothing of the answer (`user`, `metadata`, `store`, `tools`,
`keep_alive`, `cache_prompt`, ...) and is ignored, as the other servers of OpenAI's API do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from mlx_llava.serving.errors import ApiError

Neutral: TypeAlias = Mapping[str, tuple[Any, ...]]


def _each(names: str, *values: Any) -> Neutral:
    return dict.fromkeys(names.split(), values)


#: The values that change nothing, beside null.
UNSUPPORTED: Neutral = {
    **_each(
        "adapters character chat_template ebnf format grammar guided_grammar guided_regex "
        "instruction_template instructions lora_path negative_prompt regex suffix system template",
        "",
    ),
    **_each(
        "allowed_token_ids bad_words documents guided_choice images logits_processors "
        "stop_token_ids",
        [],
    ),
    **_each(
        "audio extra_body json_schema mm_processor_kwargs options role_mapping structured_outputs",
        {},
    ),
    **_each(
        "dry_multiplier dynatemp_range min_tokens mirostat no_repeat_ngram_size "
        "penalty_alpha prompt_logprobs smoothing_factor top_a xtc_probability",
        0,
    ),
    **_each(
        "best_of encoder_repetition_penalty guidance_scale length_penalty num_beams tfs_z "
        "typical_p",
        1,
    ),
    **_each(
        "continue_final_message echo ignore_eos include_stop_str_in_output think use_beam_search",
        False,
    ),
    **_each("add_generation_prompt do_sample skip_special_tokens", True),
    **_each("function_call", "none", "auto"),
    **_each("n_predict truncate_prompt_tokens web_search_options"),
    "chat_template_kwargs": ({}, {"enable_thinking": False}, {"thinking": False}),
    "guided_json": ({}, ""),
    "modalities": (["text"],),
    "repetition_context_size": (20,),
    "samplers": (
        "penalties dry top_n_sigma top_k typ_p top_p min_p xtc temperature".split(),
        "edkypmxt",
    ),
    "top_n_sigma": (-1, 0),
}
#: Of messages: what would be lost if it were left out, and the values that say nothing.
_OF_MESSAGES: Neutral = {
    **_each("audio function_call", {}),
    **_each("files images", []),
    **_each("partial prefix", False),
}


def check_parameters(data: Mapping[str, Any]) -> None:
    """Refuses what would change the answer, or says more than texts and pictures.

    Raises:
        ApiError: It names the first.
    """
    refuse_said(data, UNSUPPORTED)
    messages = data.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in _said(message if isinstance(message, dict) else {}, _OF_MESSAGES):
            raise _unsupported(f"messages.{index}.{name}", "null")


def refuse_said(data: Mapping[str, Any], neutral: Neutral) -> None:
    """Refuses parameters that are there and have none of their neutral values.

    Raises:
        ApiError: It names the first.
    """
    for name in _said(data, neutral):
        raise _unsupported(name, " or ".join(map(repr, neutral[name])) or "null")


def _said(data: Mapping[str, Any], neutral: Neutral) -> list[str]:
    names = sorted(neutral.keys() & data.keys())
    return [name for name in names if data[name] is not None and data[name] not in neutral[name]]


def _unsupported(name: str, neutral: str) -> ApiError:
    message = f"{name} is not supported here; leave it out (or {neutral})."
    return ApiError(400, message, "unsupported_parameter", param=name)
