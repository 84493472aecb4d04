"""A decoder block's step of a few tokens, in NumPy but for the cache, on Linux's CPU.

So few rows are bound by the weights, and by what it takes to call each operation: MLX and NumPy
would take turns 20 times in a block.

B rows, L new tokens, D width, W head width.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_llava.model import llama
from mlx_llava.model.batch_cache import BatchLayer
from mlx_llava.model.cache import LayerCache, attend
from mlx_llava.model.layers import Mask
from mlx_llava.model.linux.functions import (
    SMALLEST,
    attention_at_once,
    fits,
    gated,
    swiglu,
    view,
)
from mlx_llava.model.linux.layers import Linear, PermutedLinear, QuantizedLinear, apply
from mlx_llava.model.linux.weights import SOME, Array
from mlx_llava.model.sharding import Sharded

_LINEAR = (Linear, QuantizedLinear, PermutedLinear)


class DecoderLayer(llama.DecoderLayer):
    """LLaMA's."""

    def __call__(
        self,
        x: mx.array,
        mask: Mask | list[Mask],
        start: mx.array | int,
        cache: LayerCache | BatchLayer | None,
        last_only: bool = False,
    ) -> mx.array:
        """Only decoding is done here: a few tokens after what is cached."""
        if cache is None or x.size > SOME * x.shape[-1] or not self._is_plain(x):
            return super().__call__(x, mask, start, cache, last_only)
        try:
            mx.eval(x)
        except ValueError:  # mx.compile traces: there are no values yet
            return super().__call__(x, mask, start, cache, last_only)

        @mx.custom_function
        def step(x: mx.array) -> mx.array:
            return self._step(x, mask, start, cache)

        @step.vjp
        def _vjp(*_: Any) -> Any:
            raise ValueError(
                f"{x.size // x.shape[-1]} tokens after a cache have no gradient on Linux's CPU; "
                "take it of one pass without a cache, or set MLX_LLAVA_BLAS=off."
            )

        outputs = cast("mx.array", step(x))
        return outputs[:, -1:] if last_only else outputs

    def _step(
        self,
        x: mx.array,
        mask: Mask | list[Mask],
        start: mx.array | int,
        cache: LayerCache | BatchLayer,
    ) -> mx.array:
        attention, mlp, hidden = self.self_attn, self.mlp, view(x)  # (B, L, D)
        normed = _norm(self.input_layernorm, hidden)
        queries, keys, values = (
            rows.reshape(*x.shape[:2], -1, attention.head_dim).swapaxes(1, 2)
            for rows in apply(normed, attention.q_proj, attention.k_proj, attention.v_proj)
        )  # (B, heads, L, W)
        turns = _turns(start, x.shape[1], attention)
        seen = attend(
            cache,
            mx.array(_rotate(queries, turns)),
            mx.array(_rotate(keys, turns)),
            mx.array(values),
            attention=attention_at_once,
            scale=attention.scale,
            mask=mask,
        ).swapaxes(1, 2)  # (B, L, heads, W)
        mx.eval(seen)
        (output,) = apply(view(seen).reshape(*x.shape[:2], -1), attention.o_proj)
        hidden = hidden + _total(attention, output)
        gates = apply(_norm(self.post_attention_layernorm, hidden), mlp.gate_proj, mlp.up_proj)
        (output,) = apply(gated(1, *gates), mlp.down_proj)
        return mx.array(hidden + _total(mlp, output))

    def _is_plain(self, x: mx.array) -> bool:
        """Whether all of it is what `adopt` has left, and in float32."""
        attention, mlp = self.self_attn, self.mlp
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        layers = [attention[name] for name in names]
        layers += [mlp["gate_proj"], mlp["up_proj"], mlp["down_proj"]]
        return (
            fits(SMALLEST, x) and mlp.gate is swiglu and all(type(one) in _LINEAR for one in layers)
        )


def _total(part: nn.Module, x: Array) -> Array:
    """What a part of the block gives, on all ranks together where it is of several."""
    return view(part.total(mx.array(x))) if isinstance(part, Sharded) else x


def _norm(norm: nn.RMSNorm, x: Array) -> Array:
    """RMSNorm."""
    squares = np.einsum("...i,...i->...", x, x)[..., None]
    return x * (
        view(norm.weight) / np.sqrt(squares / np.float32(x.shape[-1]) + np.float32(norm.eps))
    )


def _turns(start: mx.array | int, L: int, attention: llama.Attention) -> tuple[Array, Array]:
    """Cosine and sine of the angles by which each position is rotated, (B or 1, 1, L, W / 2)."""
    first = np.asarray(start if isinstance(start, int) else view(start))
    given = first if first.ndim == 2 else first.reshape(-1, 1) + np.arange(L)  # (B or 1, L)
    angles = given[:, None, :, None].astype(np.float32) * (np.float32(1) / view(attention._periods))
    return np.cos(angles), np.sin(angles)


def _rotate(x: Array, turns: tuple[Array, Array]) -> Array:
    """As `llama.Attention.rope` does (B, heads, L, W)."""
    cosine, sine = turns
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    rotated = np.empty(x.shape, np.float32)
    np.subtract(left * cosine, right * sine, out=rotated[..., :half])
    np.add(left * sine, right * cosine, out=rotated[..., half:])
    return rotated
