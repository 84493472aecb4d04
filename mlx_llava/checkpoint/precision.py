"""In which numbers a model computes: as it is stored, as it is asked for, or as the device can."""

from __future__ import annotations

import logging
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_llava.files import size_said
from mlx_llava.model.device import DTYPES, available_memory, on_cpu
from mlx_llava.model.linux.layers import is_read_fast
from mlx_llava.model.llava import Llava
from mlx_llava.model.quantized import dequantize, is_quantized

logger = logging.getLogger("mlx_llava")
#: Up to so many bytes in float32, nothing is worth the import of what reads fewer bits.
SMALL = 1 << 26


def read_dtype(name: str) -> mx.Dtype:
    """MLX's dtype of a name.

    Raises:
        ValueError: Weights do not come in it.
    """
    if name not in DTYPES:
        raise ValueError(f"There is no dtype {name!r}; known: {', '.join(DTYPES)}.")
    dtype: mx.Dtype = getattr(mx, name)
    return dtype


def cast(module: nn.Module, dtype: str | None) -> None:
    """Casts the floating-point weights of a module; None leaves them as they are."""
    if dtype is not None:
        module.set_dtype(read_dtype(dtype))


def arrays_of(module: nn.Module) -> list[mx.array]:
    """All weights of a module."""
    return list(dict(tree_flatten(module.parameters())).values())


def suit_device(model: Llava) -> None:
    """Lets a model compute in what its device is fast at.

    A GPU takes the weights as they are. Of a CPU's matmuls only float32's is fast, so there all
    is computed in it. Matrices of few bits stay as they are where that is how they are read
    fastest (linux/layers.py); others, and all of a small model, become float32, if there is memory
    for it. The log says so of what is not small.
    """
    if not on_cpu():
        return
    layers = _narrow_layers(model)
    slow = layers
    if _bytes_in_float32(layers) > SMALL:
        slow = [layer for layer in layers if not is_read_fast(layer)]
    needed, available = _bytes_in_float32(slow), available_memory()
    if needed > 0.8 * available:
        logger.warning(
            f"The weights would take {size_said(needed)} in float32 and {size_said(available)} "
            f"are free; they stay in {_kind(slow)}, which is slow on a CPU."
        )
        slow = []
    elif needed > SMALL and any(map(is_quantized, slow)):
        logger.warning(f"From {_kind(slow)} to float32 for the CPU: {size_said(needed)}.")
    changed = {id(layer) for layer in slow}
    kept = [layer for layer in layers if id(layer) not in changed]
    if kept and len(slow) < len(layers):
        stored = sum(array.nbytes for layer in kept for array in arrays_of(layer))
        floats = _bytes_in_float32(kept)
        logger.info(
            f"{_kind(kept)} are read as they are: {size_said(stored)}, in float32 "
            f"{size_said(floats)}."
        )
    _compute_in_float32(model, {id(layer.weight) for layer in kept} | _scales(model, changed))
    paths = {path for path, layer in model.named_modules() if id(layer) in changed}
    dequantize(model, mx.float32, paths)
    if not any(map(is_quantized, model.modules())):
        model.config = replace(model.config, quantization=None)


def _compute_in_float32(model: Llava, kept: set[int]) -> None:
    """Makes all weights float32 but those whose ids are kept."""

    def widen(array: mx.array) -> mx.array:
        is_float = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(mx.float32) if is_float and id(array) not in kept else array

    model.update(tree_map(widen, model.parameters()))


def _scales(model: Llava, changed: set[int]) -> set[int]:
    """The ids of scales that are read as they are stored, but of layers with these ids.

    An embedding and the projector give what their scales are: in 16 bits, it would be rounded.
    """
    return {
        id(layer[name])
        for part in (model.vision_tower, model.language_model)
        for layer in part.modules()
        if isinstance(layer, nn.QuantizedLinear)
        if id(layer) not in changed and is_read_fast(layer)
        for name in ("scales", "biases")
    }


def _narrow_layers(model: Llava) -> list[nn.Module]:
    """The layers with a matrix of less than 32 bits, but for the projector's plain ones.

    The projector computes in what its weights are.
    """
    plain = (nn.Linear, nn.Embedding)
    parts = (model.vision_tower, model.language_model)
    candidates = [layer for part in parts for layer in part.modules() if isinstance(layer, plain)]
    halves = [layer for layer in candidates if layer.weight.dtype != mx.float32]
    return [layer for layer in model.modules() if is_quantized(layer)] + halves


def _bytes_in_float32(layers: list[nn.Module]) -> int:
    numbers = (
        layer.weight.size * 32 // layer.bits if is_quantized(layer) else layer.weight.size
        for layer in layers
    )
    return 4 * sum(numbers)


def _kind(layers: list[nn.Module]) -> str:
    first = layers[0]
    if is_quantized(first):
        return f"{first.bits} bits"
    return str(first.weight.dtype).removeprefix("mlx.core.")
