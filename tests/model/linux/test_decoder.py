"""A block's step in NumPy is that of MLX, with every kind of cache."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_llava.model.batch_cache import RaggedCache
from mlx_llava.model.cache import RollingKVCache, make_cache
from mlx_llava.model.device import on_cpu
from mlx_llava.model.linux import decoder, functions
from mlx_llava.model.linux.adopt import adopt
from mlx_llava.model.llama import LanguageModel
from mlx_llava.model.text_config import TextConfig

pytestmark = pytest.mark.skipif(
    not functions.NUMPY or not on_cpu(), reason="NumPy is used on Linux's CPU only"
)
CONFIG = TextConfig.from_dict(
    {
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "rope_theta": 500.0,
    }
)


def random_decoder(**settings) -> LanguageModel:
    model = LanguageModel(replace(CONFIG, **settings))
    model.eval()
    return model


def steps(model, caches, lengths=(7, 1, 1, 3)):
    """The logits of a prompt, of single tokens and of a few."""
    ids = mx.random.randint(0, 50, (1, sum(lengths)), key=mx.random.key(1))
    logits, start = [], 0
    for length in lengths:
        logits.append(model(ids[:, start : start + length], cache=caches))
        start += length
    return mx.concatenate(logits, axis=1)


CACHES = {
    "plain": lambda config: make_cache(config),
    "8 bits": lambda config: make_cache(config, kv_bits=8),
    "rolling": lambda config: [RollingKVCache(9, 7) for _ in range(2)],
}


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 4}, {"attention_bias": True}], ids=str)
@pytest.mark.parametrize("cache", CACHES)
def test_a_step(cache, settings, monkeypatch):
    model = random_decoder(**settings)
    lengths = (7, 1, 1, 1) if cache == "rolling" else (7, 1, 1, 3)
    if cache == "rolling" and "sliding_window" in settings:
        pytest.skip("a sliding window has no other limit")
    expected = steps(model, CACHES[cache](model.config), lengths)
    adopt(model)
    assert type(model.layers[0]) is decoder.DecoderLayer
    calls = []
    apply = decoder.apply
    monkeypatch.setattr(decoder, "apply", lambda *args: calls.append(1) or apply(*args))
    assert mx.allclose(steps(model, CACHES[cache](model.config), lengths), expected, atol=1e-4)
    assert len(calls) == 4 * 2 * 4


@pytest.mark.parametrize("positions", [None, "jumping"])
@pytest.mark.parametrize("settings", [{}, {"sliding_window": 9}], ids=str)
def test_a_prompt_and_its_last_token_alone(settings, positions):
    model = random_decoder(**settings)
    ids = mx.random.randint(0, 50, (1, 60))
    if positions:
        positions = np.delete(np.arange(90, dtype=np.int32), np.arange(5, 65, 2))[None]
    expected = model(ids, cache=make_cache(CONFIG), positions=positions)
    adopt(model)
    caches = make_cache(CONFIG), make_cache(CONFIG)
    assert mx.allclose(model(ids, cache=caches[0], positions=positions), expected, atol=1e-4)
    last = model(ids, cache=caches[1], positions=positions, last_only=True)
    assert mx.allclose(last, expected[:, -1:], atol=1e-4)
    for whole, own in zip(*caches, strict=True):
        assert mx.allclose(whole.state[0], own.state[0], atol=1e-4)


def test_rows_of_unequal_length():
    model = random_decoder()
    adopt(model)
    ids = mx.random.randint(0, 50, (2, 9))
    single, batch = [], RaggedCache()
    for row, length in enumerate((8, 5)):
        caches = make_cache(CONFIG), make_cache(CONFIG)
        for cache in caches:
            model(ids[row : row + 1, :length], cache=cache)
        batch.join(caches[0])
        single.append(model(ids[row : row + 1, 8:], cache=caches[1]))
    logits = model(ids[:, 8:], cache=batch.step([1, 1]))
    assert mx.allclose(logits, mx.concatenate(single), atol=1e-5)


def test_padded_rows():
    model = random_decoder()
    ids, mask = mx.random.randint(0, 50, (2, 9)), mx.array([[1] * 9, [0] * 3 + [1] * 6])
    results = []
    for _ in range(2):
        cache = make_cache(CONFIG)
        model(ids[:, :8], cache=cache, attention_mask=mask[:, :8])
        results.append(model(ids[:, 8:], cache=cache, attention_mask=mask))
        adopt(model)
    assert mx.allclose(*results, atol=1e-5)


class Doubled(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_a_layer_of_another_kind_does_its_own():
    model = random_decoder()
    for layer in model.layers:
        layer.self_attn.q_proj.__class__ = Doubled
    expected = steps(model, make_cache(CONFIG))
    adopt(model)
    assert mx.allclose(steps(model, make_cache(CONFIG)), expected, atol=1e-4)


def test_a_step_that_is_compiled():
    model = random_decoder()
    adopt(model)
    cache = make_cache(CONFIG)
    model(mx.array([[1, 2]]), cache=cache)
    states = [layer.state for layer in cache]

    def step(ids, states):
        new = make_cache(CONFIG)
        for layer, state in zip(new, states, strict=True):
            layer.state = state
        return model(ids, cache=new)

    assert mx.allclose(
        mx.compile(step)(mx.array([[3]]), states), step(mx.array([[3]]), states), atol=1e-5
    )


def test_a_step_after_a_cache_has_no_gradient():
    """Rather than one of zeros."""
    model = random_decoder()
    adopt(model)
    cache = make_cache(CONFIG)
    model(mx.array([[1, 2]]), cache=cache)

    def loss(embeddings):
        return model(input_embeddings=embeddings, cache=cache).sum()

    with pytest.raises(ValueError, match="3 tokens with a cache have no gradient"):
        mx.eval(mx.grad(loss)(mx.random.normal((1, 3, 128))))
