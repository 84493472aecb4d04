"""How much there is to do: multiplications of an encode or a prefill, bytes of a decoded token.

What a matmul of (m, k) by (k, n) does is counted as 2 m k n; norms, gates and softmax are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx.utils import tree_flatten

from mlx_llava.generation.memory import kv_bytes
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llava import Llava

#: What a layer launches on a GPU.
KERNELS_OF_CLIP, KERNELS_OF_LLAMA = 12, 17


def encode_flops(config: LlavaConfig, tiles: int) -> float:
    """Of the vision tower's layers that are read, and of the projector."""
    vision, text = config.vision_config, config.text_config
    patches, tokens, D = vision.patches_per_side**2, vision.num_positions, vision.hidden_size
    layer = 2 * tokens * (4 * D * D + 2 * D * vision.intermediate_size) + 4 * tokens**2 * D
    embedding = 2 * patches * 3 * vision.patch_size**2 * D
    width = D * len(config.feature_layers)
    projector = 0
    for _ in range(config.projector_layers):
        projector += 2 * config.tokens_per_tile * width * text.hidden_size
        width = text.hidden_size
    return float(tiles * (embedding + max(config.feature_layers) * layer + projector))


def prefill_flops(config: LlavaConfig, length: int) -> float:
    """Of the decoder, under the causal mask, with the logits of the last position.

    Of the last layer, only the keys and values of all positions.
    """
    text = config.text_config
    D, heads = text.hidden_size, text.num_attention_heads * text.dims_per_head
    kv = text.kv_heads * text.dims_per_head
    others = 2 * D * heads + 3 * D * text.intermediate_size
    layer = 2 * length * (2 * D * kv + others) + 2 * length**2 * heads
    last = 2 * length * 2 * D * kv + 2 * others + 4 * length * heads
    return float((text.num_hidden_layers - 1) * layer + last + 2 * D * text.vocab_size)


def decode_bytes(model: Llava, positions: int) -> float:
    """Of weights, keys and values that one token reads."""
    language_model, config = model.language_model, model.config
    weights = dict(tree_flatten(language_model.parameters()))
    if not config.tie_word_embeddings:
        weights = {k: w for k, w in weights.items() if "embed_tokens" not in k}
    kv = kv_bytes(config, positions, language_model.dtype.size)
    return float(sum(weight.nbytes for weight in weights.values()) + kv)


@dataclass(frozen=True)
class Work:
    """What one prompt takes.

    Attributes:
        encode: operations of the vision tower and the projector.
        prefill: operations of the decoder.
        token: bytes that a token of the answer reads.
        encode_kernels: kernels of the vision tower.
        decoder_kernels: kernels of one pass through the decoder.
    """

    encode: float
    prefill: float
    token: float
    encode_kernels: int
    decoder_kernels: int


def work_of(model: Llava, inputs: Inputs, max_tokens: int) -> Work:
    """What a prompt takes, and a token in the middle of its answer."""
    config, length = model.config, inputs.input_ids.shape[1]
    return Work(
        encode_flops(config, sum(inputs.image_tiles)),
        prefill_flops(config, length),
        decode_bytes(model, length + max_tokens // 2),
        KERNELS_OF_CLIP * max(config.feature_layers),
        KERNELS_OF_LLAMA * config.text_config.num_hidden_layers,
    )
