"""Layers that Phi-3 stores as one, one's rows below the other's -> the layers that they are.

What is stored of them is weights, or MLX's codes, scales and biases of such: rows all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx

from mlx_llava.checkpoint.adapters import Lora, LowRank
from mlx_llava.checkpoint.tensors import LazyTensor
from mlx_llava.model.text_config import TextConfig

_FUSED = re.compile(r"^language_model\..+\.(qkv_proj|gate_up_proj)(?=\.|$)")


def is_fused(name: str) -> bool:
    """Whether a tensor, or a layer, is of several."""
    return bool(_FUSED.match(name))


def _parts(name: str, text: TextConfig) -> dict[str, slice]:
    """The names of the tensors or layers that one is, and their rows; itself is nothing."""
    if not (match := _FUSED.match(name)):
        return {}
    queries, keys = (n * text.dims_per_head for n in (text.num_attention_heads, text.kv_heads))
    sizes = {"gate": text.intermediate_size, "up": text.intermediate_size}
    if match[1] == "qkv_proj":
        sizes = {"q": queries, "k": keys, "v": keys}
    ends = accumulate(sizes.values())
    return {
        name.replace(match[1], f"{part}_proj"): slice(end - size, end)
        for (part, size), end in zip(sizes.items(), ends, strict=True)
    }


def split(tensors: Mapping[str, LazyTensor], text: TextConfig) -> dict[str, LazyTensor]:
    """All tensors, by the names of the layers that they are of.

    Raises:
        ValueError: One has not as many rows as these layers have.
    """
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        parts = _parts(name, text)
        if parts and not name.endswith(".input_permutation"):  # which all of them have
            result |= _split(tensor, parts)
        else:
            result |= dict.fromkeys(parts or [name], tensor)
    return result


def split_settings(quantization: Mapping[str, Any], text: TextConfig) -> dict[str, Any]:
    """MLX's ``quantization``, with what it says of single layers."""
    return {
        path: value
        for name, value in quantization.items()
        for path in (_parts(name, text) or [name])
    }


def split_lora(lora: Lora, text: TextConfig) -> Lora:
    """An adapter of fused layers as one of these layers, which share what its matrix A makes."""
    changes: dict[str, LowRank] = {}
    for name, change in lora.changes.items():
        parts = _parts(name, text)
        if not parts:
            changes[name] = change
            continue
        ups, magnitude = _split(change.up, parts), change.magnitude
        lengths = _split(magnitude, parts) if magnitude else {}
        changes |= {
            part: replace(change, up=up, magnitude=lengths.get(part)) for part, up in ups.items()
        }
    return replace(lora, changes=changes, trained=split(lora.trained, text))


def _split(tensor: LazyTensor, parts: Mapping[str, slice]) -> dict[str, LazyTensor]:
    """A tensor's rows by the names that they get; it is read once for all of them."""
    expected = max(own.stop for own in parts.values())
    if tensor.shape[0] != expected:
        raise ValueError(
            f"{tensor.source} has {tensor.shape[0]} rows, where text_config says {expected}: "
            f"those of {', '.join(parts)}."
        )
    unread: dict[str, mx.array] = {}

    def read(part: str) -> mx.array:
        if part not in unread:
            whole = tensor.read()
            unread.update({name: whole[own] for name, own in parts.items()})
        return unread.pop(part)

    sizes = {part: own.stop - own.start for part, own in parts.items()}
    return {
        part: replace(tensor, shape=(rows, *tensor.shape[1:]), read=partial(read, part))
        for part, rows in sizes.items()
    }
