"""Anyres (LLaVA 1.6, OneVision) in numbers: which canvas, which grid, which part of it is image.

Processor and model must agree: the one counts the placeholders, the other fills them (layout.py).
All sizes are (height, width). LLaVA-NeXT: mm_utils.py and llava_arch.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llava_classes import BILINEAR

Size: TypeAlias = tuple[int, int]


class Frames(NamedTuple):
    """What stands for the size of a video."""

    frames: int


#: The own size of each image that is cut into tiles; None for one that is a tile.
Layout: TypeAlias = "Size | Frames | None"
ImageSizes: TypeAlias = "Sequence[Layout] | None"

#: How images become tiles: the middle, padded to a square, or several of each.
MODES = ("crop", "pad", "anyres")


def canvas_size(size: Size, config: LlavaConfig) -> Size:
    """The canvas that keeps most of an image and wastes least, in pixels (mm_utils.py).

    The original code reads the pinpoints as (width, height), Hugging Face as (height, width);
    with the usual symmetric list they differ where both sides are at most one tile.
    """
    (height, width), pinpoints = size, config.image_grid_pinpoints
    best, most_kept, least_wasted = pinpoints[0], 0, math.inf
    for pinpoint in pinpoints:
        rows, columns = pinpoint if config.anyres_convention == "hf" else pinpoint[::-1]
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = rows * columns - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (rows, columns), kept, wasted
    return best


def grid_size(size: Size, config: LlavaConfig) -> Size:
    """Rows and columns of the anyres feature grid of an image of (height, width)."""
    canvas = canvas_size(size, config)
    side, patches = config.vision_config.image_size, config.vision_config.patches_per_side
    return canvas[0] // side * patches, canvas[1] // side * patches


def unpadded_grid(size: Size, config: LlavaConfig) -> tuple[slice, slice]:
    """The rows and columns of an anyres feature grid that show image, not padding.

    The original truncates the scaled side (llava_arch.py, unpad_image); Hugging Face first
    rounds it to 7 digits, which differs where floating point falls just short of an integer.
    """
    (height, width), (rows, columns) = size, grid_size(size, config)

    def middle(full: int, kept: float) -> slice:
        skip = (full - int(round(kept, 7) if config.anyres_convention == "hf" else kept)) // 2
        return slice(skip, full - skip)

    if width / height > columns / rows:
        return middle(rows, height * (columns / width)), slice(0, columns)
    return slice(0, rows), middle(columns, width * (rows / height))


def laid_grid(size: Size, config: LlavaConfig) -> Size:
    """Rows and columns of an anyres grid as they stand in the prompt: of what shows image.

    Far more of them than of `max_tiles` tiles are scaled down to about as many (anyres_max_9).
    """
    rows, columns = (part.stop - part.start for part in unpadded_grid(size, config))
    if config.max_tiles is None:
        return rows, columns
    patches = config.vision_config.patches_per_side**2
    ratio = math.sqrt(rows * columns / (config.max_tiles * patches))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def num_tiles(size: Size, config: LlavaConfig) -> int:
    """How many tiles an image of (height, width) is cut into, beside the whole."""
    rows, columns = grid_size(size, config)
    return rows * columns // config.vision_config.patches_per_side**2


def newline_every(frames: int, config: LlavaConfig) -> int | None:
    """After how many features of so many frames a newline comes, if any does."""
    if not config.has_newline or config.pooling != BILINEAR:
        return None
    row, frame = config.frame_side, config.frame_side**2
    lines = {"grid": row, "frame": frame, "one_token": frames * frame}
    return lines.get(config.mm_newline_position)


def num_tokens(size: Layout, config: LlavaConfig) -> int:
    """How many positions an image or a video takes in the prompt."""
    tile = config.tokens_per_tile
    if size is None:
        return tile + config.has_newline  # which ends also a lone tile
    if isinstance(size, Frames):
        features = size.frames * config.frame_side**2
        line = newline_every(size.frames, config)
        return features + (features // line if line else 0)
    if config.mm_patch_merge_type != "spatial_unpad":
        return tile * (1 + num_tiles(size, config))
    rows, columns = laid_grid(size, config)
    return tile + rows * (columns + 1)
