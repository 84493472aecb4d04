"""A trained change of low rank beside a linear layer (Hu et al. 2021, arXiv:2106.09685).

mlx-lm's layer to the letter, mlx_lm/tuner/lora.py. The few lines are here since importing that
imports transformers, which takes longer than the embedded model's answer with an adapter.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.model.quantized import plain_weight


class LoRALinear(nn.Module):
    """A linear layer and what is added to it: x A B, times a scale. At first B is zero.

    Attributes:
        linear: the layer, plain or of codes; inputs I, outputs O.
        lora_a: (I, rank), float32 as B is.
        lora_b: (rank, O).
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        outputs, inputs = plain_weight(linear).shape
        bound = 1 / math.sqrt(inputs)
        self.linear = linear
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        change = self.dropout(x) @ self.lora_a @ self.lora_b
        return self.linear(x) + (self.scale * change).astype(x.dtype)
