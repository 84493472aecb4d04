"""What one of several ranks loads of a checkpoint: some of every layer, or some of the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias, TypeVar, cast

import mlx.core as mx

from mlx_llava.checkpoint.open import Checkpoint
from mlx_llava.checkpoint.tensors import LazyTensor
from mlx_llava.model import pipeline, sharding
from mlx_llava.model.device import total_memory
from mlx_llava.model.llava import Llava

#: Makes the model of a share a part of the whole.
Connect: TypeAlias = Callable[[Llava], None]
Value = TypeVar("Value")


def take_shard(checkpoint: Checkpoint, group: mx.distributed.Group) -> Connect:
    """Leaves of a checkpoint this rank's part of every layer of the decoder.

    Raises:
        ValueError: So many ranks cannot have equal parts.
    """
    config, rank, size = checkpoint.config, group.rank(), group.size()
    text = config.text_config
    sharding.check_sharding(text, config.quantization, size)
    contents = checkpoint.contents
    cut = partial(sharding.cut, kv_heads=text.kv_heads, rank=rank, size=size)
    contents.tensors = {
        name: _read_at_once(tensor.then(partial(cut, name)) if sharding.is_cut(name) else tensor)
        for name, tensor in contents.tensors.items()
    }
    checkpoint.config = replace(config, text_config=sharding.rank_config(text, size))
    return partial(sharding.shard, group=group)


def _read_at_once(tensor: LazyTensor) -> LazyTensor:
    """So that what it is made of is forgotten before the next one is read."""

    def read() -> mx.array:
        array = mx.contiguous(tensor.read())
        mx.eval(array)
        return array

    return replace(tensor, read=read)


def take_layers(
    checkpoint: Checkpoint, group: mx.distributed.Group, split: Sequence[int] | None
) -> Connect:
    """Leaves of a checkpoint this rank's layers of the decoder.

    Args:
        checkpoint (Checkpoint): The whole.
        group (mx.distributed.Group): All ranks.
        split (sequence of int, optional): How many layers each gets. Default: as its memory allows.

    Raises:
        ValueError: A rank would get no layer, or a layer no rank.
    """
    config, contents = checkpoint.config, checkpoint.contents
    depth = config.text_config.num_hidden_layers
    split = split or _split_by_memory(depth, contents.tensors, group)
    pipeline.check_split(depth, split, group.size())
    start = sum(split[: group.rank()])
    layers = range(start, start + split[group.rank()])
    text = pipeline.rank_config(config.text_config, layers)
    quantization = config.quantization and _own(config.quantization, layers)
    checkpoint.config = replace(config, text_config=text, quantization=quantization)
    own = _own(contents.tensors, layers)
    contents.tensors = {name: _read_at_once(tensor) for name, tensor in own.items()}
    return partial(pipeline.connect, group=group)


def _own(named: Mapping[str, Value], layers: range) -> dict[str, Value]:
    """What belongs to these layers or to none, by the names that they have on their rank."""
    names = {key: pipeline.part_of(key, layers) for key in named}
    return {name: named[key] for key, name in names.items() if name is not None}


def _split_by_memory(
    depth: int, tensors: Mapping[str, LazyTensor], group: mx.distributed.Group
) -> list[int]:
    whole = _own(tensors, range(0))
    nbytes = sum(tensor.nbytes for tensor in whole.values())
    memory = mx.distributed.all_gather(mx.array([total_memory() >> 20]), group=group)
    return pipeline.split_layers(depth, cast("list[int]", memory.tolist()), nbytes >> 20)
