"""What the metadata of a GGUF pair say, as llava-hf's settings files say it.

Keys and their defaults: llama.cpp, src/llama-model.cpp (load_hparams), src/llama-vocab.cpp and
tools/mtmd/clip.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_llava.inputs.tokenizer import IMAGE_TOKEN
from mlx_llava.inputs.vocabulary import (
    NORMAL,
    Piece,
    begins_with_bos,
    spec_from_byte_bpe,
    spec_from_pieces,
)

if TYPE_CHECKING:
    from gguf import GGUFReader

_LLAMA_3_BEGIN = "<|begin_of_text|>"
#: Values with which keys that change the maths do not.
_NEUTRAL = {
    (0,): "attention.clamp_kqv attention.max_alibi_bias attention.scale attn_logit_softcapping "
    "expert_count final_logit_softcapping nextn_predict_layers",
    (0, 1): "embedding_scale logit_scale residual_scale rope.scaling.alpha "
    "rope.scaling.attn_factor",
}


def value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """What a file says under a key."""
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def number(reader: GGUFReader, key: str, default: float | None = None) -> Any:
    """The positive number under a key."""
    found = value(reader, key, default)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not found > 0:
        said = "missing" if found is None else f"{found!r}"
        raise ValueError(f"{key} of the GGUF is {said}; expected a positive number.")
    return found


def read_config(text: GGUFReader, vision: GGUFReader) -> dict[str, Any]:
    """A llava-hf config.json from both files' metadata."""
    if value(vision, "clip.use_silu"):
        raise ValueError("The tower's activation is SiLU, expected CLIP's GELU.")
    pairs = value(vision, "clip.vision.image_grid_pinpoints")
    layers = number(vision, "clip.vision.block_count")
    rows = next((int(t.shape[1]) for t in text.tensors if t.name == "token_embd.weight"), None)
    if rows is None:
        raise ValueError("The GGUF has no token_embd.weight.")
    tokens = value(text, "tokenizer.ggml.tokens") or []
    if len(tokens) > rows:
        raise ValueError(f"The GGUF has {len(tokens)} tokens but embeddings of {rows} only.")
    is_linear = any(tensor.name == "mm.weight" for tensor in vision.tensors)
    config: dict[str, Any] = {
        "_name_or_path": value(text, "general.name", ""),
        "model_type": "llava" if pairs is None else "llava_next",
        "text_config": {"vocab_size": rows, **_read_text(text)},
        "vision_config": _read_vision(vision),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in text.tensors),
        # Most vocabularies have no placeholder; then it is an id that no row belongs to.
        "image_token_index": tokens.index(IMAGE_TOKEN) if IMAGE_TOKEN in tokens else rows,
        # Legacy files dropped the last of CLIP-L's 24 layers: what is stored is all run.
        "vision_feature_layer": value(vision, "clip.vision.feature_layer")
        or (-2 if layers == 24 else -1),
        "mm_projector_type": "linear" if is_linear else "mlp2x_gelu",
        "anyres_convention": "original",
    }
    if pairs is not None:
        config["image_grid_pinpoints"] = list(zip(pairs[::2], pairs[1::2], strict=True))
        merge = value(vision, "clip.vision.mm_patch_merge_type", "spatial_unpad")
        config["mm_patch_merge_type"] = merge
    return config


def _read_text(text: GGUFReader) -> dict[str, Any]:
    for neutral, keys in _NEUTRAL.items():
        for key in keys.split():
            if (found := value(text, f"llama.{key}", 0)) not in neutral:
                raise ValueError(f"llama.{key}={found!r} is not supported.")
    names = {tensor.name for tensor in text.tensors}
    heads = number(text, "llama.attention.head_count")
    width = number(text, "llama.embedding_length")
    head_dim = number(text, "llama.attention.key_length", width // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if (found := number(text, f"llama.{key}", head_dim)) != head_dim:
            raise ValueError(f"llama.{key}={found} is not supported, only the heads' {head_dim}.")
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": number(text, "llama.feed_forward_length"),
        "num_hidden_layers": number(text, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number(text, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": number(text, "llama.context_length"),
        "rms_norm_eps": number(text, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": number(text, "llama.rope.freq_base", 10000.0),
        "rope_scaling": _read_rope_scaling(text),
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }


def _read_rope_scaling(text: GGUFReader) -> dict[str, Any] | None:
    """How positions are stretched: all alike, or each frequency by a factor of its own.

    Factors, which Llama 3.1 has, stand in a tensor. transformers says such a list as ``longrope``
    with the same list for short and long prompts.
    """
    kind = value(text, "llama.rope.scaling.type", "linear")
    if kind not in ("linear", "none"):
        raise ValueError(f"llama.rope.scaling.type={kind!r} is not supported.")
    old = value(text, "llama.rope.scale_linear")
    factor = value(text, "llama.rope.scaling.factor", old) or 1.0 if kind == "linear" else 1.0
    tensor = next((t for t in text.tensors if t.name == "rope_freqs.weight"), None)
    if tensor is None:
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    factors = (np.asarray(tensor.data, np.float32) * np.float32(factor)).tolist()
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": number(text, "llama.context_length"),
    }


def _read_vision(vision: GGUFReader) -> dict[str, Any]:
    sizes = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "layer_norm_eps": "attention.layer_norm_epsilon",
    }
    config = {name: number(vision, f"clip.vision.{key}") for name, key in sizes.items()}
    return {**config, "hidden_act": "gelu" if value(vision, "clip.use_gelu") else "quick_gelu"}


def read_tokenizer(text: GGUFReader) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """tokenizer.json and tokenizer_config.json from the metadata, and warnings."""

    def ggml(key: str, default: Any = None) -> Any:
        return value(text, f"tokenizer.ggml.{key}", default)

    tokens, kind = ggml("tokens"), ggml("model")
    if not tokens:
        raise ValueError("The GGUF has no vocabulary (tokenizer.ggml.tokens).")
    pre, warnings = ggml("pre"), []
    if pre is None and _LLAMA_3_BEGIN in tokens:  # from before the key was invented
        pre = "llama-bpe"
    elif pre is None and kind == "gpt2":
        warnings.append(
            "The GGUF does not say how text is cut into words (tokenizer.ggml.pre); llama.cpp's "
            "default is used, which may not be what the model has learnt with."
        )
    pre = pre or "default"
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # as llama.cpp
    scores = ggml("scores") or [0.0] * len(tokens)
    kinds = ggml("token_type") or [NORMAL] * len(tokens)
    if not len(tokens) == len(scores) == len(kinds):
        counts = f"{len(tokens)} tokens, {len(scores)} scores and {len(kinds)} types"
        raise ValueError(f"The vocabulary of the GGUF has {counts}; expected as many of each.")
    pieces = [Piece(*entry) for entry in zip(tokens, scores, kinds, strict=True)]
    if kind == "llama":
        spec = spec_from_pieces(pieces, {}, ggml("add_space_prefix", True))
    elif kind == "gpt2":
        spec = spec_from_byte_bpe(pieces, ggml("merges") or [], pre)
    else:
        raise ValueError(f"tokenizer.ggml.model={kind!r} is not supported.")
    begins = kind == "llama" or begins_with_bos(pre)
    config: dict[str, Any] = {"add_bos_token": bool(ggml("add_bos_token", begins))}
    for name, default in (("bos", 1), ("eos", 2)):
        i = ggml(f"{name}_token_id", default if kind == "llama" else None)
        if i in range(len(tokens)):
            config[f"{name}_token"] = tokens[i]
    if template := value(text, "tokenizer.chat_template"):
        config["chat_template"] = template
    return spec, config, warnings
