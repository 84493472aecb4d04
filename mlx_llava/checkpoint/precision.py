"""In which numbers a model computes: as it is stored, as it is asked for, or as the device can."""

from __future__ import annotations

import logging
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_llava.model.device import DTYPES, available_memory, on_cpu
from mlx_llava.model.llava import Llava
from mlx_llava.model.quantized import dequantize, is_quantized

logger = logging.getLogger("mlx_llava")


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

    A GPU takes the weights as they are. Of a CPU's matmuls only float32's is fast, so weights
    become float32 there, quantised ones too; said in the log, since it takes memory. If there is
    not enough of it, they stay.
    """
    if not on_cpu():
        return
    layers = [layer for layer in model.modules() if is_quantized(layer)]
    coded = {id(array) for layer in layers for array in arrays_of(layer)}
    rest = [array for array in arrays_of(model) if id(array) not in coded]
    if not layers and all(array.dtype == mx.float32 for array in rest):
        return
    numbers = sum(layer.weight.size * 32 // layer.bits for layer in layers)
    needed = 4 * (numbers + sum(array.size for array in rest))
    kind = f"{layers[0].bits} bits" if layers else str(rest[0].dtype).removeprefix("mlx.core.")
    available = available_memory()
    if needed > 0.8 * available:
        logger.warning(
            f"The weights would take {needed / 1e9:.1f} GB in float32 and {available / 1e9:.1f} GB "
            f"are free; they stay in {kind}, which is slow on a CPU."
        )
        return
    model.set_dtype(mx.float32)  # scales too, so that codes are read without rounding
    if layers:
        logger.warning(f"From {kind} to float32 for the CPU: {needed / 1e9:.2f} GB.")
        dequantize(model, mx.float32)
        model.config = replace(model.config, quantization=None)
