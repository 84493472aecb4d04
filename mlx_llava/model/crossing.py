"""What crosses between ranks, by arithmetic: docs/several-macs.md has the same in words."""

from __future__ import annotations

from typing import NamedTuple

from mlx_llava.model import pipeline
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.text_config import TextConfig
from mlx_llava.model.tiles import tiles_per_rank


class Crossing(NamedTuple):
    """What one rank gives to the others."""

    times: int
    nbytes: int


def sharded_step(text: TextConfig, tokens: int, itemsize: int, rows: int = 1) -> Crossing:
    """New tokens of some rows, by tensor parallelism: two sums a block.

    In the last block, they are of each row's last token alone.
    """
    states = (text.num_hidden_layers - 1) * tokens + rows
    return Crossing(2 * text.num_hidden_layers, 2 * states * text.hidden_size * itemsize)


def pipelined_step(
    text: TextConfig, tokens: int, itemsize: int, rows: int = 1, sends: bool = True
) -> Crossing:
    """The same by a pipeline; the last rank does not send.

    Others hand their hidden states on in chunks, then all get the last one of each row.
    """
    chunks = -(-tokens // (rows * pipeline.CHUNK))
    state = text.hidden_size * itemsize
    return Crossing(1 + sends * chunks, (rows + sends * tokens) * state)


def tiles_step(config: LlavaConfig, tiles: int, size: int, itemsize: int) -> Crossing:
    """The tiles of images over so many ranks: one gathering, or nothing where there is one tile."""
    features = len(config.feature_layers) * config.vision_config.hidden_size
    own = tiles_per_rank(tiles, size) * config.tokens_per_tile
    return Crossing(1, own * features * itemsize) if tiles > 1 else Crossing(0, 0)
