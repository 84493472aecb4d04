"""The features of tiles -> those of each image, in the order that they have in the prompt.

N tiles, P patches of each, D width. LLaVA-NeXT: llava_arch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_llava.model.anyres import (
    Frames,
    ImageSizes,
    Layout,
    Size,
    grid_size,
    laid_grid,
    newline_every,
    num_tiles,
    unpadded_grid,
)
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llava_classes import AVERAGE, BILINEAR


def lay_out(
    features: mx.array,
    newline: mx.array | None,
    image_sizes: ImageSizes,
    config: LlavaConfig,
) -> list[mx.array]:
    """Puts the features of tiles in the order that images have in the prompt.

    Args:
        features: Of all tiles of all images, (N, P, D), or one after another, (R, D).
        newline: What ends a line, (D,), in models that have it.
        image_sizes: The (height, width) of each image that is cut into tiles, None for one that is
            a tile, `Frames` for a video; without them every tile is an image.
        config: How it is done.

    Returns:
        Those of each image, (tokens, D).

    Raises:
        ValueError: Tiles and sizes do not match.
    """
    rows = features.flatten(0, -2)  # (R, D)
    sizes = image_sizes or [None] * (len(rows) // config.tokens_per_tile)
    tiles = [_num_tiles(size, config) for size in sizes]
    counts = [n * _tile_features(size, config) for n, size in zip(tiles, sizes, strict=True)]
    if sum(counts) != len(rows):
        found, expected = (count // config.tokens_per_tile for count in (len(rows), sum(counts)))
        raise ValueError(f"pixel_values have {found} tiles but image_sizes need {expected}.")
    return [
        _lay_out_tiles(image.reshape(n, -1, rows.shape[-1]), newline, size, config)
        for image, n, size in zip(_split(rows, counts), tiles, sizes, strict=True)
    ]


def pool_first(features: mx.array, image_sizes: ImageSizes, config: LlavaConfig) -> mx.array:
    """The tower's features (N, P, width) with those of frames averaged before they are projected.

    Returns:
        The same where there are none, or the features of all tiles one after another, (R, width).
    """
    sizes = image_sizes or ()
    if config.pooling != AVERAGE or not any(isinstance(size, Frames) for size in sizes):
        return features
    images = _split(features, [_num_tiles(size, config) for size in sizes])
    pooled = [
        _average(tiles, config) if isinstance(size, Frames) else tiles
        for tiles, size in zip(images, sizes, strict=True)
    ]
    return mx.concatenate([tiles.flatten(0, 1) for tiles in pooled])


def _average(frames: mx.array, config: LlavaConfig) -> mx.array:
    """(N, P, width) -> (N, side side, width), of squares that lie side by side."""
    return _squares(frames, config.spatial_pool_stride, config).mean(axis=(2, 4)).flatten(1, 2)


def _squares(frames: mx.array, k: int, config: LlavaConfig) -> mx.array:
    """(N, P, width) -> squares of k x k features that lie side by side, (N, n, k, n, k, width)."""
    N, _, width = frames.shape
    patches, n = config.vision_config.patches_per_side, config.frame_side
    grid = frames.reshape(N, patches, patches, width)[:, : n * k, : n * k]
    return grid.reshape(N, n, k, n, k, width)


def _split(features: mx.array, counts: Sequence[int]) -> Sequence[mx.array]:
    return cast("Sequence[mx.array]", mx.split(features, [*accumulate(counts)][:-1]))


def _num_tiles(size: Layout, config: LlavaConfig) -> int:
    """How many tiles an image or a video is."""
    if size is None:
        return 1
    return size.frames if isinstance(size, Frames) else 1 + num_tiles(size, config)


def _tile_features(size: Layout, config: LlavaConfig) -> int:
    """How many features each of them has when it is projected."""
    is_pooled = isinstance(size, Frames) and config.pooling == AVERAGE
    return config.frame_side**2 if is_pooled else config.tokens_per_tile


def _lay_out_tiles(
    tiles: mx.array, newline: mx.array | None, size: Layout, config: LlavaConfig
) -> mx.array:
    """One image's tiles (1 + n, P, D) -> the whole, then its grid row by row."""
    if size is None:
        return tiles[0] if newline is None else _lines(tiles, newline)
    if isinstance(size, Frames):
        return _lay_out_frames(tiles, newline, config)
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


def _lay_out_frames(frames: mx.array, newline: mx.array | None, config: LlavaConfig) -> mx.array:
    """The features of a video's frames one after another; OneVision's become fewer, in lines."""
    if config.pooling == AVERAGE:
        return frames.flatten(0, 1)
    pooled = _halve(frames, config).flatten(0, 2)  # (tokens, D)
    line = newline_every(len(frames), config)
    if newline is None or line is None:
        return pooled
    return _lines(pooled.reshape(-1, line, pooled.shape[-1]), newline)


def _halve(frames: mx.array, config: LlavaConfig) -> mx.array:
    """The grids of frames (N, P, D) with half the side, (N, side, side, D): llava_arch.py."""
    if config.mm_spatial_pool_mode == BILINEAR:
        patches = config.vision_config.patches_per_side
        grids = frames.reshape(len(frames), patches, patches, -1)
        return interpolate(grids, (config.frame_side,) * 2)
    squares = _squares(frames, 2, config)
    if config.mm_spatial_pool_mode == AVERAGE:
        return squares.mean(axis=(2, 4))
    return squares.max(axis=(2, 4))


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
    return _between(low, high, share)


@partial(mx.compile, shapeless=True)
def _between(low: mx.array, high: mx.array, share: mx.array) -> mx.array:
    """In one kernel, as the sum is float32 whatever the grid is."""
    return (low * (1 - share) + high * share).astype(low.dtype)
