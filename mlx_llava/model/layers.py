"""What layers are made of beside MLX's own: activations, the gate, masks, kinds of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy.typing as npt

from mlx_llava.model.positions import Ids

#: What a model takes: it makes NumPy's arrays MLX's.
AnyArray: TypeAlias = mx.array | npt.NDArray[Any]
#: What L queries may see of T keys: ``"causal"`` (the last L are theirs), bool (B or 1, 1, L, T)
#: where it is true, or all.
Mask: TypeAlias = "mx.array | str | None"


def quick_gelu(x: mx.array) -> mx.array:
    """x sigmoid(1.702 x), OpenAI CLIP's activation."""
    return nn.gelu_fast_approx(x)


@partial(mx.compile, shapeless=True)
def gelu_tanh(x: mx.array) -> mx.array:
    """x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), SigLIP's activation.

    As x sigmoid(2 u) it is one kernel, and nothing cancels where u is far below 0.
    """
    return x * mx.sigmoid(math.sqrt(8 / math.pi) * x * (1 + 0.044715 * x * x))


#: Under the names of Hugging Face's configs. ``gelu`` is exact (erf), the two other gelus mean
#: the tanh approximation. They are not interchangeable.
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "quick_gelu": quick_gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": nn.relu,
    "silu": nn.silu,
}


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """SiLU(gate) up (Shazeer 2020, arXiv:2002.05202)."""
    return nn.silu(gate) * up


def visible(queries: mx.array, keys: mx.array, window: int | None) -> mx.array:
    """Whether positions of queries may look at those of keys, by the causal mask and a window."""
    allowed = keys <= queries
    return allowed if window is None else allowed & (keys > queries - window)


def attention_mask_of(
    L: int,
    offset: int,
    window: int | None,
    attention_mask: mx.array | None,
    positions: Ids | None = None,
) -> Mask:
    """What each new token may look at: itself and what came before, but no padding.

    Args:
        L (int): Number of new tokens.
        offset (int): Number of tokens in the cache.
        window (int, optional): Sliding window; a token sees itself and ``window - 1`` before.
        attention_mask (mx.array, optional): (B, T), 0 where a row is padded.
        positions (array, optional): (B or 1, T), where some jump; a window is one of positions.

    Returns:
        ``"causal"`` or None where MLX knows the pattern, else bool (B or 1, 1, L, T). A
        padding token still sees itself: attention to nothing at all would be NaN.
    """
    T = offset + L
    farthest = T if positions is None else int(positions.max()) + 1
    if attention_mask is None and (window is None or window >= farthest):
        return "causal" if L > 1 else None
    keys = mx.arange(T)[None] if positions is None else mx.array(positions)  # (B or 1, T)
    queries, keys = keys[:, offset:, None], keys[:, None]
    allowed = visible(queries, keys, window)  # (B or 1, L, T)
    if attention_mask is not None:
        allowed = allowed & (attention_mask[:, None] > 0) | (keys == queries)
    return allowed[:, None]  # (B or 1, 1, L, T)
