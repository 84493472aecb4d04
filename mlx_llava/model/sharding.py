"""Tensor parallelism: each rank has some heads and some hidden units of every decoder block.

What the ranks give is added up twice in a block (Shoeybi et al. 2019, arXiv:1909.08053). A rank's
decoder is one of fewer heads and a narrower MLP, with weights cut from the whole's; embeddings,
norms and the head are whole on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_llava.model import llama
from mlx_llava.model.batch_cache import BatchLayer
from mlx_llava.model.cache import LayerCache
from mlx_llava.model.layers import Mask
from mlx_llava.model.llava import Llava
from mlx_llava.model.quantized import layer_settings
from mlx_llava.model.text_config import TextConfig
from mlx_llava.model.tiles import spread_tiles

#: The tensors of which a rank has a part: those of layers whose outputs are spread over the ranks,
#: and of those whose inputs are.
_CUT = re.compile(r"^language_model\..+\.(?:(q|k|v|gate|up)|o|down)_proj\.(\w+)$")


class Sharded:
    """A part of a block that every rank does some of.

    Attributes:
        group: the ranks.
    """

    group: mx.distributed.Group

    def total(self, own: mx.array) -> mx.array:
        """The sum of what all ranks give; the same bits on each."""
        return mx.distributed.all_sum(own, group=self.group)


class Attention(Sharded, llama.Attention):
    """Some of the heads."""

    def __call__(
        self,
        x: mx.array,
        mask: Mask | list[Mask],
        start: mx.array | int,
        cache: LayerCache | BatchLayer | None,
        last_only: bool = False,
    ) -> mx.array:
        return self.total(super().__call__(x, mask, start, cache, last_only))  # (B, L or 1, D)


class MLP(Sharded, llama.MLP):
    """Some of the hidden units."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.total(super().__call__(x))  # (B, L, D)


def shard(model: Llava, group: mx.distributed.Group) -> None:
    """Lets a model that has a rank's part of the weights add up what all ranks give."""
    spread_tiles(model, group)
    for block in model.language_model.layers:
        block.self_attn.__class__, block.mlp.__class__ = Attention, MLP
        block.self_attn.group = block.mlp.group = group


def rank_config(config: TextConfig, size: int) -> TextConfig:
    """What each of so many ranks has of a decoder; keys and values at least one head of."""
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // size,
        num_key_value_heads=max(1, config.kv_heads // size),
        head_dim=config.dims_per_head,
        intermediate_size=config.intermediate_size // size,
    )


def is_cut(name: str) -> bool:
    """Whether a rank has only a part of a tensor of the whole model."""
    return bool(_CUT.match(name))


def cut(name: str, array: mx.array, kv_heads: int, rank: int, size: int) -> mx.array:
    """A rank's part of such a tensor: some rows of the first layers, some columns of the last.

    Args:
        name (str): Its name in the whole model.
        array (mx.array): The tensor, a weight or codes and what belongs to them.
        kv_heads (int): How many heads of keys and values the whole decoder has; where there are
            fewer than ranks, some ranks have the same.
        rank (int): Which part.
        size (int): How many ranks there are.

    Raises:
        ValueError: The layer's inputs are permuted, so that each rank would need all of them.
    """
    match = _CUT.match(name)
    assert match
    layer, part = match.groups()
    if layer is None and part == "bias":
        return array if rank == 0 else mx.zeros_like(array)  # it is added up, too
    if part == "input_permutation":
        if layer is not None:
            return array
        raise ValueError(
            f"{name} is of GPTQ's act-order, which cannot be spread over ranks by heads; use "
            "--pipeline."
        )
    parts = min(size, kv_heads) if layer in ("k", "v") else size
    axis, own = (0 if layer else 1), rank * parts // size
    length = array.shape[axis] // parts
    return mx.split(array, [own * length, (own + 1) * length], axis=axis)[1]


def check_sharding(config: TextConfig, quantization: Mapping[str, Any] | None, size: int) -> None:
    """Raises ValueError unless so many ranks can have equal parts of a decoder.

    Args:
        config (TextConfig): The decoder.
        quantization (mapping, optional): MLX's ``quantization`` of the whole model.
        size (int): How many ranks there are.
    """
    if not (what := _indivisible(config, quantization, size)):
        return
    sizes = range(2, config.num_attention_heads + 1)
    fitting = [str(n) for n in sizes if not _indivisible(config, quantization, n)]
    advice = f"{', '.join(fitting)} ranks could" if fitting else "no number of ranks can"
    raise ValueError(f"{size} ranks cannot share {what}; {advice}, or use --pipeline.")


def _indivisible(config: TextConfig, quantization: Mapping[str, Any] | None, size: int) -> str:
    """What cannot be divided by so many, in words; nothing if all can be."""
    heads, kv_heads, hidden = config.num_attention_heads, config.kv_heads, config.intermediate_size
    if heads % size:
        return f"{heads} heads"
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} heads of keys and values"
    if hidden % size:
        return f"{hidden} hidden units"
    groups = _groups(config, quantization) if quantization else ()
    return next((f"{n} quantisation groups of {path}" for path, n in groups if n % size), "")


def _groups(config: TextConfig, quantization: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """How many groups there are along the inputs that are spread, by the layer.

    MLX leaves a layer as it is whose inputs are no multiple of a group.
    """
    heads = config.num_attention_heads * config.dims_per_head
    for i in range(config.num_hidden_layers):
        for name, inputs in (
            ("self_attn.o_proj", heads),
            ("mlp.down_proj", config.intermediate_size),
        ):
            path = f"language_model.model.layers.{i}.{name}"
            group = layer_settings(quantization, path).get("group_size")
            if group and quantization.get(path) is not False and not inputs % group:
                yield path, inputs // group
