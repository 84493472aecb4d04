"""A block of the vision tower in NumPy is that of MLX, and leaves training to it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_llava.model import clip
from mlx_llava.model.device import on_cpu
from mlx_llava.model.linux import encoder, functions
from mlx_llava.model.linux.adopt import adopt
from mlx_llava.model.vision_config import VisionConfig

pytestmark = pytest.mark.skipif(
    not functions.NUMPY or not on_cpu(), reason="NumPy is used on Linux's CPU only"
)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """NumPy does even what is small."""
    monkeypatch.setattr(functions, "SMALLEST", 0)


def random_layer(activation="quick_gelu"):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    settings = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = VisionConfig.from_dict({**sizes, **settings, "hidden_act": activation})
    layer = clip.EncoderLayer(config)
    for norm in (layer.layer_norm1, layer.layer_norm2):
        norm.weight, norm.bias = mx.random.normal((64,)), mx.random.normal((64,))
    layer.eval()
    return layer


def loss(layer, x):
    return (layer(x) ** 2).sum()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_values_gradients_and_compilation(activation, monkeypatch):
    layer, x = random_layer(activation), mx.random.normal((2, 19, 64))
    expected, gradient = layer(x), mx.grad(lambda x: loss(layer, x))(x)
    adopt(layer)
    calls, apply = [], encoder.apply
    monkeypatch.setattr(encoder, "apply", lambda *args: calls.append(1) or apply(*args))
    assert mx.allclose(layer(x), expected, atol=1e-4)
    assert len(calls) == 4
    assert mx.allclose(mx.compile(layer)(x), expected, atol=1e-4)
    assert mx.allclose(mx.grad(lambda x: loss(layer, x))(x), gradient, rtol=1e-3, atol=1e-2)


def test_its_weights_are_trained():
    layer, x = random_layer(), mx.random.normal((2, 19, 64))
    layer.train()
    expected = dict(tree_flatten(nn.value_and_grad(layer, loss)(layer, x)[1]))
    adopt(layer)
    found = dict(tree_flatten(nn.value_and_grad(layer, loss)(layer, x)[1]))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert mx.allclose(gradient, expected[name], rtol=1e-3, atol=1e-2), name
        assert mx.abs(gradient).max() > 0 or name.endswith("k_proj.bias")


def test_a_part_of_another_kind_does_its_own():
    layer, x = random_layer("relu"), mx.random.normal((2, 19, 64))
    expected = layer(x)
    adopt(layer)
    assert mx.allclose(layer(x), expected, atol=1e-4)
