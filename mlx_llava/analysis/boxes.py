"""Where in a picture each of its features comes from, and maps over the picture of what they get.

F features of a picture. A box is (left, top, right, bottom) in the picture's own pixels; it may
reach beyond the picture, where there is padding. Sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_llava.inputs.image_processor import ImageProcessor
from mlx_llava.model.anyres import Frames, Layout, Size, laid_grid, unpadded_grid
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.layout import lay_out, pool_first
from mlx_llava.model.llava_classes import AVERAGE, BILINEAR

Array: TypeAlias = "npt.NDArray[np.floating[Any]]"

#: The longer side of a map.
LONGEST = 256


def patch_boxes(image_processor: ImageProcessor, size: Size) -> Array:
    """Which part of a picture each patch of each of its tiles shows, (tiles, rows, columns, 4)."""
    tiles = np.array(image_processor.tile_boxes(size))
    config = image_processor.config.vision_config
    n = config.patches_per_side
    edges = np.arange(n + 1) * config.patch_size / config.image_size
    left, top, right, bottom = tiles.T[..., None]
    across, down = left + (right - left) * edges, top + (bottom - top) * edges
    boxes = np.empty((len(tiles), n, n, 4))
    boxes[..., 0], boxes[..., 2] = across[:, None, :-1], across[:, None, 1:]
    boxes[..., 1], boxes[..., 3] = down[:, :-1, None], down[:, 1:, None]
    return boxes


def feature_boxes(image_processor: ImageProcessor, size: Size) -> Array:
    """Which part of a picture each of its features shows, (F, 4), as they stand in the prompt.

    It is NaN for a class token and for the end of a line, which show no part of it.
    """
    config = image_processor.config
    layout = size if image_processor.mode == "anyres" else None
    found = _laid_out(patch_boxes(image_processor, size), layout, config)
    if layout and config.has_newline:
        shown, laid = unpadded_grid(size, config), laid_grid(size, config)
        down, across = ((part.stop - part.start) / n for part, n in zip(shown, laid, strict=True))
        _grow(found[config.tokens_per_tile :], down, across)
    return found


def frame_boxes(
    image_processor: ImageProcessor, sizes: Sequence[Size], corners: Sequence[Sequence[float]]
) -> Array:
    """The same of a video whose frames, of these sizes, lie side by side.

    Args:
        image_processor (ImageProcessor): What reads them.
        sizes (list of (height, width)): Theirs.
        corners (list of (left, top)): Where they lie.
    """
    config = image_processor.config
    frames = [*zip(sizes, np.tile(corners, 2), strict=True)]
    if config.pooling is None:
        boxes = [feature_boxes(image_processor, size) + corner for size, corner in frames]
        return np.concatenate(boxes)
    boxes = [patch_boxes(image_processor, size)[0] + corner for size, corner in frames]
    if config.mm_spatial_pool_mode == "max":
        config = replace(config, mm_spatial_pool_mode=AVERAGE)  # each is of as many patches
    found = _laid_out(np.stack(boxes), Frames(len(boxes)), config)
    side = config.vision_config.patches_per_side
    if config.pooling == AVERAGE:
        grown = float(config.spatial_pool_stride)
    else:
        grown = side / config.frame_side if config.mm_spatial_pool_mode == BILINEAR else 2
    _grow(found, grown, grown)
    return found


def _laid_out(boxes: Array, layout: Layout, config: LlavaConfig) -> Array:
    """Boxes of patches, (tiles, rows, columns, 4), in the order of features and as many, (F, 4)."""
    boxes = boxes.reshape(len(boxes), -1, 4)
    if config.vision_config.has_class_token:
        boxes = np.concatenate([np.full((len(boxes), 1, 4), np.nan), boxes], axis=1)
    boxes = boxes[:, 1:] if config.drops_first else boxes
    sizes = [layout] if layout else None
    no_box = mx.full((4,), np.nan) if config.has_newline else None
    pooled = pool_first(mx.array(boxes, mx.float32), sizes, config)
    (laid,) = lay_out(pooled, no_box, sizes, config)
    return np.array(laid)


def _grow(boxes: Array, down: float, across: float) -> None:
    """Makes boxes touch each other where scaling has moved them and left them small as patches."""
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) / 2 * [across, down]
    boxes[:, :2], boxes[:, 2:] = middle - half, middle + half


def heat_map(values: Array, boxes: Array, size: Size, longest: int = LONGEST) -> Array:
    """Spreads what each feature got, (F,), over the part of the picture that it shows, (F, 4).

    Returns:
        Map (height, width) in the picture's proportions. Its sum is that of the values, less
        those that show none of the picture and the part of each that lies beyond the picture.
    """
    left, top, right, bottom = boxes.T
    painted = paint(values / ((right - left) * (bottom - top)), boxes, size, longest)
    return painted * (size[0] * size[1] / painted.size)


def paint(values: Array, boxes: Array, size: Size, longest: int = LONGEST) -> Array:
    """A map as of `heat_map` with each part's value all over it.

    Where parts overlap, as anyres's whole picture and its tiles do, these add up.
    """
    height, width = size
    rows, columns = (max(1, round(side * longest / max(size))) for side in size)
    is_shown = ~np.isnan(boxes).any(axis=1)
    scale = np.array([columns / width, rows / height] * 2)
    left, top, right, bottom = (boxes[is_shown] * scale).T
    across, down = _overlap(left, right, columns), _overlap(top, bottom, rows)
    return down.T @ (values[is_shown, None] * across)


def _overlap(start: Array, end: Array, pixels: int) -> Array:
    """How much of each pixel lies in each interval, (intervals, pixels)."""
    edges = np.arange(pixels + 1)
    shared = np.minimum(end[:, None], edges[1:]) - np.maximum(start[:, None], edges[:-1])
    return np.maximum(shared, 0)
