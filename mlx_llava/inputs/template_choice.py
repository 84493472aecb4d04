"""Which built-in template a checkpoint was trained with, where none of its files says so.

The original guesses from the folder's name alone (LLaVA, cli.py, lines 34 to 45), which a copy or
the hub's cache loses. Names are asked here too, and the numbers of the published checkpoints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mlx_llava.inputs.chat_template import ChatTemplate, JinjaTemplate
from mlx_llava.inputs.templates import get_template
from mlx_llava.inputs.tokenizer import Tokenizer, token_text
from mlx_llava.model.config import LlavaConfig

_LLAMA_3_WORDS = 128256
_YI_WORDS = range(64000, 64065)  # with a placeholder, up to a multiple of 64
_V0_WORDS = 32004  # 13b-delta-v0 and 7b-delta-v0 have a [PAD] beside the three image tokens
_VICUNA_WIDTHS = (4096, 5120)


@dataclass(frozen=True)
class Guess:
    """A template's name, and what to say of it.

    Attributes:
        name: of a built-in template.
        doubt: why another may be right; empty where none can.
    """

    name: str
    doubt: str = ""


def guess_template(config: LlavaConfig, name: str = "") -> Guess:
    """The template that names and numbers point to.

    Args:
        config (LlavaConfig): Its vocabulary without rows that were added for the placeholder.
        name (str): All names that the checkpoint and its base are known by.
    """
    text, name = config.text_config, name.lower()
    is_linear = config.mm_projector_type == "linear"
    has_mistral_sizes = (text.kv_heads, text.intermediate_size) == (8, 14336)
    if re.search(r"llama[-_]?2(?!\d)", name):
        return Guess("llava_llama_2")
    if config.mm_use_im_start_end:
        return Guess("llava_v0" if text.vocab_size == _V0_WORDS else "llava_v1")
    if text.vocab_size >= _LLAMA_3_WORDS:
        return Guess("llava_llama_3")
    if text.hidden_size == 7168 or text.vocab_size in _YI_WORDS:
        return Guess("chatml_direct")
    if text.model_type == "mistral" or has_mistral_sizes:
        if text.rope_theta == 1e6 or re.search("mistral.*instruct", name):
            return Guess("mistral_instruct")
        return Guess("vicuna_v1", "BakLLaVA's, on Mistral v0.1; its Instruct has mistral_instruct")
    if is_linear and text.max_position_embeddings >= 4096:
        return Guess("llava_llama_2", "LLaMA 2 with one linear layer; a Vicuna has vicuna_v1")
    if text.hidden_size in _VICUNA_WIDTHS and text.rope_theta == 1e4:
        return Guess("vicuna_v1")
    return Guess("vicuna_v1", "no published LLaVA has this shape")


def choose_template(config: LlavaConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """The checkpoint's own template, or the one that its shape points to."""
    if config.conv_mode or not tokenizer.chat_template:
        return get_template(config.conv_mode or guess_template(config).name)
    named = {key: value for key, value in tokenizer.config.items() if key.endswith("_token")}
    tokens = {key: text for key, value in named.items() if (text := token_text(value))}
    bos, eos = tokens.get("bos_token", ""), tokens.get("eos_token", "")
    template = JinjaTemplate(tokenizer.chat_template, bos=bos, eos=eos, tokens=tokens)
    return replace(template, stops=template.find_ends(tokenizer.special_tokens))
