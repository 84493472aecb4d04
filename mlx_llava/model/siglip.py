"""SigLIP's image encoder (Zhai et al. 2023, arXiv:2303.15343): pixels -> hidden states.

B images or tiles, P patches, D width. CLIP's blocks with another way in: patches have a bias, no
class token comes before them and no norm after. Module names are the checkpoint's.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.model.clip import Encoder, PatchEmbedding
from mlx_llava.model.vision_config import VisionConfig


class Embeddings(nn.Module):
    """The patches and learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dims = config.hidden_size
        self.patch_embedding = PatchEmbedding(config.patch_size, dims, bias=True)
        self.position_embedding = nn.Embedding(config.num_positions, dims)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        patches = self.patch_embedding(pixel_values)  # (B, P, D)
        return patches + self.position_embedding(mx.arange(patches.shape[1]))


class VisionTransformer(nn.Module):
    """The tower below its pooling head.

    `post_layernorm` belongs to the checkpoint, and to SigLIP's own use of the pooled patches;
    LLaVA never applies it.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, pixel_values: mx.array, num_layers: int) -> list[mx.array]:
        return self.encoder(self.embeddings(pixel_values), num_layers)
