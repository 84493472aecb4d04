"""How much memory a model and a prompt need, and whether there is so much.

Estimates: weights and keys and values are exact, the rest is the largest arrays that live at once.
"""

from __future__ import annotations

from mlx_llava.inputs.inputs import Inputs
from mlx_llava.model.cache import group_size
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.device import available_memory
from mlx_llava.model.llava import TILES_AT_ONCE, Llava
from mlx_llava.model.llava_classes import AVERAGE

_GB = 1e9
#: How many arrays of all features live at once, at most, while they are projected and laid out.
LAID_OUT = 5


def kv_bytes(config: LlavaConfig, positions: int, itemsize: int, kv_bits: int | None = None) -> int:
    """The keys and values of so many positions; codes come with a scale and a bias a group."""
    text = config.text_config
    numbers = 2 * text.num_hidden_layers * text.kv_heads * text.dims_per_head * positions
    if kv_bits is None:
        return numbers * itemsize
    return numbers * kv_bits // 8 + 2 * itemsize * numbers // (group_size(text.dims_per_head) or 1)


def request_bytes(
    config: LlavaConfig,
    itemsize: int,
    inputs: Inputs,
    max_tokens: int,
    *,
    prefill_step: int,
    kv_bits: int | None = None,
    max_kv_size: int | None = None,
) -> dict[str, int]:
    """What an answer takes beside the weights, by what it is for."""
    prompt_tokens = inputs.input_ids.shape[1]
    positions = min(prompt_tokens + max_tokens, max_kv_size or prompt_tokens + max_tokens)
    chunk = min(prompt_tokens, prefill_step)
    return {
        "keys and values": kv_bytes(config, positions, itemsize, kv_bits),
        "pictures": _picture_numbers(config, inputs) * itemsize,
        "prefill": chunk * (config.text_config.intermediate_size * 3) * itemsize,
    }


def _picture_numbers(config: LlavaConfig, inputs: Inputs) -> int:
    """The numbers within the tower, or those of all tiles while they are projected and laid out."""
    vision, tiles = config.vision_config, sum(inputs.image_tiles)
    at_once = min(tiles, TILES_AT_ONCE)
    within = at_once * vision.num_positions * vision.intermediate_size * 2
    seen = tiles * config.tokens_per_tile * vision.hidden_size * len(config.feature_layers)
    rows = tiles * config.tokens_per_tile
    if config.pooling == AVERAGE:
        rows = sum(inputs.whole_image_tokens)  # which are averaged before
    return max(seen + within, 2 * seen + LAID_OUT * rows * config.text_config.hidden_size)


class ContextError(ValueError):
    """A prompt is longer than the model's context."""


def _fewer_frames(inputs: Inputs, context_length: int) -> str:
    """How many frames of each video would fit, as advice."""
    each = sum(video.frame_tokens for video in inputs.videos)
    taken = sum(video.frames * video.frame_tokens for video in inputs.videos)
    room = context_length - 1 - (inputs.positions - taken)
    return f"--frames {room // each}, " if each and room >= each else ""


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
    """How many tokens the answer to one prompt can have, or a ValueError that says why none."""
    rows, prompt_tokens = inputs.input_ids.shape
    if rows != 1:
        raise ValueError(f"One prompt can be answered at a time; the inputs hold {rows}.")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1.")
    if inputs.positions >= context_length:
        advice = _fewer_frames(inputs, context_length) + "fewer or smaller images"
        raise ContextError(
            f"The prompt has {inputs.positions} tokens and the model's context is "
            f"{context_length}; use {advice}, or a shorter text."
        )
    max_tokens = min(max_tokens, context_length - inputs.positions)
    itemsize = model.language_model.dtype.size
    parts = request_bytes(
        *(model.config, itemsize, inputs, max_tokens),
        prefill_step=prefill_step,
        kv_bits=kv_bits,
        max_kv_size=max_kv_size,
    )
    needed, available = sum(parts.values()), available_memory()
    if model.ranks.speaks and needed > available:
        sizes = ", ".join(f"{name} {size / _GB:.1f}" for name, size in parts.items())
        raise ValueError(
            f"{prompt_tokens} tokens of prompt and {max_tokens} of answer need "
            f"{needed / _GB:.1f} GB ({sizes}) and {available / _GB:.1f} GB are free; use fewer "
            "pictures, fewer --max-tokens, or --kv-bits 8."
        )
    return max_tokens
