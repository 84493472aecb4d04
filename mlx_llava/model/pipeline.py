"""A pipeline: each rank has some of the decoder's layers, and hands hidden states to the next.

A prompt goes through in chunks, so that a rank works on one while the next has the one before
(Huang et al. 2019, arXiv:1811.06965). After the last layer, all ranks get the last hidden state,
so that each has the logits. Embeddings, norm and head are whole on every rank.

B rows, L new tokens, D width.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_llava.model import llama
from mlx_llava.model.batch_cache import BatchLayer
from mlx_llava.model.cache import LayerCache
from mlx_llava.model.llava import Llava
from mlx_llava.model.positions import Ids
from mlx_llava.model.text_config import TextConfig
from mlx_llava.model.tiles import spread_tiles

#: How many tokens of a prompt go from rank to rank together.
CHUNK = 256
_LAYER = re.compile(r"^(language_model\.model\.layers\.)(\d+)(?=\.)")


class LanguageModel(llama.LanguageModel):
    """Some of the layers.

    Attributes:
        group: the ranks, in the order of their layers.
        wire: the dtype of hidden states between them.
    """

    group: mx.distributed.Group
    wire: mx.Dtype

    def _states(
        self,
        x: mx.array,
        cache: Sequence[LayerCache | BatchLayer] | None,
        attention_mask: mx.array | None,
        positions: Ids | None,
        last_only: bool = False,
    ) -> Iterator[mx.array]:
        """What this rank's last layer makes of the whole; what goes into a cache is in chunks."""
        length = x.shape[1]
        step = CHUNK if cache and attention_mask is None and positions is None else length
        states = [
            self._hand_on(x[:, start : start + step], cache, attention_mask, positions)
            for start in range(0, length, step)
        ]
        yield states[-1][:, -1:] if last_only else mx.concatenate(states, axis=1)

    def _hand_on(self, x: mx.array, *context: Any) -> mx.array:
        """What this rank's last layer makes of what the rank before sends, (B, L, D)."""
        rank, group = self.group.rank(), self.group
        if rank > 0:
            x = mx.distributed.recv(x.shape, self.wire, rank - 1, group=group)
        (x,) = deque(super()._states(x, *context), maxlen=1)
        x = x.astype(self.wire)
        if rank + 1 < group.size():
            x = mx.distributed.send(x, rank + 1, group=group)
        mx.async_eval(x)  # also of a chunk of which nobody asks for more than the cache
        return x

    def logits(self, x: mx.array) -> mx.array:
        """What the last rank's hidden state (B, L, D) says, on every rank: logits (B, L, V)."""
        states = mx.distributed.all_gather(x, group=self.group)
        return super().logits(states[-len(x) :])


def connect(model: Llava, group: mx.distributed.Group) -> None:
    """Makes a model that has a rank's layers a part of the whole."""
    spread_tiles(model, group)
    decoder = model.language_model
    decoder.__class__ = LanguageModel
    decoder.group, decoder.wire = group, _wire(decoder, group)


def _wire(decoder: llama.LanguageModel, group: mx.distributed.Group) -> mx.Dtype:
    """What holds the numbers of every rank's layers, which may be of other dtypes than its own."""
    parameters: dict[str, mx.array] = dict(tree_flatten(decoder.parameters()))
    own = {array.dtype for array in parameters.values()}
    kinds = (mx.float16, mx.bfloat16, mx.float32)
    having = mx.distributed.all_sum(mx.array([int(kind in own) for kind in kinds]), group=group)
    found = [kind for kind, ranks in zip(kinds, np.array(having), strict=True) if ranks]
    return found[0] if len(found) == 1 else mx.float32


def rank_config(config: TextConfig, layers: range) -> TextConfig:
    """A decoder of some layers of another."""
    kinds = config.layer_types[layers.start : layers.stop]
    return replace(config, num_hidden_layers=len(layers), layer_types=kinds)


def part_of(name: str, layers: range) -> str | None:
    """The name that a layer or tensor of the whole model has on a rank; None if it has it not."""
    if not (match := _LAYER.match(name)):
        return name
    index = int(match[2])
    return f"{match[1]}{index - layers.start}{name[match.end() :]}" if index in layers else None


def split_layers(depth: int, memory: Sequence[int], whole: int) -> list[int]:
    """How many layers each rank gets, by the memory that it has beside what each has whole.

    Args:
        depth (int): How many layers there are.
        memory (sequence of int): Of each rank.
        whole (int): What of it embeddings, head and vision tower take.
    """
    room, split = [max(1, n - whole) for n in memory], [1] * len(memory)
    while sum(split) < depth:  # as seats are given to parties (Sainte-Lague)
        split[max(range(len(split)), key=lambda rank: room[rank] / (2 * split[rank] + 1))] += 1
    return split


def check_split(depth: int, split: Sequence[int], size: int) -> None:
    """Raises ValueError unless every rank gets a layer, and each layer a rank."""
    if len(split) != size or sum(split) != depth or min(split, default=0) < 1:
        raise ValueError(
            f"{size} ranks cannot have {', '.join(map(str, split))} layers; the model has {depth}, "
            "and each rank needs one or more."
        )
