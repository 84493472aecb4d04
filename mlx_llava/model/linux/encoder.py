"""A block of the vision tower in NumPy, on Linux's CPU.

Its products need two threads to be fast, and so does what is between them.

B images or tiles, L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from mlx_llava.model import clip
from mlx_llava.model.linux import functions, rows
from mlx_llava.model.linux.functions import by_numpy, fits, gelu, gelu_tanh, quick_gelu
from mlx_llava.model.linux.layers import LINEAR, apply
from mlx_llava.model.linux.rows import gated, layer_norm, plus
from mlx_llava.model.linux.weights import Array

_GATES: dict[functions.Function, Callable[[Array], Array]] = {
    quick_gelu: partial(gated, 1.702),
    gelu: rows.gelu,
    gelu_tanh: partial(gated, math.sqrt(8 / math.pi), cubic=0.044715),
}


class EncoderLayer(clip.EncoderLayer):
    """CLIP's, whose weights are trained by MLX."""

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, D) -> (B, L, D)."""
        mlx = super().__call__
        if self.training or not self._is_plain(x):
            return mlx(x)
        return by_numpy(self._forward, mlx, x)

    def _forward(self, x: Array) -> Array:
        attention, mlp, (B, L, D) = self.self_attn, self.mlp, x.shape
        normed = layer_norm(self.layer_norm1, x)
        queries, keys, values = (
            projected.reshape(B, L, attention.num_heads, -1).swapaxes(1, 2)
            for projected in apply(normed, attention.q_proj, attention.k_proj, attention.v_proj)
        )  # (B, heads, L, head width)
        seen = functions.numpy_attention(attention.scale, None, queries, keys, values)
        (output,) = apply(seen.swapaxes(1, 2).reshape(B, L, D), attention.out_proj)
        x = plus(x, output)
        (hidden,) = apply(layer_norm(self.layer_norm2, x), mlp.fc1)
        (output,) = apply(_GATES[mlp.activation](hidden), mlp.fc2)
        return plus(x, output)

    def _is_plain(self, x: mx.array) -> bool:
        """Whether all of it is what `adopt` has left, and in float32."""
        attention, mlp = self.self_attn, self.mlp
        layers = [attention[name] for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
        return (
            fits(x.size * x.shape[-1], x, self.layer_norm1.weight)
            and attention.attention is functions.attention
            and mlp.activation in _GATES
            and all(type(one) in LINEAR for one in (*layers, mlp.fc1, mlp.fc2))
        )
