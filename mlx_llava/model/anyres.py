"""Anyres (LLaVA 1.6) in numbers: which canvas, which grid, which part of it is image.

Processor and model must agree: the one counts the placeholders, the other fills them (layout.py).
All sizes are (height, width). LLaVA-NeXT: mm_utils.py and llava_arch.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from mlx_llava.model.config import LlavaConfig

Size: TypeAlias = tuple[int, int]

#: How images become tiles: the middle, padded to a square, or several of each.
MODES = ("crop", "pad", "anyres")


def select_best_resolution(size: Size, pinpoints: Sequence[Size], convention: str) -> Size:
    """Picks the anyres canvas that keeps most of the image and wastes least (mm_utils.py).

    The original code reads the pinpoints as (width, height), Hugging Face as (height, width);
    with the usual symmetric list they differ where both sides are at most one tile.
    """
    height, width = size
    best, most_kept, least_wasted = pinpoints[0], 0, math.inf
    for pinpoint in pinpoints:
        rows, columns = pinpoint if convention == "hf" else pinpoint[::-1]
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = rows * columns - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (rows, columns), kept, wasted
    return best


def unpadded_grid(size: Size, grid: Size, convention: str) -> tuple[slice, slice]:
    """The rows and columns of an anyres feature grid that show image, not padding.

    The original truncates the scaled side (llava_arch.py, unpad_image); Hugging Face first
    rounds it to 7 digits, which differs where floating point falls just short of an integer.
    """
    (height, width), (rows, columns) = size, grid

    def padding(full: int, side: int, scale: float) -> int:
        kept = side * scale
        return (full - int(round(kept, 7) if convention == "hf" else kept)) // 2

    if width / height > columns / rows:
        skip = padding(rows, height, columns / width)
        return slice(skip, rows - skip), slice(0, columns)
    skip = padding(columns, width, rows / height)
    return slice(0, rows), slice(skip, columns - skip)


def canvas_size(size: Size, config: LlavaConfig) -> Size:
    """The canvas, in pixels, on which a model wants an image of (height, width)."""
    return select_best_resolution(size, config.image_grid_pinpoints, config.anyres_convention)


def grid_size(size: Size, config: LlavaConfig) -> Size:
    """Rows and columns of the anyres feature grid of an image of (height, width)."""
    canvas = canvas_size(size, config)
    side, patches = config.vision_config.image_size, config.vision_config.patches_per_side
    return canvas[0] // side * patches, canvas[1] // side * patches


def num_tiles(size: Size, config: LlavaConfig) -> int:
    """How many tiles an image of (height, width) is cut into, beside the whole."""
    rows, columns = grid_size(size, config)
    return rows * columns // config.vision_config.patches_per_side**2


def num_tokens(size: Size, config: LlavaConfig) -> int:
    """How many positions an image of (height, width) takes in the prompt when it is cut."""
    tile = config.tokens_per_tile
    if config.mm_patch_merge_type != "spatial_unpad":
        return tile * (1 + num_tiles(size, config))
    rows, columns = unpadded_grid(size, grid_size(size, config), config.anyres_convention)
    return tile + (rows.stop - rows.start) * (columns.stop - columns.start + 1)
