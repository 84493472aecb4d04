"""What a GPU is asked to do: how many kernels, in which numbers, and what the host waits for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_llava.analysis.random_model import random_config
from mlx_llava.generation.sampling import greedy, make_sampler
from mlx_llava.generation.steps import Chooser, generate_step
from mlx_llava.model.batch_cache import SlotCache
from mlx_llava.model.cache import Cache, set_positions
from mlx_llava.model.llama import LanguageModel
from mlx_llava.model.llava import Llava
from mlx_llava.model.positions import Part, Positions
from mlx_llava.model.vision_config import CLIP, SIGLIP
from tests.graphs import dtypes, launches, on_metal

CONFIG = random_config("tiny", 3)
CONFIG = replace(CONFIG, text_config=replace(CONFIG.text_config, vocab_size=320))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 6.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.5,
    "original_max_position_embeddings": 48,
}
TEXTS = {
    "gqa": {},
    "vicuna": {"num_key_value_heads": 4},
    "llama3": {"rope_scaling": LLAMA3},
    "window": {"sliding_window": 9},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def decoder(layers: int, **text) -> LanguageModel:
    return LanguageModel(replace(CONFIG.text_config, num_hidden_layers=layers, **text))


def filled(model: nn.Module, cache: Cache, length: int = 20) -> Cache:
    """A cache that holds some positions."""
    model(mx.arange(length)[None], cache=cache)
    mx.eval([layer.state for layer in cache])
    return cache


def rows_of_any_length(model: nn.Module) -> SlotCache:
    """Eight rows as on a GPU."""
    batch = SlotCache()
    for length in range(5, 13):
        batch.join(filled(model, model.make_cache(), length))
    mx.eval(batch.arrays)
    return batch


def per_layer(count) -> Counter[str]:
    """What one layer launches: what two do, less what one does."""
    return count(2) - count(1)


def step_launches(model: nn.Module, cache: Cache, length: int) -> Counter[str]:
    ids = mx.zeros((1, length), mx.int32)
    mx.eval(ids)
    with on_metal(model):
        return launches(model(ids, cache=filled(model, cache)))


@pytest.mark.parametrize("length", [1, 7], ids=["decode", "prefill"])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("text", TEXTS)
def test_a_layer_launches_17_kernels_as_mlx_lms(text, bits, length):
    llama = pytest.importorskip("mlx_lm.models.llama")
    biases = 7 if bits and text == "biases" else 0  # without codes, they are part of the matmul

    def ours(layers: int) -> Counter[str]:
        model = decoder(layers, **TEXTS[text])
        if bits:
            nn.quantize(model, group_size=32, bits=bits)
        return step_launches(model, model.make_cache(), length)

    def theirs(layers: int) -> Counter[str]:
        args = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 320}
        heads = {"num_attention_heads": 4, "num_hidden_layers": layers, "rms_norm_eps": 1e-5}
        model = llama.Model(llama.ModelArgs("llama", **args, **heads, num_key_value_heads=2))
        caches = pytest.importorskip("mlx_lm.models.cache")
        return step_launches(model, caches.make_prompt_cache(model), length)

    assert per_layer(ours).total() == 17 + biases
    assert per_layer(theirs).total() == 17


@pytest.mark.parametrize(("stored", "length"), [(20, 1), (3, 7)], ids=["decode", "prefill"])
@pytest.mark.parametrize("text", TEXTS)
def test_positions_that_jump_add_no_kernel_to_a_layer(text, stored, length):
    part = Part(2, np.array([0, 3, 6], np.int32), 9)

    def ours(layers: int) -> Counter[str]:
        model = decoder(layers, **TEXTS[text])
        cache = model.make_cache()
        set_positions(cache, Positions((part,)))
        ids = mx.zeros((1, length), mx.int32)
        mx.eval(ids)
        with on_metal(model):
            return launches(model(ids, cache=filled(model, cache, stored)))

    assert per_layer(ours).total() == 17


@pytest.mark.parametrize(("dtype", "kernels"), [(mx.float32, 6), (mx.float16, 7)])
def test_a_token_launches_few_kernels_beside_those_of_the_layers(dtype, kernels):
    """Embedding, norm, head, a cast to float32, normalising twice, the likeliest."""
    model = decoder(1)
    model.set_dtype(dtype)
    choose = Chooser(greedy, [], mx.zeros((0,), mx.int32))
    token = mx.zeros((1, 1), mx.int32)
    mx.eval(token)
    with on_metal(model):
        logits = model(token, cache=filled(model, model.make_cache()))[:, -1]
        assert launches(*choose(logits)).total() == 17 + kernels


@pytest.mark.parametrize(
    ("kind", "activation"),
    [(CLIP, "quick_gelu"), (CLIP, "gelu"), (SIGLIP, "gelu_pytorch_tanh")],
)
def test_a_layer_of_the_tower_launches_12_kernels(kind, activation):
    def count(layers: int) -> Counter[str]:
        vision = replace(CONFIG.vision_config, model_type=kind, hidden_act=activation)
        tower = Llava(replace(CONFIG, vision_config=vision)).vision_tower
        pixels = mx.zeros((2, 56, 56, 3))
        mx.eval(pixels)
        with on_metal(tower):
            return launches(tower(pixels, layers)[-1])

    assert per_layer(count).total() == 12


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("text", TEXTS)
def test_nothing_of_16_bits_becomes_wider(text, dtype):
    model = Llava(replace(CONFIG, text_config=replace(CONFIG.text_config, **TEXTS[text])))
    model.set_dtype(dtype)
    lm = model.language_model
    pixels, features = mx.zeros((1, 56, 56, 3), dtype), mx.zeros((1, 16, 64), dtype)
    with on_metal(model):
        caches = [filled(lm, lm.make_cache()) for _ in range(2)]
        batch = rows_of_any_length(lm)
        found = [
            dtypes(lambda x: lm(x, cache=caches[0]), mx.zeros((1, 1), mx.int32)),
            dtypes(lambda x: lm(x, cache=caches[1]), mx.zeros((1, 7), mx.int32)),
            dtypes(lambda x: lm(x, cache=batch.step([1] * 8)), mx.zeros((8, 1), mx.int32)),
            dtypes(lambda x: model.vision_tower(x, 2), pixels),
            dtypes(model.multi_modal_projector, features),
        ]
    for operations in found:
        floats = {t for ts in operations.values() for t in ts if mx.issubdtype(t, mx.floating)}
        assert floats == {dtype}, operations


@pytest.mark.parametrize("sampler", [None, make_sampler(0.7, 0.9, 0.05, 40, seed=3)])
def test_decoding_reads_nothing_but_tokens(sampler, monkeypatch):
    model = decoder(2)
    monkeypatch.setattr("mlx_llava.generation.steps.queues_ahead", lambda: True)
    reads: list[str] = []
    for name in ("item", "tolist", "__array__", "__int__", "__float__", "__bool__", "__index__"):
        read = getattr(mx.array, name)

        def counted(self, *args, name=name, read=read):
            reads.append(name)
            return read(self, *args)

        monkeypatch.setattr(mx.array, name, counted)
    for name in ("eval", "synchronize"):
        monkeypatch.setattr(mx, name, lambda *_, name=name: reads.append(name))
    steps = generate_step(mx.zeros((1, 250, 64)), model, sampler=sampler, max_tokens=20)
    assert len(list(steps)) == 20  # beyond the 256 positions that the cache has at first
    assert reads == ["item"] * 20


@pytest.mark.parametrize("text", TEXTS)
def test_a_layer_launches_17_kernels_for_eight_rows_of_any_length(text):
    """mlx-lm's padded batch launches 18."""

    def count(layers: int) -> Counter[str]:
        model = decoder(layers, **TEXTS[text])
        batch = rows_of_any_length(model)
        ids = mx.zeros((8, 1), mx.int32)
        mx.eval(ids)
        with on_metal(model):
            return launches(model(ids, cache=batch.step([1] * 8)))

    assert per_layer(count).total() == 17
