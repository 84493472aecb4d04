"""llama.cpp's pair of files with random weights in the shape of a checkpoint, to measure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

#: Each block of 32 weights: a float16 scale, then 16 bytes of two codes.
_Q4_0 = np.dtype([("scale", "<f2"), ("codes", "u1", 16)])
_KINDS = gguf.GGMLQuantizationType


class _Writer(gguf.GGUFWriter):  # type: ignore[misc]
    """Adds random tensors, in 4 bits (Q4_0) or floats."""

    def random(self, name: str, *shape: int, kind: str) -> None:
        """A matrix whose products have the size of their inputs, or a norm's weight."""
        random, size = np.random.default_rng(0), 1 / math.sqrt(math.prod(shape[1:]))
        if len(shape) == 1:
            self.add_tensor(name, np.full(shape, float(name.endswith("weight")), np.float32))
        elif kind == "Q4_0":
            blocks = np.empty((shape[0], shape[1] // 32), _Q4_0)
            blocks["scale"] = size / 4.6  # the spread of codes from -8 to 7
            blocks["codes"] = random.integers(0, 256, (*blocks.shape, 16), "u1")
            self.add_tensor(name, blocks.view("u1"), raw_dtype=_KINDS.Q4_0)
        else:
            values = random.standard_normal(shape, np.float32) * np.float32(size)
            self.add_tensor(name, values.astype({"F16": np.float16, "F32": np.float32}[kind]))

    def write(self) -> None:
        """Writes all of it."""
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def write_random_pair(checkpoint: Path, folder: Path, kind: str) -> tuple[Path, Path]:
    """Writes a decoder in `kind` (Q4_0, F16, F32) and its tower in F16; gives their paths."""
    config = json.loads((checkpoint / "config.json").read_text())
    text, tower = folder / "text.gguf", folder / "mmproj.gguf"
    _write_text(text, config["text_config"], kind)
    _write_tower(tower, config["vision_config"], config["text_config"]["hidden_size"])
    return text, tower


def _write_text(path: Path, config: dict[str, Any], kind: str) -> None:
    D, hidden, V = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = _Writer(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(D)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [f"\u2581w{i}" for i in range(V - len(pieces))]
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * V)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (V - 259)])
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name in ("token_embd.weight", "output.weight"):
        writer.random(name, V, D, kind=kind)
    writer.random("output_norm.weight", D, kind="F32")
    width = D // heads * kv_heads
    matrices = {
        "attn_q": (D, D),
        "attn_k": (width, D),
        "attn_v": (width, D),
        "attn_output": (D, D),
        "ffn_gate": (hidden, D),
        "ffn_up": (hidden, D),
        "ffn_down": (D, hidden),
        "attn_norm": (D,),
        "ffn_norm": (D,),
    }
    for i in range(config["num_hidden_layers"]):
        for name, shape in matrices.items():
            writer.random(f"blk.{i}.{name}.weight", *shape, kind=kind)
    writer.write()


def _write_tower(path: Path, config: dict[str, Any], width: int) -> None:
    D, hidden = config["hidden_size"], config["intermediate_size"]
    side, patch = config["image_size"], config["patch_size"]
    layers = config["num_hidden_layers"] - 1  # the last one's output is not used
    writer = _Writer(path, "clip")
    for key in ("has_vision_encoder", "has_llava_projector"):
        writer.add_bool(f"clip.{key}", True)
    writer.add_bool("clip.use_gelu", False)
    writer.add_string("clip.projector_type", "mlp")
    numbers = {
        "image_size": side,
        "patch_size": patch,
        "embedding_length": D,
        "block_count": layers,
        "feed_forward_length": hidden,
        "projection_dim": width,
        "attention.head_count": config["num_attention_heads"],
    }
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    writer.random("v.class_embd", D, kind="F32")
    writer.random("v.patch_embd.weight", D, 3, patch, patch, kind="F16")
    writer.random("v.position_embd.weight", (side // patch) ** 2 + 1, D, kind="F16")
    layer = {
        **{f"attn_{name}": (D, D) for name in ("q", "k", "v", "out")},
        "ffn_up": (hidden, D),
        "ffn_down": (D, hidden),
        "ln1": (D,),
        "ln2": (D,),
    }
    shapes = {f"v.blk.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    shapes |= {"v.pre_ln": (D,), "mm.0": (width, D), "mm.2": (width, width)}
    for name, shape in shapes.items():
        writer.random(f"{name}.weight", *shape, kind="F16")
        writer.random(f"{name}.bias", shape[0], kind="F32")
    writer.write()
