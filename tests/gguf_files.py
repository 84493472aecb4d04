"""GGUF pairs of tiny reference models, as llama.cpp's converters write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece

from tests import layouts

#: What `write_text` says of a vocabulary: pieces, kinds of pieces, and further keys.
Vocabulary = dict[str, Any]

_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in ("q", "k", "v", "qkv")},
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    "mlp.gate_up_proj": "ffn_up",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of Q and K (convert_hf_to_gguf.py, permute)."""
    half = len(weight) // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """transformers' order of the rows of Q and K."""
    half = len(weight) // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def sentencepieces(model: bytes | None = None) -> Vocabulary:
    """The vocabulary of a SentencePiece model; default: that of `layouts`."""
    model = model or layouts.sentencepiece_model()
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(len(spm))
    asked = ((2, spm.is_unknown), (3, spm.is_control), (5, spm.is_unused), (6, spm.is_byte))
    kinds = [next((kind for kind, is_kind in asked if is_kind(i)), 1) for i in ids]
    return {
        "model": "llama",
        "tokens": [spm.id_to_piece(i) for i in ids],
        "scores": [spm.get_score(i) for i in ids],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_text(
    path: Path,
    reference: Any,
    kind: str = "F32",
    *,
    tied: bool = False,
    vocabulary: Vocabulary | None = None,
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    chat_template: str | None = None,
) -> dict[str, np.ndarray]:
    """Writes a decoder; gives the weights that its tensors mean, by canonical name.

    `keys` are metadata, without the decoder's name; None leaves one out. `extra` are further
    tensors.
    """
    text = reference.config.text_config
    kind_of_decoder = text.model_type if text.model_type in ("qwen2", "phi3") else "llama"
    writer = gguf.GGUFWriter(path, kind_of_decoder)
    vocabulary = vocabulary or sentencepieces()
    rows = len(vocabulary["tokens"] or range(layouts.VOCABULARY))
    metadata = {
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "rope.freq_base": text.rope_parameters["rope_theta"],
        "rope.dimension_count": getattr(text, "head_dim", None),
        **(keys or {}),
    }
    _add_keys(writer, f"{kind_of_decoder}.", metadata)
    _add_keys(writer, "tokenizer.ggml.", vocabulary)
    _add_keys(writer, "tokenizer.", {"chat_template": chat_template})
    meant = {}
    for key, tensor in layouts.state_dict(reference).items():
        module, _, part = key.removeprefix("language_model.").rpartition(".")
        if not key.startswith("language_model.") or (tied and module == "lm_head"):
            continue
        weight = tensor.float().numpy()
        if module in _OUTER:
            name = _OUTER[module]
            weight = weight[:rows] if weight.ndim == 2 else weight
        else:
            _, _, layer, inner = module.split(".", 3)
            name = f"blk.{layer}.{_INNER[inner]}"
        counts = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
        heads = counts.get(module.rpartition(".")[2]) if kind_of_decoder == "llama" else None
        stored = permute(weight, heads) if heads else weight
        qtype = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else kind]
        data = gguf.quants.quantize(stored, qtype)
        writer.add_tensor(f"{name}.{part}", data, raw_dtype=qtype)
        exact = gguf.quants.dequantize(data, qtype).reshape(stored.shape)
        meant[key] = unpermute(exact, heads) if heads else exact
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    _close(writer)
    return meant


def write_vision(
    path: Path,
    reference: Any,
    layers: int = 3,
    swapped: bool = True,
    without: str = "",
    **extra: Any,
) -> None:
    """Writes the mmproj file, legacy (`swapped`: fc1 is called ffn_down) or new.

    `without` is a tensor that it has not.
    """
    vision = reference.config.vision_config
    writer = gguf.GGUFWriter(path, "clip")
    metadata = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "projection_dim": 64,
        "block_count": layers,
        "attention.head_count": vision.num_attention_heads,
        "attention.layer_norm_epsilon": vision.layer_norm_eps,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.3, 0.25, 0.2],
        **extra,
    }
    keys = {"has_vision_encoder": True, "has_llava_projector": True, "use_gelu": False}
    _add_keys(writer, "clip.", {**keys, "projector_type": "mlp"})
    _add_keys(writer, "clip.vision.", metadata)
    inner = {
        "layer_norm1": "ln1",
        "layer_norm2": "ln2",
        "mlp.fc1": "ffn_down" if swapped else "ffn_up",
        "mlp.fc2": "ffn_up" if swapped else "ffn_down",
        "self_attn.out_proj": "attn_out",
        **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    }
    outer = {
        "embeddings.class_embedding": "v.class_embd",
        "embeddings.patch_embedding.weight": "v.patch_embd.weight",
        "embeddings.position_embedding.weight": "v.position_embd.weight",
        "pre_layrnorm.weight": "v.pre_ln.weight",
        "pre_layrnorm.bias": "v.pre_ln.bias",
        "multi_modal_projector.linear_1.weight": "mm.0.weight",
        "multi_modal_projector.linear_1.bias": "mm.0.bias",
        "multi_modal_projector.linear_2.weight": "mm.2.weight",
        "multi_modal_projector.linear_2.bias": "mm.2.bias",
        "image_newline": "model.image_newline",
    }
    for key, tensor in layouts.state_dict(reference).items():
        short = key.removeprefix("vision_tower.vision_model.")
        if short.startswith("encoder.layers."):
            _, _, layer, rest = short.split(".", 3)
            module, _, part = rest.rpartition(".")
            name = f"v.blk.{layer}.{inner[module]}.{part}" if int(layer) < layers else None
        else:
            name = outer.get(short)
        if name and name != without:
            writer.add_tensor(name, tensor.float().numpy())
    _close(writer)


def _add_keys(writer: gguf.GGUFWriter, prefix: str, keys: dict[str, Any]) -> None:
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        if value is not None:
            adders[type(value)](prefix + key, value)


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
