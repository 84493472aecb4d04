"""The projector: from the vision tower's features to the decoder's word-embedding space.

LLaVA 1.5's two-layer MLP (Liu et al. 2023, arXiv:2310.03744), exact GELU between.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.activations import ACTIVATIONS
from mlx_llava.config import LlavaConfig


class Projector(nn.Module):
    """(..., vision width x number of feature layers) -> (..., decoder width)."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        vision_dims = config.vision_config.hidden_size * len(config.feature_layers)
        text_dims, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.activation = ACTIVATIONS[config.projector_hidden_act]
        self.linear_1 = nn.Linear(vision_dims, text_dims, bias=bias)
        self.linear_2 = nn.Linear(text_dims, text_dims, bias=bias)

    @property
    def dtype(self) -> mx.Dtype:
        """The projector's own precision, also where its weights are quantised."""
        layer = self.linear_1
        return (layer.scales if "scales" in layer else layer.weight).dtype

    def __call__(self, features: mx.array) -> mx.array:
        return self.linear_2(self.activation(self.linear_1(features)))
