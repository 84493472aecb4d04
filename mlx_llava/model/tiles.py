"""The tiles of images spread over ranks: each encodes some of them, and all get all features.

N tiles, P features of each.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_llava.model import llava
from mlx_llava.model.layers import AnyArray


class Llava(llava.Llava):
    """One of several ranks that have the same vision tower.

    Attributes:
        group: all of them.
    """

    group: mx.distributed.Group

    def features(self, pixel_values: AnyArray) -> mx.array:
        """As one rank alone gives them, (N, P, width); a lone tile is encoded by every rank."""
        N, size = len(pixel_values), self.group.size()
        if N == 1:
            return super().features(pixel_values)
        share = tiles_per_rank(N, size)
        start = self.group.rank() * share
        own = super().features(pixel_values[min(start, N - 1) : start + share])
        padded = mx.pad(own, [(0, share - len(own)), (0, 0), (0, 0)])
        features = mx.distributed.all_gather(padded, group=self.group)[:N]
        mx.eval(features)  # here, as not every rank has a use for them
        return features


def tiles_per_rank(tiles: int, size: int) -> int:
    """How many tiles each of so many ranks encodes; the last ranks have fewer, or one again."""
    return -(-tiles // size)


def spread_tiles(model: llava.Llava, group: mx.distributed.Group) -> None:
    """Lets every rank encode its share of the tiles of images."""
    model.__class__ = Llava
    model.group = group
