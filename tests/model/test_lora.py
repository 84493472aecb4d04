"""A LoRA layer is mlx-lm's, in training and after it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_llava.model.lora import LoRALinear


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_layer_of_mlx_lm(bits, is_training):
    theirs = pytest.importorskip("mlx_lm.tuner.lora").LoRALinear
    linear = nn.Linear(64, 32)
    linear = linear if bits is None else nn.QuantizedLinear.from_linear(linear, 32, bits)
    layers = [
        LoRALinear(linear, rank=5, scale=2.5, dropout=0.4),
        theirs.from_base(linear, r=5, scale=2.5, dropout=0.4),
    ]
    outputs, begun = [], []
    for layer in layers:
        begun.append([(name, array.shape) for name, array in tree_flatten(layer.parameters())])
        assert 0.95 / 8 < mx.abs(layer.lora_a).max() <= 1 / 8  # one by the root of the inputs
        layer.train(is_training)
        mx.random.seed(1)
        layer.lora_a, layer.lora_b = mx.random.normal((64, 5)), mx.random.normal((5, 32))
        outputs.append(layer(mx.random.normal((2, 7, 64))))
    assert begun[0] == begun[1]
    assert mx.array_equal(*outputs)
