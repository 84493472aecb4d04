"""Layers that multiply by NumPy, with their weights as they are stored, on Linux's CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_llava.model import clip
from mlx_llava.model.linux import functions
from mlx_llava.model.linux.functions import Function, by_numpy, fits, matmul, view
from mlx_llava.model.linux.products import multiply, multiply_back
from mlx_llava.model.linux.threads import EXP
from mlx_llava.model.linux.weights import UNITS, Affine, Array, Half, Plain, Weight, kernels
from mlx_llava.model.quantized import PermutedQuantizedLinear, is_quantized

HALVES = (mx.float16, mx.bfloat16)


#: What the product of a layer is made of.
_PARTS = ("weight", "scales", "biases", "input_permutation")


@dataclass(frozen=True)
class _Found:
    """A weight, and the memory in which its parts are."""

    memory: list[npt.NDArray[Any]]
    weight: Weight


def stored(layer: nn.Module) -> Weight:
    """The weight of a layer, its memory not copied; looked for again where a part is another."""
    parts = {name: layer[name] for name in _PARTS if name in layer}
    try:
        memory = [*map(_memory, parts.values())]
    except BufferError:  # it is not row by row
        layer.update({name: mx.contiguous(part) for name, part in parts.items()})
        return stored(layer)
    found = vars(layer).get("_found")
    if found is None or not all(map(np.may_share_memory, memory, found.memory)):
        # Of our own: `layer.weight += 1` frees the memory of an object, and gives it other.
        parts = {name: part[...] for name, part in parts.items()}
        found = layer._found = _Found([*map(_memory, parts.values())], _find(layer, **parts))
    return cast("Weight", found.weight)


def _memory(array: mx.array) -> npt.NDArray[Any]:
    """Where an array is; also of bfloat16, which NumPy does not know."""
    return np.frombuffer(cast("Any", array), np.uint8)


def _find(layer: nn.Module, weight: mx.array, **parts: mx.array) -> Weight:
    if is_quantized(layer):
        scales, biases, order = parts["scales"], parts["biases"], parts.get("input_permutation")
        if scales.dtype != biases.dtype:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return Affine(
            cast("npt.NDArray[Any]", view(weight)),
            _words(scales),
            _words(biases),
            layer.bits,
            scales.dtype == mx.bfloat16,
            None if order is None else cast("npt.NDArray[Any]", view(order)),
        )
    if weight.dtype in HALVES:
        return Half(_words(weight), weight.dtype == mx.bfloat16)
    return Plain(view(weight))


def _words(array: mx.array) -> npt.NDArray[Any]:
    """float32 as it is, 16 bits as uint16."""
    return view(array.view(mx.uint16) if array.dtype in HALVES else array)


def is_coded(layer: nn.Module) -> bool:
    """Whether a layer has codes that NumPy multiplies with."""
    return is_quantized(layer) and layer.mode == "affine" and layer.bits in UNITS


def is_read_fast(layer: nn.Module) -> bool:
    """Whether decoding reads a weight of less than 32 bits faster as it is than as float32."""
    if not functions.NUMPY or kernels() is None:
        return False
    if is_quantized(layer):
        return is_coded(layer) and layer.bits in kernels().WHOLE
    return layer.weight.dtype in HALVES


def apply(x: Array, *layers: nn.Module) -> list[Array]:
    """Linear layers of this file on NumPy's arrays: (..., inputs) -> (..., outputs) of each."""
    biases = [view(layer.bias) if "bias" in layer else None for layer in layers]
    return multiply(x, *map(stored, layers), biases=biases)


def _product(layer: nn.Module, x: mx.array, mlx: Function) -> mx.array:
    """``x @ weight.T`` of float32 and a weight that has codes or 16 bits, which `mlx` does too."""
    outputs = len(layer.weight)
    is_plain = not is_quantized(layer)
    if not fits(x.size * outputs, x):
        return mlx(x)
    try:
        weight = stored(layer)
    except RuntimeError:  # mx.compile traces the weight: it has no memory yet
        return mlx(x)

    @mx.custom_function
    def product(x: mx.array, *_: mx.array) -> mx.array:
        mx.eval(x)
        return mx.array(multiply(view(x), weight)[0])

    @product.vjp
    def _vjp(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        mx.eval(cotangent)
        back = mx.array(multiply_back(view(cotangent), weight))
        if not is_plain:
            return back
        x, own = primals
        rows = cotangent.reshape(-1, outputs).T @ x.reshape(-1, x.shape[-1])
        return back, rows.astype(own.dtype)

    try:
        return cast("mx.array", product(x, layer.weight) if is_plain else product(x))
    except ValueError:  # mx.compile traces: there are no values yet
        return mlx(x)


class Linear(nn.Linear):
    """MLX's linear layer."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., inputs) -> (..., outputs)."""
        if not fits(x.size * len(self.weight), x):
            return super().__call__(x)
        x = _plain_product(self, x)
        return x + self.bias if "bias" in self else x


class Embedding(nn.Embedding):
    """An embedding that is used as the head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., D) -> logits (..., V)."""
        return _plain_product(self, x)


def _plain_product(layer: nn.Module, x: mx.array) -> mx.array:
    if layer.weight.dtype in HALVES and x.dtype == mx.float32:
        return _product(layer, x, lambda x: x @ layer.weight.T)
    return matmul(x, layer.weight)


class PatchEmbedding(clip.PatchEmbedding):
    """CLIP's by `matmul`."""

    def project(self, patches: mx.array) -> mx.array:
        """(B, P, side side 3) -> (B, P, D)."""
        return matmul(patches, self.weight.flatten(1))


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's linear layer of codes, its inputs permuted or not."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., inputs) -> (..., outputs)."""
        x = _product(self, x, lambda x: _quantized_matmul(self, x))
        return x + self.bias if "bias" in self else x


class PermutedLinear(QuantizedLinear, PermutedQuantizedLinear):
    """What a `PermutedQuantizedLinear` becomes."""


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """An embedding of codes."""

    def __call__(self, ids: mx.array) -> mx.array:
        """(...) -> (..., D)."""
        mlx = super().__call__
        if not fits(ids.size * self.dims * EXP, self.scales):
            return mlx(ids)
        weight = cast("Affine", stored(self))
        return by_numpy(lambda ids: weight.rows(ids), mlx, ids)

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., D) -> logits (..., V)."""
        return _product(self, x, super().as_linear)


#: What `apply` takes.
LINEAR = (Linear, QuantizedLinear, PermutedLinear)


def _quantized_matmul(layer: nn.Module, x: mx.array) -> mx.array:
    """MLX's own product."""
    if "input_permutation" in layer:
        x = x[..., layer.input_permutation]
    return mx.quantized_matmul(
        x,
        layer.weight,
        scales=layer.scales,
        biases=layer.biases,
        transpose=True,
        group_size=layer.group_size,
        bits=layer.bits,
    )
