"""The features of tiles -> those of each image, in the order that they have in the prompt.

N tiles, P patches of each, D width. LLaVA-NeXT: llava_arch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx

from mlx_llava.model.anyres import Size, grid_size, num_tiles, unpadded_grid
from mlx_llava.model.config import LlavaConfig


def lay_out(
    features: mx.array,
    newline: mx.array | None,
    image_sizes: Sequence[Size] | None,
    config: LlavaConfig,
) -> list[mx.array]:
    """Puts the features of tiles in the order that images have in the prompt.

    Args:
        features: Of all tiles of all images, (N, P, D).
        newline: What ends a line, (D,), in models that have it.
        image_sizes: The (height, width) of each image, for anyres; without them every tile is one.
        config: How it is done.

    Returns:
        Those of each image, (tokens, D).

    Raises:
        ValueError: Tiles and sizes do not match.
    """
    if image_sizes is None:
        return [tile if newline is None else _lines(tile[None], newline) for tile in features]
    ends = list(accumulate((1 + num_tiles(size, config) for size in image_sizes), initial=0))
    if ends[-1] != len(features):
        raise ValueError(
            f"pixel_values have {len(features)} tiles but image_sizes need {ends[-1]}."
        )
    images = zip(mx.split(features, ends[1:-1]), image_sizes, strict=True)
    return [_lay_out_tiles(tiles, newline, size, config) for tiles, size in images]


def _lay_out_tiles(
    tiles: mx.array, newline: mx.array | None, size: Size, config: LlavaConfig
) -> mx.array:
    """One image's tiles (1 + n, P, D) -> the whole, then its grid row by row."""
    if config.mm_patch_merge_type == "flat":
        return tiles.flatten(0, 1)
    patches = config.vision_config.patches_per_side
    rows, columns = grid_size(size, config)
    shape = (rows // patches, columns // patches, patches, patches, -1)
    whole = tiles[1:].reshape(shape).transpose(0, 2, 1, 3, 4)
    whole = whole.reshape(rows, columns, -1)  # (rows, columns, D)
    if newline is None:
        return mx.concatenate([tiles[0], whole.flatten(0, 1)])
    shown = whole[unpadded_grid(size, config)]
    return mx.concatenate([tiles[0], _lines(shown, newline)])  # (tokens, D)


def _lines(grid: mx.array, newline: mx.array) -> mx.array:
    """Ends each row of (rows, columns, D) with the newline feature and flattens it."""
    rows, _, D = grid.shape
    newlines = mx.broadcast_to(newline.astype(grid.dtype), (rows, 1, D))
    return mx.concatenate([grid, newlines], axis=1).flatten(0, 1)  # (rows (columns + 1), D)
