"""A decoder block that reads tokens into a cache, in NumPy but for that, on Linux's CPU.

MLX and NumPy would take turns 20 times in a block: of a few tokens that alone takes long, and of
many what MLX does takes one thread.

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
    swiglu,
    view,
)
from mlx_llava.model.linux.layers import LINEAR, apply
from mlx_llava.model.linux.rows import gated, plus, rms_norm, rotate
from mlx_llava.model.linux.weights import Array
from mlx_llava.model.sharding import Sharded


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
        """Without a cache there may be a gradient, which is MLX's."""
        if cache is None or not self._is_plain(x):
            return super().__call__(x, mask, start, cache, last_only)
        try:
            mx.eval(x)
        except ValueError:  # mx.compile traces: there are no values yet
            return super().__call__(x, mask, start, cache, last_only)

        @mx.custom_function
        def step(x: mx.array) -> mx.array:
            return self._step(x, mask, start, cache, last_only)

        @step.vjp
        def _vjp(*_: Any) -> Any:
            raise ValueError(
                f"{x.size // x.shape[-1]} tokens with a cache have no gradient on Linux's CPU; "
                "take it of one pass without a cache, or set MLX_LLAVA_BLAS=off."
            )

        return cast("mx.array", step(x))

    def _step(
        self,
        x: mx.array,
        mask: Mask | list[Mask],
        start: mx.array | int,
        cache: LayerCache | BatchLayer,
        last_only: bool,
    ) -> mx.array:
        attention, mlp, hidden = self.self_attn, self.mlp, view(x)  # (B, L, D)
        normed = rms_norm(self.input_layernorm, hidden)
        if last_only:
            mask = mask[..., -1:, :] if isinstance(mask, mx.array) else None
            hidden = hidden[:, -1:]
            asks = apply(normed[:, -1:], attention.q_proj)
            projected = asks + apply(normed, attention.k_proj, attention.v_proj)
        else:
            projected = apply(normed, attention.q_proj, attention.k_proj, attention.v_proj)
        queries, keys, values = (
            rows.reshape(*rows.shape[:2], -1, attention.head_dim) for rows in projected
        )  # (B, L or 1, heads, W)
        turns = _turns(start, x.shape[1], attention)
        seen = attend(
            cache,
            _array(rotate(queries, *(turn[:, -queries.shape[1] :] for turn in turns))),
            _array(rotate(keys, *turns)),
            _array(values),
            attention=attention_at_once,
            scale=attention.scale,
            mask=mask,
        ).swapaxes(1, 2)  # (B, L or 1, heads, W)
        mx.eval(seen)
        (output,) = apply(view(seen).reshape(*hidden.shape[:2], -1), attention.o_proj)
        hidden = plus(hidden, _total(attention, output))
        gates = apply(rms_norm(self.post_attention_layernorm, hidden), mlp.gate_proj, mlp.up_proj)
        (output,) = apply(gated(1, *gates), mlp.down_proj)
        return mx.array(plus(hidden, _total(mlp, output)))

    def _is_plain(self, x: mx.array) -> bool:
        """Whether all of it is what `adopt` has left, and in float32."""
        attention, mlp = self.self_attn, self.mlp
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        layers = [attention[name] for name in names]
        layers += [mlp["gate_proj"], mlp["up_proj"], mlp["down_proj"]]
        return (
            fits(SMALLEST, x) and mlp.gate is swiglu and all(type(one) in LINEAR for one in layers)
        )


def _total(part: nn.Module, x: Array) -> Array:
    """What a part of the block gives, on all ranks together where it is of several."""
    return view(part.total(mx.array(x))) if isinstance(part, Sharded) else x


def _array(x: Array) -> mx.array:
    """(B, L, heads, W) as (B, heads, L, W)."""
    return mx.array(x.swapaxes(1, 2))


def _turns(start: mx.array | int, L: int, attention: llama.Attention) -> tuple[Array, Array]:
    """Cosine and sine of the angles by which each position is rotated, (B or 1, L, W / 2)."""
    first = np.asarray(start if isinstance(start, int) else view(start))
    given = first if first.ndim == 2 else first.reshape(-1, 1) + np.arange(L)  # (B or 1, L)
    angles = given[..., None].astype(np.float32) * (np.float32(1) / view(attention._periods))
    return np.cos(angles), np.sin(angles)
