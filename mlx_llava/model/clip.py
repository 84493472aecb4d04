"""CLIP's image encoder (Radford et al. 2021, arXiv:2103.00020): pixels -> hidden states.

Its blocks are those of every vision transformer here; siglip.py has another way in.

B images or tiles, H = W pixels, P patches, L = P + 1 tokens (class token first), D width.
Module names are the checkpoint's, `pre_layrnorm` is spelt as there.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.model.layers import ACTIVATIONS, AnyArray
from mlx_llava.model.vision_config import VisionConfig


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, which is one matmul of all patches."""

    def __init__(self, side: int, dims: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = mx.zeros((dims, side, side, 3))
        if bias:
            self.bias = mx.zeros((dims,))

    def __call__(self, pixel_values: mx.array) -> mx.array:
        side = self.weight.shape[1]
        B, H, W, _ = pixel_values.shape
        rows, columns = H // side, W // side
        x = pixel_values[:, : rows * side, : columns * side]
        x = x.reshape(B, rows, side, columns, side, 3).swapaxes(2, 3)
        x = self.project(x.reshape(B, rows * columns, -1))  # (B, P, D), row by row
        return x + self.bias if "bias" in self else x

    def project(self, patches: mx.array) -> mx.array:
        """(B, P, side side 3) -> (B, P, D)."""
        return patches @ self.weight.flatten(1).T


class Embeddings(nn.Module):
    """The patches, the class token in front, learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        side, dims = config.patch_size, config.hidden_size
        self.class_embedding = mx.zeros((dims,))
        self.patch_embedding = PatchEmbedding(side, dims)
        self.position_embedding = nn.Embedding(config.num_positions, dims)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        patches = self.patch_embedding(pixel_values)  # (B, P, D)
        B, P, D = patches.shape
        class_token = mx.broadcast_to(self.class_embedding, (B, 1, D))
        tokens = mx.concatenate([class_token, patches], axis=1)  # (B, L, D)
        return tokens + self.position_embedding(mx.arange(P + 1))


class Attention(nn.Module):
    """Full attention between all tokens of one image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (D // self.num_heads) ** -0.5
        self.attention = mx.fast.scaled_dot_product_attention
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def __call__(self, x: mx.array) -> mx.array:
        B, L, D = x.shape
        queries, keys, values = (
            projection(x).reshape(B, L, self.num_heads, -1).transpose(0, 2, 1, 3)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, heads, L, head width)
        x = self.attention(queries, keys, values, scale=self.scale)
        return self.out_proj(x.transpose(0, 2, 1, 3).reshape(B, L, D))  # (B, L, D)


class MLP(nn.Module):
    """Two layers; OpenAI's CLIP has the quick GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.activation(self.fc1(x))  # (B, L, hidden)
        return self.fc2(x)  # (B, L, D)


class EncoderLayer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))  # (B, L, D)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array, num_layers: int) -> list[mx.array]:
        hidden_states = [x]  # (B, L, D)
        for layer in self.layers[:num_layers]:
            hidden_states.append(layer(hidden_states[-1]))
        return hidden_states


class VisionTransformer(nn.Module):
    """The tower below its classification head.

    `post_layernorm` belongs to the checkpoint, and to CLIP's own use of the class token;
    LLaVA never applies it.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, pixel_values: mx.array, num_layers: int) -> list[mx.array]:
        x = self.pre_layrnorm(self.embeddings(pixel_values))  # (B, L, D)
        return self.encoder(x, num_layers)


class VisionTower(nn.Module):
    """The vision tower of a LLaVA."""

    def __init__(self, image_size: int, vision_model: nn.Module) -> None:
        super().__init__()
        self.image_size = image_size
        self.vision_model = vision_model

    @property
    def dtype(self) -> mx.Dtype:
        """The tower's own precision; its patches are never quantised."""
        return self.vision_model.embeddings.patch_embedding.weight.dtype

    def __call__(self, pixel_values: AnyArray, num_layers: int) -> list[mx.array]:
        """Runs the embedding and the first `num_layers` blocks, and nothing above them.

        Args:
            pixel_values (array): Normalised pixels (B, H, W, 3), cast to the tower's dtype.
            num_layers (int): How many blocks to run.

        Returns:
            list[mx.array]: ``num_layers + 1`` hidden states (B, L, D); [0] is the embedding.

        Raises:
            ValueError: The images do not have the tower's size.
        """
        side = self.image_size
        if pixel_values.shape[1:] != (side, side, 3):
            raise ValueError(
                f"pixel_values are {pixel_values.shape}; the tower reads (B, {side}, {side}, 3)."
            )
        return self.vision_model(mx.array(pixel_values).astype(self.dtype), num_layers)
