"""LLaVAs of real shapes with random weights, to measure: as fast, and as large, as trained ones."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path

from mlx_llava.checkpoint.hub import embedded_model
from mlx_llava.checkpoint.load import load
from mlx_llava.checkpoint.precision import read_dtype
from mlx_llava.checkpoint.save import save
from mlx_llava.inputs.image_processor import ImageProcessor
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llava import Llava

_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_CLIP_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def _llama(width: int, layers: int, heads: int, kv_heads: int, hidden: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
    }


#: Name -> vision tower and decoder: CLIP ViT-L/14-336 below TinyLlama's and Vicuna's shapes.
SHAPES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "tiny": (_CLIP_TINY, _llama(64, 2, 4, 2, 160)),
    "300m": (_CLIP_L_336, _llama(1024, 16, 16, 4, 2816)),
    "1b": (_CLIP_L_336, _llama(2048, 22, 32, 4, 5632)),
    "7b": (_CLIP_L_336, _llama(4096, 32, 32, 32, 11008)),
}


def random_config(shape: str, image_token_index: int) -> LlavaConfig:
    """The config of a named shape; raises ValueError for an unknown name."""
    if shape not in SHAPES:
        raise ValueError(f"There is no shape {shape!r}; known: {', '.join(SHAPES)}.")
    vision, text = SHAPES[shape]
    data: dict[str, Any] = {
        "model_type": "llava",
        "image_token_index": image_token_index,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": {"model_type": "clip_vision_model", **vision},
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            **text,
        },
    }
    return LlavaConfig.from_dict(data)


def write_random_model(shape: str, folder: Path, dtype: str) -> None:
    """Writes a checkpoint that every system reads, with the embedded model's tokenizer."""
    _, embedded = load(embedded_model(), lazy=True, as_stored=True)
    config = random_config(shape, embedded.config.image_token_index)
    side = config.vision_config.image_size
    images = replace(ImageProcessor.from_config(None, config), size=side)
    processor = Processor(config, embedded.tokenizer, images, template=embedded.template)
    model = Llava(config)
    mx.random.seed(0)
    parameters = tree_map_with_path(_random, model.parameters())
    model.update(parameters)
    model.set_dtype(read_dtype(dtype))
    save(model, processor, folder, force=True)


def _random(name: str, weight: mx.array) -> mx.array:
    """Numbers that keep activations at the size that training gives them."""
    if weight.ndim == 1:
        return mx.ones_like(weight) if name.endswith("norm.weight") else weight
    fan_in = 1 if "embed" in name and "patch" not in name else weight[0].size
    return mx.random.normal(weight.shape) / math.sqrt(fan_in)
