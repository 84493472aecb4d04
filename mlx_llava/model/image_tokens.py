"""Fewer image tokens: of an image's features, those that differ most.

DivPrune (Alvar et al. 2025, arXiv:2503.02175): of the features as the projector gives them, the
first is the one whose nearest other is farthest, and then always that which is farthest from its
nearest chosen one. F features, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_llava.model.anyres import Frames, Layout, grid_size, laid_grid, unpadded_grid
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.positions import IN_ORDER, Ids, Part, Positions


@dataclass(frozen=True)
class ShownImage:
    """The features of an image that the decoder reads.

    Attributes:
        features: (n, D), in reading order.
        kept: which of all they are, (n,).
        total: how many there are.
    """

    features: mx.array
    kept: Ids
    total: int


def show(features: mx.array, count: int, size: Layout, config: LlavaConfig) -> ShownImage:
    """An image in at most so many of its features.

    Args:
        features: All of them, (F, D).
        count: How many to show.
        size: The image's (height, width), where the model cuts it into tiles.
        config: How it does so.
    """
    if count >= len(features):
        every = np.arange(len(features), dtype=np.int32)
        return ShownImage(features, every, len(features))
    vectors = np.array(features.astype(mx.float32))
    areas = areas_of(len(features), size, config)
    kept = [
        area[most_diverse(cosine_distances(vectors[area]), share)]
        for area, share in zip(areas, spread(count, [*map(len, areas)]), strict=True)
        if share
    ]
    indices = np.sort(np.concatenate(kept))
    return ShownImage(features[mx.array(indices)], indices, len(features))


def positions_after(
    images: Iterable[tuple[int, ShownImage]], before: Positions = IN_ORDER
) -> Positions:
    """Of a prompt whose images begin where they are said to, after what came before."""
    parts = [
        Part(start, image.kept, image.total)
        for start, image in images
        if len(image.kept) < image.total
    ]
    return Positions((*before.parts, *parts)) if parts else before


def areas_of(features: int, size: Layout, config: LlavaConfig) -> list[Ids]:
    """The features of an image by the tile that they show.

    A newline belongs to the tile that it ends a row of, and competes there like all others, as in
    DivPrune's own code: newlines are alike, so that one of them is kept before all else is.

    Args:
        features: How many there are.
        size: The image's (height, width), where the model cuts it.
        config: How it does so.
    """
    if size is None:
        return [np.arange(features, dtype=np.int32)]
    if isinstance(size, Frames):
        frames = np.minimum(np.arange(features) // (features // size.frames), size.frames - 1)
        return [np.flatnonzero(frames == i).astype(np.int32) for i in range(size.frames)]
    side, whole = config.vision_config.patches_per_side, config.tokens_per_tile
    if config.mm_patch_merge_type == "flat":
        tiles = np.arange(features) // whole
    else:
        rows, columns = laid = grid_size(size, config)
        shown = slice(0, rows), slice(0, columns)
        if config.has_newline:
            shown, laid = unpadded_grid(size, config), laid_grid(size, config)
        down, across = (_places(*pair) // side for pair in zip(shown, laid, strict=True))
        across = np.append(across, across[-1:]) if config.has_newline else across
        grid = 1 + down[:, None] * (columns // side) + across
        tiles = np.concatenate([np.zeros(whole, int), grid.flatten()])
    return [np.flatnonzero(tiles == tile).astype(np.int32) for tile in np.unique(tiles)]


def _places(shown: slice, count: int) -> Ids:
    """Where in a grid so many rows or columns lie, which may be fewer than are shown."""
    steps = (np.arange(count) + 0.5) * ((shown.stop - shown.start) / count)
    return (shown.start + steps).astype(np.int32)


def spread(count: int, sizes: Sequence[int]) -> list[int]:
    """Shares of a count by size, of which the largest remainders are rounded up."""
    total = sum(sizes)
    shares = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(count * sizes[i] % total))
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return shares


def cosine_distances(features: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of each feature from each other: float32 (F, D) -> (F, F)."""
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    directions = features / np.maximum(lengths, np.float32(1e-12))
    return 1 - directions @ directions.T


def most_diverse(distances: npt.NDArray[Any], count: int) -> Ids:
    """Greedily chosen so that the smallest distance is large; of equals, the first.

    Args:
        distances: (F, F).
        count: How many, at least one.
    """
    others = distances + np.diag(np.full(len(distances), np.inf, np.float32))
    chosen = [int(others.min(axis=1).argmax())]
    nearest = np.full(len(distances), np.inf, np.float32)  # of those that are chosen
    while len(chosen) < count:
        nearest = np.minimum(nearest, distances[chosen[-1]])
        nearest[chosen[-1]] = -np.inf
        chosen.append(int(nearest.argmax()))
    return np.array(chosen, np.int32)
