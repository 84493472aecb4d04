"""The projector: from the vision tower's features to the decoder's word-embedding space.

LLaVA 1.5's two-layer MLP (Liu et al. 2023, arXiv:2310.03744), exact GELU between; ViP-LLaVA's has a
layer norm before it (Cai et al. 2024, arXiv:2312.00784).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.layers import ACTIVATIONS
from mlx_llava.model.quantized import float_dtype


class Projector(nn.Module):
    """(..., vision width x number of feature layers) -> (..., decoder width).

    Its layers are ``linear_1``, ``linear_2``, ...: two in LLaVA 1.5 and 1.6, one in LLaVA v0
    and v1, none where features have the decoder's width already.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        dims = config.vision_config.hidden_size * len(config.feature_layers)
        text_dims, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.num_layers = config.projector_layers
        self.activation = ACTIVATIONS[config.projector_hidden_act]
        if config.projector_layernorm_eps is not None:
            self.projector_layernorm = nn.LayerNorm(dims, eps=config.projector_layernorm_eps)
        for n in range(1, self.num_layers + 1):
            self[f"linear_{n}"] = nn.Linear(dims, text_dims, bias=bias)
            dims = text_dims

    def __call__(self, features: mx.array) -> mx.array:
        if "projector_layernorm" in self:
            norm = self.projector_layernorm
            features = norm(features.astype(norm.weight.dtype))  # (..., vision width x layers)
        for n in range(1, self.num_layers + 1):
            layer = self[f"linear_{n}"]
            features = features.astype(float_dtype(layer, features.dtype))
            features = layer(self.activation(features) if n > 1 else features)  # (..., D)
        return features
