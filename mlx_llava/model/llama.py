"""The decoder: Vicuna, LLaMA 1-3, Yi, Mistral, Phi-3 and Qwen2, which differ in numbers only.

B rows, L new tokens, T = cached + new tokens, D width, V vocabulary. Touvron et al. 2023
(arXiv:2302.13971); sliding window: Jiang et al. 2023 (arXiv:2310.06825).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import checkpoint

from mlx_llava.model.batch_cache import BatchLayer
from mlx_llava.model.cache import Cache, LayerCache, attend, make_cache
from mlx_llava.model.layers import Mask, attention_mask_of, swiglu
from mlx_llava.model.positions import Ids, positions_of
from mlx_llava.model.text_config import TextConfig


def rope_frequencies(config: TextConfig) -> mx.array:
    """The rotation periods over 2 pi of each pair of dimensions, (head width / 2,).

    ``linear`` stretches all of them; ``llama3`` stretches the long ones and blends between
    (Llama 3.1); ``longrope`` has a factor for each (transformers' modeling_rope_utils.py), of
    which those for short prompts are used; see `TextConfig.context_length`.
    """
    dims = config.dims_per_head
    periods = config.rope_theta ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    scaling = config.rope_scaling
    if scaling is None:
        return periods
    if scaling["rope_type"] == "longrope":
        return periods * mx.array(scaling["short_factor"], mx.float32)
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return periods * factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi * periods)
    kept = mx.clip((turns - low) / (high - low), 0, 1)
    return periods / (kept + (1 - kept) / factor)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped keys and values."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, self.head_dim = config.hidden_size, config.dims_per_head
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.kv_heads
        # Rotated queries and keys have the factor both.
        self.scale = self.head_dim**-0.5 * config.attention_factor**2
        self.attention = mx.fast.scaled_dot_product_attention
        self._periods = rope_frequencies(config)
        bias = config.attention_bias
        self.q_proj = nn.Linear(D, self.n_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, self.n_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, self.n_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, D, bias=config.output_bias)

    def rope(self, x: mx.array, start: mx.array | int) -> mx.array:
        """Rotates (B, heads, L, head width).

        `start` is each row's first position, (B,) or one for all, or all positions, (B or 1, L).
        """
        if isinstance(start, mx.array) and start.ndim == 2:
            B, heads, L, _ = x.shape
            tokens = x.swapaxes(1, 2).flatten(0, 1)[:, :, None]  # (B L, heads, 1, head width)
            tokens = self.rope(tokens, mx.broadcast_to(start, (B, L)).flatten())
            return tokens.reshape(B, L, heads, self.head_dim).swapaxes(1, 2)
        dims, freqs = self.head_dim, self._periods
        return mx.fast.rope(
            x, dims, traditional=False, base=None, scale=1.0, offset=start, freqs=freqs
        )

    def __call__(
        self,
        x: mx.array,
        mask: Mask | list[Mask],
        start: mx.array | int,
        cache: LayerCache | BatchLayer | None,
        last_only: bool = False,
    ) -> mx.array:
        asks, first = (x[:, -1:], _last(start, x.shape[1])) if last_only else (x, start)
        queries = self._heads(self.q_proj(asks), self.n_heads)  # (B, heads, L or 1, head width)
        keys = self._heads(self.k_proj(x), self.n_kv_heads)  # (B, kv heads, L, head width)
        values = self._heads(self.v_proj(x), self.n_kv_heads)
        queries, keys = self.rope(queries, first), self.rope(keys, start)
        if last_only:
            mask = mask[..., -1:, :] if isinstance(mask, mx.array) else None
        x = attend(
            cache, queries, keys, values, attention=self.attention, scale=self.scale, mask=mask
        )  # (B, heads, L or 1, head width)
        return self.o_proj(x.swapaxes(1, 2).flatten(2))  # (B, L or 1, D)

    def _heads(self, x: mx.array, n: int) -> mx.array:
        return x.reshape(*x.shape[:2], n, self.head_dim).swapaxes(1, 2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, hidden, bias=bias)
        self.up_proj = nn.Linear(D, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, D, bias=bias)
        self.gate = swiglu

    def __call__(self, x: mx.array) -> mx.array:
        x = self.gate(self.gate_proj(x), self.up_proj(x))  # (B, L, hidden)
        return self.down_proj(x)  # (B, L, D)


class DecoderLayer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(D, eps=eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=eps)
        self.mlp = MLP(config)

    def __call__(
        self,
        x: mx.array,
        mask: Mask | list[Mask],
        start: mx.array | int,
        cache: LayerCache | BatchLayer | None,
        last_only: bool = False,
    ) -> mx.array:
        seen = self.self_attn(self.input_layernorm(x), mask, start, cache, last_only)
        x = (x[:, -1:] if last_only else x) + seen  # (B, L or 1, D)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embeddings, the stack of blocks, and the last norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LanguageModel(nn.Module):
    """Token ids or embeddings -> logits.

    Attributes:
        gradient_checkpointing: training computes each block again on the way back instead of
            keeping what is inside it.
    """

    def __init__(self, config: TextConfig, tie_word_embeddings: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.model = Decoder(config)
        if not tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self) -> list[DecoderLayer]:
        """The blocks; mlx-lm makes one cache for each."""
        return self.model.layers

    @property
    def dtype(self) -> mx.Dtype:
        """What it computes in; norms are never quantised."""
        return self.model.norm.weight.dtype

    def embed(self, input_ids: mx.array) -> mx.array:
        """The words' embeddings, (B, L) -> (B, L, D); codes of the mx modes become bfloat16."""
        embeddings: mx.array = self.model.embed_tokens(input_ids)
        return embeddings.astype(self.dtype)

    def make_cache(self) -> Cache:
        """An empty cache for every layer."""
        return make_cache(self.config)

    def _positions(
        self,
        L: int,
        cache: LayerCache | BatchLayer | None,
        attention_mask: mx.array | None,
        positions: Ids | None,
    ) -> tuple[mx.array | int, Callable[[int | None], Mask | list[Mask]]]:
        """The first position of the new tokens, or all, and what they may see by a window."""
        if isinstance(cache, BatchLayer):
            return cache.starts, cache.mask
        offset = cache.offset if cache is not None else 0
        if positions is None:
            positions = positions_of(cache).jumping(offset + L)
        mask = partial(
            attention_mask_of, L, offset, attention_mask=attention_mask, positions=positions
        )
        if positions is not None:
            return _start(positions[:, offset:]), mask
        if attention_mask is None:
            return offset, mask
        # Each row counts its positions from its first real token.
        return offset - mx.argmax(attention_mask > 0, axis=1).astype(mx.int32), mask

    def __call__(
        self,
        input_ids: mx.array | None = None,
        cache: Sequence[LayerCache | BatchLayer] | None = None,
        input_embeddings: mx.array | None = None,
        attention_mask: mx.array | None = None,
        last_only: bool = False,
        positions: Ids | None = None,
    ) -> mx.array:
        """Decodes new tokens.

        Args:
            input_ids (mx.array, optional): (B, L); read where there are no embeddings.
            cache (list, optional): What came before, for each layer; is extended. Of a
                `BatchCache`, every row has come as far as it has, and its new tokens are B of
                one each.
            input_embeddings (mx.array, optional): (B, L, D).
            attention_mask (mx.array, optional): (B, T), 0 for padding, which must be on the
                left or on the right of each row.
            last_only (bool): Gives the logits of the last token alone.
            positions (array, optional): (B or 1, T), of a prompt in which some are left out; a
                cache knows those of what it stores, and of what follows.

        Returns:
            mx.array: Logits (B, L, V), or (B, 1, V).
        """
        if input_embeddings is None:
            assert input_ids is not None
            input_embeddings = self.embed(input_ids)
        states = self.hidden_states(
            input_embeddings, cache, attention_mask, positions, last_only=last_only
        )
        (x,) = deque(states, maxlen=1)
        return self.logits(x)  # (B, L or 1, V)

    def hidden_states(
        self,
        x: mx.array,
        cache: Sequence[LayerCache | BatchLayer] | None = None,
        attention_mask: mx.array | None = None,
        positions: Ids | None = None,
        last_only: bool = False,
    ) -> Iterator[mx.array]:
        """The embeddings (B, L, D), and what each block makes of them; see `__call__`.

        Of the last block, that is the last token's alone if `last_only`.
        """
        last_only = last_only and x.shape[1] > 1
        return self._states(x, cache, attention_mask, positions, last_only)

    def _states(
        self,
        x: mx.array,
        cache: Sequence[LayerCache | BatchLayer] | None,
        attention_mask: mx.array | None,
        positions: Ids | None,
        last_only: bool = False,
    ) -> Iterator[mx.array]:
        """Those; of the last block, the last token's alone if that is all that is asked for."""
        first = cache[0] if cache else None
        start, mask = self._positions(x.shape[1], first, attention_mask, positions)
        windows = self.config.windows
        masks = {window: mask(window) for window in {*windows}}
        yield x
        for i, layer in enumerate(self.layers):
            block = checkpoint(layer) if self.gradient_checkpointing else layer
            last = last_only and i == len(self.layers) - 1
            x = block(x, masks[windows[i]], start, cache[i] if cache else None, last)
            yield x

    def logits(self, x: mx.array) -> mx.array:
        """What a hidden state (..., D) would say if it were the last one: logits (..., V)."""
        return self.unembed(self.model.norm(x))

    def unembed(self, x: mx.array) -> mx.array:
        """Normed hidden states (..., D) -> logits (..., V)."""
        if "lm_head" in self:
            return self.lm_head(x)
        return self.model.embed_tokens.as_linear(x)


def _start(positions: Ids) -> mx.array | int:
    """Positions (B or 1, L), or the first of them where all others follow it."""
    first, last = int(positions[0, 0]), int(positions[0, -1])
    in_order = len(positions) == 1 and last - first == positions.shape[1] - 1
    return first if in_order else mx.array(positions)


def _last(start: mx.array | int, L: int) -> mx.array | int:
    """The position of the last of L tokens, of which `start` is the first's, or all."""
    if isinstance(start, mx.array) and start.ndim == 2:
        return start[:, -1:]
    return start + (L - 1)
