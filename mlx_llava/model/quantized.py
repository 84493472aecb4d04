"""Quantised layers: those whose inputs are permuted (GPTQ's act-order), and back to plain ones."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten


class PermutedQuantizedLinear(nn.QuantizedLinear):
    """Sorts its inputs by group, so that groups are contiguous as MLX's kernels need them.

    Attributes:
        input_permutation: which input comes at each position, int32 (inputs,).
    """

    @classmethod
    def adopt(cls, layer: nn.QuantizedLinear) -> None:
        """Makes a layer one of these, its inputs in the order that they have."""
        layer.__class__ = cls
        inputs = layer.scales.shape[1] * layer.group_size
        layer.input_permutation = mx.arange(inputs, dtype=mx.int32)

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x[..., self.input_permutation])


def layer_settings(quantization: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The bits, group_size and mode of a layer: its own, or those of all."""
    keys = ("bits", "group_size", "mode")
    common = {key: quantization[key] for key in keys if key in quantization}
    own = quantization.get(path)
    return {**common, **own} if isinstance(own, dict) else common


def plain_weight(layer: nn.Module) -> mx.array:
    """The weight (outputs, inputs) of a layer, dequantised if need be."""
    if not is_quantized(layer):
        return layer.weight
    weight = mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )
    if isinstance(layer, PermutedQuantizedLinear):
        return weight[:, mx.argsort(layer.input_permutation)]
    return weight


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is made of codes."""
    return isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding))


def float_dtype(layer: nn.Module, default: mx.Dtype) -> mx.Dtype:
    """What a layer computes in: its weight's dtype, or that of its scales where it has codes.

    In the mx modes those are codes as well, and only a bias may tell.
    """
    arrays = (layer[name] for name in ("scales", "weight", "bias") if name in layer)
    dtypes = (array.dtype for array in arrays)
    return next((dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating)), default)


def with_weight(layer: nn.Module, weight: mx.array) -> nn.Module:
    """A plain layer like another, its bias included, that has this weight."""
    is_linear = isinstance(layer, (nn.Linear, nn.QuantizedLinear))
    plain = nn.Linear(1, 1, bias="bias" in layer) if is_linear else nn.Embedding(1, 1)
    plain.weight = weight
    if "bias" in layer:
        plain.bias = layer.bias
    return plain


def dequantize(model: nn.Module, dtype: mx.Dtype, paths: Container[str]) -> None:
    """Puts plain layers in the place of some quantised ones."""
    plain = [
        (path, with_weight(layer, plain_weight(layer).astype(dtype)))
        for path, layer in model.named_modules()
        if path in paths and is_quantized(layer)
    ]
    model.update_modules(tree_unflatten(plain))
