"""Activation functions under the names that Hugging Face's configs use."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.model.linux_cpu import quick_gelu

#: ``gelu`` is exact (erf), ``quick_gelu`` is OpenAI CLIP's x * sigmoid(1.702 x), the other
#: two names mean the tanh approximation. They are not interchangeable.
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "quick_gelu": quick_gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "silu": nn.silu,
}
