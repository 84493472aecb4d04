"""What layers are made of beside MLX's own: activations, the gate, kinds of arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy.typing as npt

#: What a model takes: it makes NumPy's arrays MLX's.
AnyArray: TypeAlias = mx.array | npt.NDArray[Any]
#: What L queries may see of T keys: ``"causal"`` (the last L are theirs), bool (B or 1, 1, L, T)
#: where it is true, or all.
Mask: TypeAlias = "mx.array | str | None"


def quick_gelu(x: mx.array) -> mx.array:
    """x sigmoid(1.702 x), OpenAI CLIP's activation."""
    return nn.gelu_fast_approx(x)


#: Under the names of Hugging Face's configs. ``gelu`` is exact (erf), the two other gelus mean
#: the tanh approximation. They are not interchangeable.
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "quick_gelu": quick_gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "silu": nn.silu,
}


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """SiLU(gate) up (Shazeer 2020, arXiv:2002.05202)."""
    return nn.silu(gate) * up
