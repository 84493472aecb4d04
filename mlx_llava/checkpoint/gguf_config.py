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
    (0, 1): "embedding_scale logit_scale residual_scale rope.scaling.alpha",
}
#: Tensors of factors for all prompts, or for short and for long ones.
_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


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
    kind = value(text, "general.architecture")
    for neutral, keys in _NEUTRAL.items():
        for key in keys.split():
            if (found := value(text, f"{kind}.{key}", 0)) not in neutral:
                raise ValueError(f"{kind}.{key}={found!r} is not supported.")
    names = {tensor.name for tensor in text.tensors}
    heads = number(text, f"{kind}.attention.head_count")
    width = number(text, f"{kind}.embedding_length")
    head_dim = number(text, f"{kind}.attention.key_length", width // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if (found := number(text, f"{kind}.{key}", head_dim)) != head_dim:
            raise ValueError(f"{kind}.{key}={found} is not supported, only the heads' {head_dim}.")
    context = number(text, f"{kind}.context_length")
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": number(text, f"{kind}.feed_forward_length"),
        "num_hidden_layers": number(text, f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number(text, f"{kind}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "original_max_position_embeddings": number(
            text, f"{kind}.rope.scaling.original_context_length", context
        ),
        "rms_norm_eps": number(text, f"{kind}.attention.layer_norm_rms_epsilon"),
        "rope_theta": number(text, f"{kind}.rope.freq_base", 10000.0),
        "rope_scaling": _read_rope_scaling(text, kind),
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        **({"sliding_window": _window(text)} if kind == "phi3" else {}),
    }


def _window(text: GGUFReader) -> int | None:
    """Phi-3's; llama.cpp's converter writes 0 where there is none."""
    return value(text, "phi3.attention.sliding_window") or None


def _read_rope_scaling(text: GGUFReader, kind: str) -> dict[str, Any] | None:
    """How positions are stretched: all alike, or each frequency by a factor of its own.

    Factors, which Llama 3.1 and Phi-3 have, stand in tensors. transformers says them as
    ``longrope``, Llama 3.1's as the same for short and long prompts.
    """
    scaling = value(text, f"{kind}.rope.scaling.type", "linear")
    if scaling not in ("linear", "longrope", "none"):
        raise ValueError(f"{kind}.rope.scaling.type={scaling!r} is not supported.")
    old = value(text, f"{kind}.rope.scale_linear")
    is_linear = scaling == "linear"
    factor = value(text, f"{kind}.rope.scaling.factor", old) or 1.0 if is_linear else 1.0
    found = {
        tensor.name: (np.asarray(tensor.data, np.float32) * np.float32(factor)).tolist()
        for tensor in text.tensors
        if tensor.name in _FACTORS
    }
    attention = value(text, f"{kind}.rope.scaling.attn_factor") or 1.0
    if not found:
        if attention != 1:
            raise ValueError(f"{kind}.rope.scaling.attn_factor={attention!r} is not supported.")
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    all_alike, short, long = (found.get(name) for name in _FACTORS)
    return {
        "rope_type": "longrope",
        "short_factor": all_alike or short,
        "long_factor": all_alike or long,
        "attention_factor": attention,
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
