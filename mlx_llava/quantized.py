"""A quantised layer whose groups are scattered over its inputs (GPTQ's act-order)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class PermutedQuantizedLinear(nn.QuantizedLinear):
    """Sorts its inputs by group, so that groups are contiguous as MLX's kernels need them.

    Attributes:
        input_permutation: which input comes at each place, int32 (inputs,).
    """

    @classmethod
    def from_layer(cls, layer: nn.QuantizedLinear) -> PermutedQuantizedLinear:
        """The same layer, its inputs in the order that they have."""
        permuted = cls.__new__(cls)
        permuted.__dict__.update(layer.__dict__)
        dict.update(permuted, layer)  # Module.update would look for each part in vain
        inputs = layer.scales.shape[1] * layer.group_size
        permuted.input_permutation = mx.arange(inputs, dtype=mx.int32)
        return permuted

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x[..., self.input_permutation])
