"""One head of the decoder's attention, taken apart: what it seeks, what it finds, what it gives.

L tokens of a trace, d numbers of a head, D decoder width. What a value writes: Elhage et al. 2021
(transformer-circuits.pub), "OV circuit".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_llava.analysis.trace import Array, Trace, as_numpy
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.llava import Llava
from mlx_llava.model.quantized import plain_weight


@dataclass(frozen=True)
class Head:
    """What one head of one layer computes of each token.

    Attributes:
        seeks: its queries before their positions are turned into them, (L, d).
        queries: the same afterwards, (L, d).
        keys: what each token is found by, (L, d).
        values: what each token gives, (L, d).
        writes: what a value is once it is in the decoder's stream, (L, D).
        scale: what scores are multiplied by.
    """

    seeks: Array
    queries: Array
    keys: Array
    values: Array
    writes: Array
    scale: float

    def scores(self, query: int) -> Array:
        """How well each token that one may see, itself and all before it, fits its query."""
        return self.keys[: query + 1] @ self.queries[query] * self.scale


def take_head(model: Llava, trace: Trace, layer: int, number: int) -> Head:
    """A head of a layer, both counted from 0, in what a trace has computed."""
    block = model.language_model.layers[layer]
    attention = block.self_attn
    x = mx.array(trace.hidden_states[layer])[None].astype(model.language_model.dtype)
    x = block.input_layernorm(x)
    heads, kv_heads, d = attention.n_heads, attention.n_kv_heads, attention.head_dim
    shared = number * kv_heads // heads

    def split(projected: mx.array, count: int) -> mx.array:
        return projected.reshape(*x.shape[:2], count, d).swapaxes(1, 2)

    seeks, keys = split(attention.q_proj(x), heads), split(attention.k_proj(x), kv_heads)
    values = as_numpy(split(attention.v_proj(x), kv_heads)[0, shared])
    columns = as_numpy(plain_weight(attention.o_proj))[:, number * d : (number + 1) * d]
    return Head(
        seeks=as_numpy(seeks[0, number]),
        queries=as_numpy(attention.rope(seeks, 0)[0, number]),
        keys=as_numpy(attention.rope(keys, 0)[0, shared]),
        values=values,
        writes=values @ columns.T,
        scale=attention.scale,
    )


def given_words(
    model: Llava, processor: Processor, writes: Array, count: int = 2
) -> list[Sequence[str]]:
    """The words that what a head writes, (N, D), makes likelier than all others."""
    decoder = model.language_model
    scores = as_numpy(decoder.logits(mx.array(writes).astype(decoder.dtype)))
    best = np.argsort(-scores, axis=-1)[:, :count]
    return [[processor.tokenizer.text_of(int(i)) for i in row] for row in best]
