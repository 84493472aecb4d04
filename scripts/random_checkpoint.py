"""Writes an original LLaVA v1.5 checkpoint of real shapes with random weights.

To try a conversion at full size: float16 ``.bin`` shards without a vision tower, and CLIP
beside them, as liuhaotian/llava-v1.5-7b and openai/clip-vit-large-patch14-336 have them.

    python scripts/random_checkpoint.py FOLDER --tokenizer tokenizer.model [--layers 32]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from mlx_llava.analysis.random_model import SHAPES

SHARD_BYTES = 5 << 30
VICUNA = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "image_aspect_ratio": "pad",
}
CLIP = {"model_type": "clip_vision_model", **SHAPES["7b"][0]}


def language_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the decoder and the projector."""
    width, hidden, rows = 4096, 11008, 32000
    yield "model.embed_tokens.weight", (rows, width)
    for i in range(layers):
        for name in "qkvo":
            yield f"model.layers.{i}.self_attn.{name}_proj.weight", (width, width)
        for name in ("gate", "up"):
            yield f"model.layers.{i}.mlp.{name}_proj.weight", (hidden, width)
        yield f"model.layers.{i}.mlp.down_proj.weight", (width, hidden)
        for name in ("input", "post_attention"):
            yield f"model.layers.{i}.{name}_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (rows, width)
    for n, inputs in ((0, 1024), (2, width)):
        yield f"model.mm_projector.{n}.weight", (width, inputs)
        yield f"model.mm_projector.{n}.bias", (width,)


def clip_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the vision tower."""
    width, hidden = 1024, 4096
    yield "embeddings.class_embedding", (width,)
    yield "embeddings.patch_embedding.weight", (width, 3, 14, 14)
    yield "embeddings.position_embedding.weight", (577, width)
    norms = ["pre_layrnorm", "post_layernorm"]
    for i in range(24):
        layer = f"encoder.layers.{i}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{layer}.self_attn.{name}.weight", (width, width)
            yield f"{layer}.self_attn.{name}.bias", (width,)
        yield f"{layer}.mlp.fc1.weight", (hidden, width)
        yield f"{layer}.mlp.fc1.bias", (hidden,)
        yield f"{layer}.mlp.fc2.weight", (width, hidden)
        yield f"{layer}.mlp.fc2.bias", (width,)
    for norm in norms:
        yield f"{norm}.weight", (width,)
        yield f"{norm}.bias", (width,)


def random_tensor(shape: tuple[int, ...]) -> torch.Tensor:
    """Values that keep activations at unit size; norms of one."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16)
    inputs = math.prod(shape[1:])
    return (torch.randn(shape) / inputs**0.5).half()


def main() -> None:
    """Writes both folders."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="LLaMA's tokenizer.model")
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    llava, clip = args.folder / "llava", args.folder / "clip"
    llava.mkdir(parents=True)
    clip.mkdir()
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    number, size = 1, 0
    for name, shape in language_shapes(args.layers):
        tensor = random_tensor(shape)
        if size + tensor.nbytes > SHARD_BYTES:
            torch.save(shard, llava / f"pytorch_model-{number:05}.bin")
            shard, number, size = {}, number + 1, 0
        shard[name] = tensor
        size += tensor.nbytes
        weight_map[name] = f"pytorch_model-{number:05}.bin"
    torch.save(shard, llava / f"pytorch_model-{number:05}.bin")
    index = {"metadata": {}, "weight_map": weight_map}
    (llava / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = {**VICUNA, "num_hidden_layers": args.layers, "mm_vision_tower": str(clip.absolute())}
    (llava / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(args.tokenizer, llava / "tokenizer.model")
    torch.save(
        {f"vision_model.{k}": random_tensor(s) for k, s in clip_shapes()},
        clip / "pytorch_model.bin",
    )
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": CLIP}))


if __name__ == "__main__":
    main()
