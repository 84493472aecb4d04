"""Everything that a model computes on the way from a prompt to its answer.

L tokens of the prompt and the answer, Q of them observed, T = L keys, H heads, D decoder width,
V vocabulary, N tiles, P patches. Rollout: Abnar and Zuidema 2020 (arXiv:2005.00928).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_llava.inputs.inputs import Inputs
from mlx_llava.model.cache import Attention, KVCache
from mlx_llava.model.layers import Mask
from mlx_llava.model.llava import Llava

Array: TypeAlias = "npt.NDArray[np.float32]"


class Observer:
    """Collects, layer by layer, what observed tokens, (Q,), look at.

    Attributes:
        attention: of each layer so far, float32 (H, Q, T).
        rollout: how much of each token has come to each other one through the layers so far,
            float32 (L, T): half of a block's output is its input, the rest is what the mean
            head looks at.
    """

    def __init__(self, queries: mx.array, length: int) -> None:
        self.queries = queries
        self.attention: list[mx.array] = []
        self.rollout = mx.eye(length)

    def observe(self, weights: mx.array) -> None:
        """Takes one layer's weights (H, L, T)."""
        self.attention.append(weights[:, self.queries])
        self.rollout = (weights.mean(axis=0) + mx.eye(weights.shape[1])) / 2 @ self.rollout
        mx.eval(self.attention[-1], self.rollout)


class ObservedCache(KVCache):
    """A cache that shows an observer the attention, for one pass over one prompt."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        attention: Attention,  # noqa: ARG002 - which gives no weights
        scale: float,
        mask: Mask,
    ) -> mx.array:
        """`cache.attend` by the weights that the observer sees."""
        keys, values = self.update_and_fetch(keys, values)
        B, heads, T, _ = keys.shape
        _, H, L, D = queries.shape
        allowed = mask if isinstance(mask, mx.array) else mx.tri(L, T, T - L, dtype=mx.bool_)
        grouped = (queries * scale).reshape(B, heads, H // heads, L, D)
        scores = (grouped @ keys[:, :, None].swapaxes(-1, -2)).astype(mx.float32)
        weights = mx.softmax(mx.where(allowed, scores, -mx.inf), axis=-1)
        self.observer.observe(weights.reshape(H, L, T))
        return (weights.astype(values.dtype) @ values[:, :, None]).reshape(B, H, L, D)


@dataclass(frozen=True)
class Trace:
    """What one pass over a prompt, and an answer after it, computed.

    Attributes:
        vision_states: all hidden states of the vision tower, float32 (layers + 1, N, P + 1,
            width); [0] is the embedding, and token 0 the class token.
        image_features: of each picture, float32 (F, D).
        hidden_states: of the decoder, float32 (layers + 1, L, D); [0] are the embeddings, and
            [-1] is what the last norm gives, as in transformers.
        queries: the observed positions, (Q,).
        attention: where they looked, float32 (layers, H, Q, L); every row sums to 1.
        rollout: attention through all layers, float32 (Q, L); every row sums to 1.
        logits: float32 (L, V).
    """

    vision_states: Array
    image_features: tuple[Array, ...]
    hidden_states: Array
    queries: npt.NDArray[np.int64]
    attention: Array
    rollout: Array
    logits: Array


def trace(
    model: Llava,
    inputs: Inputs,
    answer: Sequence[int] = (),
    queries: Sequence[int] | None = None,
) -> Trace:
    """Reads one prompt, and an answer after it, in one pass and keeps everything.

    Args:
        model (Llava): The model.
        inputs (Inputs): One prompt.
        answer (list of int): Tokens that follow the prompt.
        queries (list of int, optional): Positions whose attention is kept; default: all, which
            for each layer and head is as large as the square of the prompt.

    Raises:
        ValueError: There is more than one prompt, or an image is shown in part.
    """
    if len(inputs.input_ids) != 1:
        raise ValueError(f"One prompt can be traced at a time; there are {len(inputs.input_ids)}.")
    if inputs.image_tokens != inputs.whole_image_tokens:
        raise ValueError("Images shown in part cannot be traced; leave image_tokens out.")
    inputs = with_answer(inputs, answer)
    states, features = _see(model, inputs)
    length = inputs.input_ids.shape[1]
    observed = np.arange(length) if queries is None else np.array(queries, np.int64)
    observer = Observer(mx.array(observed), length)
    decoder = model.language_model
    embeddings = model.embed(inputs.input_ids, image_features=features)
    cache = [ObservedCache(observer) for _ in decoder.layers]
    *hidden, last = decoder.hidden_states(embeddings, cache)
    normed = decoder.model.norm(last)
    return Trace(
        vision_states=as_numpy(mx.stack(states) if states else mx.zeros((0, 0, 0, 0))),
        image_features=tuple(map(as_numpy, features)),
        hidden_states=as_numpy(mx.concatenate([*hidden, normed])),
        queries=observed,
        attention=as_numpy(mx.stack(observer.attention)),
        rollout=as_numpy(observer.rollout[observer.queries]),
        logits=as_numpy(decoder.unembed(normed)[0]),
    )


def _see(model: Llava, inputs: Inputs) -> tuple[list[mx.array], list[mx.array]]:
    """All hidden states of the vision tower, and the features of each picture."""
    if inputs.pixel_values is None:
        return [], []
    depth = model.config.vision_config.num_hidden_layers
    states = model.vision_tower(inputs.pixel_values, num_layers=depth)
    return states, model.project(model.select(states), inputs.image_sizes)


def with_answer(inputs: Inputs, answer: Sequence[int]) -> Inputs:
    """The same prompt with the tokens of an answer after it."""
    ids = np.array([answer], np.int32)
    return replace(inputs, input_ids=np.concatenate([inputs.input_ids, ids], axis=1))


def as_numpy(array: mx.array) -> Array:
    """To look at: float32, in NumPy."""
    return np.array(array.astype(mx.float32))
