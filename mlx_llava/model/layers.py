"""What layers are made of beside MLX's own: activations, the gate, attention.

B rows, H heads, L queries, T keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy.typing as npt

#: What a model takes: it makes NumPy's arrays MLX's.
AnyArray: TypeAlias = mx.array | npt.NDArray[Any]
#: What queries may see: ``"causal"`` for the last L of T positions, bool (B or 1, 1, L, T), or all.
Mask: TypeAlias = "mx.array | str | None"

#: Keys or values, (B, heads, T, D), or of rows of different lengths, a list of (1, heads, T, D).
Stored: TypeAlias = "mx.array | Sequence[mx.array]"


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


def attention(
    queries: mx.array,
    keys: Stored,
    values: Stored,
    *,
    scale: float,
    mask: Mask | Sequence[Mask] = None,
) -> mx.array:
    """Scaled dot-product attention.

    Args:
        queries (mx.array): (B, H, L, D).
        keys (mx.array or list): Each of their heads serves H / heads of the queries'.
        values (mx.array or list): As the keys.
        scale (float): What scores are multiplied with.
        mask (optional): Of all rows, or a list as the keys.

    Returns:
        mx.array: (B, H, L, D).
    """
    attend = partial(mx.fast.scaled_dot_product_attention, scale=scale)
    if isinstance(keys, mx.array):
        return attend(queries, keys, values, mask=mask)  # type: ignore[arg-type]
    rows = zip(mx.split(queries, len(keys)), keys, values, mask, strict=True)  # type: ignore[arg-type]
    return mx.concatenate([attend(q, k, v, mask=own) for q, k, v, own in rows])
