"""The features of tiles -> those of each image, in the order that they have in the prompt.

N tiles, P patches of each, D width. LLaVA-NeXT: llava_arch.py.
"""

from __future__ import annotations

from itertools import accumulate

import mlx.core as mx
import numpy as np

from mlx_llava.model.anyres import (
    ImageSizes,
    Size,
    grid_size,
    laid_grid,
    num_tiles,
    unpadded_grid,
)
from mlx_llava.model.config import LlavaConfig


def lay_out(
    features: mx.array,
    newline: mx.array | None,
    image_sizes: ImageSizes,
    config: LlavaConfig,
) -> list[mx.array]:
    """Puts the features of tiles in the order that images have in the prompt.

    Args:
        features: Of all tiles of all images, (N, P, D).
        newline: What ends a line, (D,), in models that have it.
        image_sizes: The (height, width) of each image that is cut into tiles, None for one that is
            a tile; without them every tile is one.
        config: How it is done.

    Returns:
        Those of each image, (tokens, D).

    Raises:
        ValueError: Tiles and sizes do not match.
    """
    sizes = [None] * len(features) if image_sizes is None else image_sizes
    counts = (1 + num_tiles(size, config) if size else 1 for size in sizes)
    ends = list(accumulate(counts, initial=0))
    if ends[-1] != len(features):
        raise ValueError(
            f"pixel_values have {len(features)} tiles but image_sizes need {ends[-1]}."
        )
    images = zip(mx.split(features, ends[1:-1]), sizes, strict=True)
    return [_lay_out_tiles(tiles, newline, size, config) for tiles, size in images]


def _lay_out_tiles(
    tiles: mx.array, newline: mx.array | None, size: Size | None, config: LlavaConfig
) -> mx.array:
    """One image's tiles (1 + n, P, D) -> the whole, then its grid row by row."""
    if size is None:
        return tiles[0] if newline is None else _lines(tiles, newline)
    if config.mm_patch_merge_type == "flat":
        return tiles.flatten(0, 1)
    patches = config.vision_config.patches_per_side
    rows, columns = grid_size(size, config)
    shape = (rows // patches, columns // patches, patches, patches, -1)
    whole = tiles[1:].reshape(shape).transpose(0, 2, 1, 3, 4)
    whole = whole.reshape(rows, columns, -1)  # (rows, columns, D)
    if newline is None:
        return mx.concatenate([tiles[0], whole.flatten(0, 1)])
    shown = interpolate(whole[unpadded_grid(size, config)], laid_grid(size, config))
    return mx.concatenate([tiles[0], _lines(shown, newline)])  # (tokens, D)


def _lines(grid: mx.array, newline: mx.array) -> mx.array:
    """Ends each row of (rows, columns, D) with the newline feature and flattens it."""
    rows, _, D = grid.shape
    newlines = mx.broadcast_to(newline.astype(grid.dtype), (rows, 1, D))
    return mx.concatenate([grid, newlines], axis=1).flatten(0, 1)  # (rows (columns + 1), D)


def interpolate(grid: mx.array, size: Size) -> mx.array:
    """Scales a grid (..., rows, columns, D) to another size: bilinear, as PyTorch's interpolate.

    Corners are not aligned, and where a grid becomes smaller nothing is averaged before.
    """
    return _interpolate(_interpolate(grid, size[0], axis=-3), size[1], axis=-2)


def _interpolate(grid: mx.array, length: int, axis: int) -> mx.array:
    full = grid.shape[axis]
    if full == length:
        return grid
    scale = np.float64(np.float32(full / length))
    # Rounded once, as PyTorch's multiplication and subtraction are.
    places = np.maximum((np.arange(length) + 0.5) * scale - 0.5, 0).astype(np.float32)
    below = places.astype(np.int32)
    share = mx.array((places - below).reshape(-1, *[1] * (-1 - axis)))
    pair = (mx.array(at) for at in (below, np.minimum(below + 1, full - 1)))
    low, high = (mx.take(grid, at, axis) for at in pair)
    return (low * (1 - share) + high * share).astype(grid.dtype)
