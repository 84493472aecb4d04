"""What NumPy does on a CPU is what MLX does, with MLX's gradients, and gives way to mx.compile."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_llava.model import layers
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.device import on_cpu
from mlx_llava.model.linux import functions as kernels
from mlx_llava.model.linux import rows, weights
from mlx_llava.model.linux.adopt import adopt
from mlx_llava.model.linux.encoder import EncoderLayer
from mlx_llava.model.linux.functions import view
from mlx_llava.model.linux.layers import Embedding, Linear, PatchEmbedding
from mlx_llava.model.llava import Llava

pytestmark = pytest.mark.skipif(
    not kernels.NUMPY or not on_cpu(), reason="NumPy is used on Linux's CPU only"
)


@pytest.fixture(autouse=True, params=["numba", "numpy"])
def always(request, monkeypatch):
    """NumPy, or what numba compiles, does even what is small; in several blocks and threads."""
    monkeypatch.setattr(kernels, "SMALLEST", 0)
    monkeypatch.setattr(kernels, "BLOCK", 512)
    monkeypatch.setattr("mlx_llava.model.linux.threads.threads", lambda: 3)
    monkeypatch.setattr("mlx_llava.model.linux.threads.SMALLEST", 0)
    monkeypatch.setattr(rows, "BLOCK", 64)
    monkeypatch.setattr(rows, "MANY", 0 if request.param == "numba" else math.inf)
    if request.param == "numba" and weights.kernels() is None:
        pytest.skip("there is no numba: pip install '.[cpu]'")


def mlx_attention(queries, keys, values, mask):
    scale = queries.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def attention(queries, keys, values, mask):
    return kernels.attention(queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=mask)


def qkv(B=2, H=6, heads=3, L=41, T=41, D=8):
    return [mx.random.normal((B, n, length, D)) for n, length in ((H, L), (heads, T), (heads, T))]


def rows_mask(B, L, T):
    """Causal, with padding on the left of the second row, as for a batch."""
    mask = mx.tri(L, T, T - L, dtype=mx.bool_)[None, None]
    padded = mx.arange(T) >= mx.array([0, 5])[:B, None]
    own = mx.arange(T) == mx.arange(T - L, T)[:, None]
    return mask & padded[:, None, None] | own


@pytest.mark.parametrize("mask", [None, "causal", "window", "rows"])
@pytest.mark.parametrize("shape", [{}, {"L": 1}, {"L": 9}, {"H": 3}, {"B": 1, "T": 300, "L": 70}])
def test_attention(shape, mask):
    inputs = qkv(**shape)
    (B, _, L, _), T = inputs[0].shape, inputs[1].shape[2]
    if mask == "rows":
        mask = rows_mask(B, L, T)
    elif mask == "window":
        mask = (mx.arange(T) > mx.arange(T - L, T)[:, None] - 4)[None, None]
        mask = mask & mx.tri(L, T, T - L, dtype=mx.bool_)
    ours, theirs = attention(*inputs, mask), mlx_attention(*inputs, mask)
    assert mx.allclose(ours, theirs, atol=2e-6)


def test_attention_to_a_part_of_a_cache():
    queries, keys, values = qkv(L=1, T=64)
    part = keys[..., :37, :], values[..., :37, :]
    assert mx.allclose(
        attention(queries, *part, None), mlx_attention(queries, *part, None), atol=2e-6
    )


FUNCTIONS = {
    "matmul": (kernels.matmul, lambda x, w: x @ w.T, [(2, 3, 17), (5, 17)]),
    "one row": (kernels.matmul, lambda x, w: x @ w.T, [(1, 17), (5, 17)]),
    "gelu": (kernels.gelu, nn.gelu, [(3, 211)]),
    "tanh gelu": (kernels.gelu_tanh, nn.gelu_approx, [(3, 211)]),
    "quick gelu": (kernels.quick_gelu, lambda x: x * mx.sigmoid(1.702 * x), [(3, 211)]),
    "swiglu": (kernels.swiglu, lambda g, u: nn.silu(g) * u, [(3, 2, 111), (3, 2, 111)]),
    "attention": (
        lambda q, k, v: attention(q, k, v, "causal"),
        lambda q, k, v: mlx_attention(q, k, v, "causal"),
        [(1, 4, 7, 8), (1, 2, 7, 8), (1, 2, 7, 8)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_gradients_and_compilation(name):
    ours, theirs, shapes = FUNCTIONS[name]
    inputs = [3 * mx.random.normal(shape) for shape in shapes]
    expected = theirs(*inputs)
    assert mx.allclose(ours(*inputs), expected, atol=1e-5)
    assert mx.allclose(mx.compile(ours)(*inputs), expected, atol=1e-5)
    cotangent = mx.random.normal(expected.shape)
    gradients = mx.vjp(ours, inputs, [cotangent])[1]
    for gradient, own in zip(gradients, mx.vjp(theirs, inputs, [cotangent])[1], strict=True):
        assert mx.allclose(gradient, own, atol=1e-4)


def test_gates_of_large_numbers_are_finite():
    x = mx.array([-1e4, -200.0, -88.0, 0.0, 88.0, 1e4])
    for function in (kernels.quick_gelu, kernels.gelu, kernels.gelu_tanh, layers.gelu_tanh):
        assert mx.allclose(function(x), mx.maximum(x, 0), atol=1e-6)
    assert mx.allclose(kernels.swiglu(x, mx.ones_like(x)), mx.maximum(x, 0), atol=1e-6)


def test_norms_and_sums():
    x, y = 3 * mx.random.normal((2, 7, 48)) + 1, mx.random.normal((2, 7, 48))
    for norm, own in ((nn.RMSNorm(48), rows.rms_norm), (nn.LayerNorm(48), rows.layer_norm)):
        norm.weight = mx.random.normal((48,))
        if "bias" in norm:
            norm.bias = mx.random.normal((48,))
        assert mx.allclose(mx.array(own(norm, view(x))), norm(x), atol=1e-5)
    assert mx.array_equal(mx.array(rows.plus(view(x), view(y))), x + y)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bits_stay_with_mlx(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "by_numpy", None)
    x = mx.ones((2, 8), dtype)
    assert kernels.matmul(x, x).dtype == dtype
    gates = kernels.quick_gelu, kernels.gelu, kernels.gelu_tanh
    results = *(gate(x) for gate in gates), kernels.swiglu(x, x)
    assert {result.dtype for result in results} == {dtype}


@pytest.mark.parametrize("size", [28, 30])
def test_patches_are_a_convolution(size):
    embedding = PatchEmbedding(7, 12)
    embedding.weight = mx.random.normal(embedding.weight.shape)
    pixels = mx.random.normal((2, size, size, 3))
    convolved = mx.conv2d(pixels, embedding.weight, stride=7).flatten(1, 2)
    assert mx.allclose(embedding(pixels), convolved, atol=1e-4)


def test_a_model_is_plain_until_it_adopts_them(monkeypatch):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
    text = {**sizes, "intermediate_size": 32, "vocab_size": 40}
    data = {"model_type": "llava", "image_token_index": 3, "vision_config": vision}
    model = Llava(LlavaConfig.from_dict({**data, "text_config": text}))
    inputs = mx.array([[1, 3, 3, 3, 3, 2]]), mx.random.normal((1, 28, 28, 3))
    with monkeypatch.context() as plain:
        plain.setattr(kernels, "by_numpy", None)
        expected = model(*inputs)
    names = [name for name, _ in model.named_modules()]
    adopt(model)
    assert mx.allclose(model(*inputs), expected, atol=1e-5)
    assert [name for name, _ in model.named_modules()] == names
    layer, tower = model.language_model.layers[0], model.vision_tower.vision_model
    assert type(layer.mlp.up_proj) is Linear
    assert type(model.language_model.model.embed_tokens) is Embedding
    assert type(tower.embeddings.patch_embedding) is PatchEmbedding
    assert layer.self_attn.attention is kernels.attention
    assert tower.encoder.layers[0].self_attn.attention is kernels.attention
    assert layer.mlp.gate is kernels.swiglu
    assert tower.encoder.layers[0].mlp.activation is kernels.quick_gelu
    assert type(tower.encoder.layers[0]) is EncoderLayer
    assert model.multi_modal_projector.activation is kernels.gelu
