"""Layers of codes and of 16 bits give what MLX's give, with MLX's gradients, compiled too."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llava.model.device import on_cpu
from mlx_llava.model.linux import functions, layers
from mlx_llava.model.linux.adopt import adopt
from mlx_llava.model.linux.functions import view
from mlx_llava.model.quantized import PermutedQuantizedLinear

pytestmark = pytest.mark.skipif(
    not functions.NUMPY or not on_cpu(), reason="NumPy is used on Linux's CPU only"
)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """NumPy does even what is small."""
    monkeypatch.setattr(functions, "SMALLEST", 0)


def permuted(layer):
    PermutedQuantizedLinear.adopt(layer)
    layer.input_permutation = mx.random.permutation(64).astype(mx.int32)
    return layer


def halved(layer):
    layer.weight = layer.weight.astype(mx.bfloat16)
    return layer


def column_by_column(layer):
    layer.scales = mx.contiguous(layer.scales.T).T
    return layer


def with_scales_of_16_bits(layer, dtype=mx.bfloat16):
    layer.scales, layer.biases = layer.scales.astype(mx.bfloat16), layer.biases.astype(dtype)
    return layer


LAYERS = {
    "4 bits": lambda: nn.Linear(64, 24).to_quantized(32, 4),
    "6 bits": lambda: nn.Linear(64, 24, bias=False).to_quantized(64, 6),
    "permuted": lambda: permuted(nn.Linear(64, 24).to_quantized(32, 4)),
    "scales column by column": lambda: column_by_column(nn.Linear(64, 24).to_quantized(32, 4)),
    "scales of 16 bits": lambda: with_scales_of_16_bits(nn.Linear(64, 24).to_quantized(32, 4)),
    "scales of two kinds": lambda: with_scales_of_16_bits(
        nn.Linear(64, 24).to_quantized(32, 4), mx.float16
    ),
    "bfloat16": lambda: halved(nn.Linear(64, 24)),
}


def adopted(layer):
    container = nn.Module()
    container.layer = layer
    adopt(container)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_linear_layers(name, monkeypatch):
    layer = LAYERS[name]()
    x, cotangent = mx.random.normal((2, 3, 64)), mx.random.normal((2, 3, 24))
    expected, gradient = layer(x), mx.vjp(layer, [x], [cotangent])[1][0]
    adopted(layer)
    assert type(layer).__module__ == layers.__name__
    assert mx.allclose(layer(x), expected, atol=1e-5)
    assert mx.allclose(mx.vjp(layer, [x], [cotangent])[1][0], gradient, atol=1e-5)
    assert mx.allclose(mx.compile(layer)(x), expected, atol=1e-5)
    monkeypatch.setattr(functions, "NUMPY", False)
    assert mx.array_equal(layer(x), expected)


def test_a_layer_of_16_bits_can_be_trained():
    layer = LAYERS["bfloat16"]()
    x = mx.random.normal((5, 64))

    def gradients():
        loss = nn.value_and_grad(layer, lambda x: (layer(x) ** 2).sum())
        return dict(tree_flatten(loss(x)[1]))

    expected = gradients()
    adopted(layer)
    for name, gradient in gradients().items():
        assert gradient.dtype == expected[name].dtype
        assert mx.allclose(gradient, expected[name], rtol=1e-2, atol=1e-2), name


def test_a_new_weight_is_multiplied_with():
    layer, x = adopted(LAYERS["4 bits"]()), mx.random.normal((1, 64))
    layer(x)
    other = LAYERS["4 bits"]()
    layer.update(other.parameters())
    assert mx.allclose(layer(x), other(x), atol=1e-5)


@pytest.mark.parametrize("part", ["weight", "scales", "biases", "input_permutation"])
def test_a_part_of_a_weight_may_be_another_or_be_written_to(part):
    layer, x = adopted(LAYERS["permuted"]()), mx.random.normal((1, 64))
    other = LAYERS["permuted"]()
    layer(x)
    layer[part] = mx.array(other[part])
    first = layer(x)
    layer[part][...] = LAYERS["permuted"]()[part]
    second = layer(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "NUMPY", False)
        assert mx.allclose(second, layer(x), atol=1e-5)
        layer[part] = other[part]
        assert mx.allclose(first, layer(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_weight_that_is_added_to(dtype):
    layer = nn.Linear(64, 24, bias=False)
    layer.weight = layer.weight.astype(dtype)
    x = view(mx.random.normal((1, 64)))
    layers.apply(x, adopted(layer))
    layer.weight += 1
    expected = view(layer.weight.astype(mx.float32)) @ x[0]
    assert np.allclose(layers.apply(x, layer)[0][0], expected, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_an_embedding_of_codes(bits):
    embedding = nn.Embedding(24, 64).to_quantized(32, bits)
    ids, x = mx.array([[3, 0, 23], [7, 7, 1]]), mx.random.normal((2, 64))
    rows, logits = embedding(ids), embedding.as_linear(x)
    adopted(embedding)
    assert mx.allclose(embedding(ids), rows, atol=1e-6)
    assert mx.allclose(mx.compile(embedding)(ids), rows, atol=1e-6)
    assert mx.allclose(embedding.as_linear(x), logits, atol=1e-5)


def test_an_embedding_of_16_bits_as_the_head():
    embedding, x = halved(nn.Embedding(24, 64)), mx.random.normal((2, 64))
    expected = embedding.as_linear(x)
    assert mx.allclose(adopted(embedding).as_linear(x), expected, atol=1e-5)


def test_codes_of_other_modes_stay_with_mlx():
    layer = nn.Linear(64, 24).to_quantized(32, 4, mode="mxfp4")
    assert type(adopted(layer)) is nn.QuantizedLinear


@pytest.mark.parametrize("name", ["4 bits", "bfloat16"])
def test_a_compiled_step_that_is_given_the_weights(name):
    """As a training step is compiled: with the model as what it captures."""
    layer = LAYERS[name]()
    x = mx.random.normal((2, 64))
    expected = layer(x)
    adopted(layer)
    step = mx.compile(layer, inputs=layer.state)
    assert mx.allclose(step(x), expected, atol=1e-4)
