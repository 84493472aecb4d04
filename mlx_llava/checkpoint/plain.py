"""Quantised layers of a file -> plain ones, still unread."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_llava.checkpoint.tensors import LazyTensor, combine
from mlx_llava.model.quantized import layer_settings


def plain_layer(
    tensors: dict[str, LazyTensor], path: str, quantization: Mapping[str, Any] | None
) -> None:
    """Puts a plain weight in place of a layer's codes, in the precision of their scales.

    Args:
        tensors (dict): By canonical name; is changed, unless the layer is plain already.
        path (str): The layer.
        quantization (dict): MLX's settings, `quantized.layer_settings`.
    """
    if f"{path}.scales" not in tensors:
        return
    settings = layer_settings(quantization or {}, path)
    parts = [f"{path}.{part}" for part in ("weight", "scales", "biases")]
    present = [tensors.pop(part) for part in parts if part in tensors]
    order = tensors.pop(f"{path}.input_permutation", None)
    plain = combine(present, partial(_plain, settings=settings))
    if order is not None:
        plain = combine([plain, order], lambda arrays: arrays[0][:, mx.argsort(arrays[1])])
    tensors[f"{path}.weight"] = plain


def plain_tensors(
    tensors: Mapping[str, LazyTensor], quantization: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """Plain weights in place of all codes."""
    result = dict(tensors)
    for name in tensors:
        if name.endswith(".scales"):
            plain_layer(result, name.removesuffix(".scales"), quantization)
    return result


def _plain(arrays: list[mx.array], settings: Mapping[str, Any]) -> mx.array:
    weight, scales, *biases = arrays
    return mx.dequantize(weight, scales, biases[0] if biases else None, **settings)
