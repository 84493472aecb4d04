"""How much memory a model and a prompt need, and whether there is so much.

Estimates: weights and keys and values are exact, the rest is the largest arrays that live at once.
"""

from __future__ import annotations

from mlx_llava.inputs.processor import Inputs
from mlx_llava.model.cache import group_size
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.device import available_memory
from mlx_llava.model.llava import TILES_AT_ONCE, Llava

_GB = 1e9


def kv_bytes(config: LlavaConfig, positions: int, itemsize: int, kv_bits: int | None = None) -> int:
    """The keys and values of so many positions; codes come with a scale and a bias a group."""
    text = config.text_config
    numbers = 2 * text.num_hidden_layers * text.kv_heads * text.dims_per_head * positions
    if kv_bits is None:
        return numbers * itemsize
    return numbers * kv_bits // 8 + 2 * itemsize * numbers // (group_size(text.dims_per_head) or 1)


def check_prompt(
    config: LlavaConfig,
    *,
    prompt_tokens: int,
    max_tokens: int,
    tiles: int,
    itemsize: int,
    prefill_step: int,
    kv_bits: int | None = None,
    max_kv_size: int | None = None,
) -> None:
    """Raises ValueError where answering a prompt cannot fit beside the weights.

    Args:
        config (LlavaConfig): The model's.
        prompt_tokens (int): The length of the prompt.
        max_tokens (int): The longest answer.
        tiles (int): How many tiles the pictures were cut into.
        itemsize (int): Bytes of a number.
        prefill_step (int): How many positions are read at a time.
        kv_bits (int, optional): Of the cache.
        max_kv_size (int, optional): Of the cache.
    """
    vision, text = config.vision_config, config.text_config
    positions = min(prompt_tokens + max_tokens, max_kv_size or prompt_tokens + max_tokens)
    chunk, at_once = min(prompt_tokens, prefill_step), min(tiles, TILES_AT_ONCE)
    tokens = vision.patches_per_side**2 + 1
    parts = {
        "keys and values": kv_bytes(config, positions, itemsize, kv_bits),
        "pictures": at_once * tokens * (vision.intermediate_size * 2) * itemsize,
        "prefill": chunk * (text.intermediate_size * 3) * itemsize,
    }
    needed, available = sum(parts.values()), available_memory()
    if needed > available:
        sizes = ", ".join(f"{name} {size / _GB:.1f}" for name, size in parts.items())
        raise ValueError(
            f"{prompt_tokens} tokens of prompt and {max_tokens} of answer need "
            f"{needed / _GB:.1f} GB ({sizes}) and {available / _GB:.1f} GB are free; use fewer "
            "pictures, fewer --max-tokens, or --kv-bits 8."
        )


class ContextError(ValueError):
    """A prompt is longer than the model's context."""


def limit_tokens(prompt_tokens: int, max_tokens: int, context_length: int) -> int:
    """How many tokens can be made; raises ContextError where there is room for none."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1.")
    if prompt_tokens >= context_length:
        raise ContextError(
            f"The prompt has {prompt_tokens} tokens and the model's context is {context_length}; "
            "use fewer or smaller images, or a shorter text."
        )
    return min(max_tokens, context_length - prompt_tokens)


def check_request(
    model: Llava,
    inputs: Inputs,
    max_tokens: int,
    context_length: int,
    *,
    prefill_step: int,
    kv_bits: int | None = None,
    max_kv_size: int | None = None,
) -> int:
    """How many tokens the answer to one prompt can have.

    Raises:
        ValueError: It is not one prompt, it is longer than the context, or memory is too small.
    """
    rows, prompt_tokens = inputs.input_ids.shape
    if rows != 1:
        raise ValueError(f"One prompt can be answered at a time; the inputs hold {rows}.")
    max_tokens = limit_tokens(prompt_tokens, max_tokens, context_length)
    check_prompt(
        model.config,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        tiles=sum(inputs.image_tiles),
        itemsize=model.language_model.dtype.size,
        prefill_step=prefill_step,
        kv_bits=kv_bits,
        max_kv_size=max_kv_size,
    )
    return max_tokens
