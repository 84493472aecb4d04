"""LLaVAs of real shapes with random weights, to measure: as fast, and as large, as trained ones."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_llava.checkpoint.hub import embedded_model
from mlx_llava.checkpoint.load import load
from mlx_llava.checkpoint.precision import read_dtype
from mlx_llava.checkpoint.safetensors import output
from mlx_llava.checkpoint.save import write_model
from mlx_llava.checkpoint.tensors import LazyTensor, to_torch_layout
from mlx_llava.inputs.image_processor import ImageProcessor
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llava import Llava
from mlx_llava.model.vision_config import CLIP, SIGLIP

#: The bits that MLX's codes can have, and how many of these share a scale.
BITS = (2, 3, 4, 5, 6, 8)
GROUP = 64
Settings: TypeAlias = "dict[str, Any]"
Unsigned: TypeAlias = "type[np.unsignedinteger[Any]]"
_UNSIGNED: dict[mx.Dtype, Unsigned] = {mx.uint8: np.uint8, mx.uint32: np.uint32}
#: Of each dtype, an unsigned one as wide, and the bits behind a number's point.
_FLOATS: dict[mx.Dtype, tuple[Unsigned, int]] = {
    mx.float32: (np.uint32, 23),
    mx.float16: (np.uint16, 10),
    mx.bfloat16: (np.uint16, 7),
}


def _clip(width: int, layers: int, heads: int, hidden: int, side: int) -> Settings:
    return {
        "model_type": CLIP,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "image_size": side,
        "patch_size": 14,
    }


def _llama(width: int, layers: int, heads: int, kv_heads: int, hidden: int) -> Settings:
    return {
        "model_type": "llama",
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
    }


_CLIP_L_336 = _clip(1024, 24, 16, 4096, 336)
_SIGLIP_SO400M = {**_clip(1152, 26, 16, 4304, 384), "model_type": SIGLIP}
_QWEN_05B = {
    **_llama(1024, 24, 16, 16, 2816),
    "model_type": "qwen2",
    "vocab_size": 152000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
#: Name -> vision tower and decoder: CLIP ViT-L/14-336 below TinyLlama's and Vicuna's shapes, and
#: llava-interleave-qwen-0.5b's.
SHAPES: dict[str, tuple[Settings, Settings]] = {
    "tiny": (_clip(64, 3, 2, 128, 56), _llama(64, 2, 4, 2, 160)),
    "300m": (_CLIP_L_336, _llama(1024, 16, 16, 4, 2816)),
    "0.5b": (_SIGLIP_SO400M, _QWEN_05B),
    "1b": (_CLIP_L_336, _llama(2048, 22, 32, 4, 5632)),
    "7b": (_CLIP_L_336, _llama(4096, 32, 32, 32, 11008)),
}


def random_config(shape: str, image_token_index: int) -> LlavaConfig:
    """The config of a named shape; raises ValueError for an unknown name."""
    if shape not in SHAPES:
        raise ValueError(f"There is no shape {shape!r}; known: {', '.join(SHAPES)}.")
    vision, text = SHAPES[shape]
    is_siglip = vision["model_type"] == SIGLIP
    data: dict[str, Any] = {
        "model_type": "llava",
        "image_token_index": image_token_index,
        "vision_feature_layer": -1 if is_siglip else -2,
        "vision_feature_select_strategy": "full" if is_siglip else "default",
        "vision_config": vision,
        "text_config": text,
    }
    return LlavaConfig.from_dict(data)


def write_random_model(shape: str, folder: Path, dtype: str, bits: int | None = None) -> None:
    """Writes a checkpoint with the embedded model's tokenizer, one tensor at a time.

    Args:
        shape (str): A name of `SHAPES`.
        folder (Path): Where to.
        dtype (str): Of all weights that are not codes.
        bits (int, optional): Makes the decoder's weights codes of so many bits, which
            transformers does not read.

    Raises:
        ValueError: There is no such shape, or MLX has no codes of so many bits.
    """
    _, embedded = load(embedded_model(), lazy=True, as_stored=True)
    config = random_config(shape, embedded.config.image_token_index)
    images = ImageProcessor.from_config(None, config)
    mx.random.seed(0)
    model = Llava(config)  # its large arrays are never computed
    if bits is not None:
        settings = _check_bits(bits)
        nn.quantize(model.language_model, class_predicate=_has_whole_groups, **settings)
        config = replace(config, quantization=settings)
    processor = Processor(config, embedded.tokenizer, images, template=embedded.template)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    tensors = {
        name: LazyTensor(
            "a generator",
            array.shape,
            array.dtype if array.dtype == mx.uint32 else read_dtype(dtype),
            partial(random_array, seed, name, array, read_dtype(dtype), bits),
        )
        for seed, (name, array) in enumerate(weights.items())
    }
    layout = to_torch_layout(tensors) if bits is None else tensors
    outputs = [output(name, tensor) for name, tensor in layout.items()]
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, outputs, config, processor)


def _check_bits(bits: int) -> dict[str, Any]:
    if bits not in BITS:
        raise ValueError(f"There are no codes of {bits} bits; known: {', '.join(map(str, BITS))}.")
    return {"group_size": GROUP, "bits": bits, "mode": "affine"}


def _has_whole_groups(_: str, layer: nn.Module) -> bool:
    return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % GROUP == 0


def random_array(
    seed: int, name: str, array: mx.array, dtype: mx.Dtype, bits: int | None
) -> mx.array:
    """Numbers for a parameter, as ``q_proj.scales``, that keep activations at a trained one's size.

    Codes of so many bits, and numbers of a dtype, come straight from the generator as they are
    stored; of the array only shape and dtype are looked at, but where it is small.
    """
    generator = np.random.default_rng(seed)
    if array.dtype in _UNSIGNED:
        return _random_bits(generator, array.shape, _UNSIGNED[array.dtype])
    if array.ndim == 1:
        return array.astype(dtype)
    *_, part = name.split(".")
    fan_in = array[0].size * (GROUP if part in ("scales", "biases") else 1)
    if "embed" in name and "patch" not in name:
        fan_in = 1
    if part not in ("scales", "biases"):
        return _uniform(generator, array.shape, dtype, 0, math.sqrt(12 / fan_in))
    # Of codes from 0 to n - 1, times a scale, the variance is scale^2 (n^2 - 1) / 12.
    largest = 2 ** (bits or 0) - 1
    scale = math.sqrt(12 / (largest * (largest + 2) * fan_in))
    middle = scale if part == "scales" else -scale * largest / 2
    return _uniform(generator, array.shape, dtype, middle, 0.2 * abs(middle))


def _uniform(
    generator: np.random.Generator,
    shape: tuple[int, ...],
    dtype: mx.Dtype,
    middle: float,
    width: float,
) -> mx.array:
    """Numbers around a middle: random bits behind the point of a number from 1 to 2."""
    unsigned, behind_point = _FLOATS[dtype]
    bits = _random_bits(generator, shape, unsigned) & (2**behind_point - 1)
    one = mx.array(1, dtype).view(bits.dtype)
    return ((bits | one).view(dtype) - 1.5) * width + middle


def _random_bits(
    generator: np.random.Generator, shape: tuple[int, ...], unsigned: Unsigned
) -> mx.array:
    largest = np.iinfo(unsigned).max
    return mx.array(generator.integers(0, largest, shape, unsigned, endpoint=True))
