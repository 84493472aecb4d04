"""What ``text_config`` says of the decoder, with the defaults of its own class in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_llava.model.config_checks import Section, names_of
from mlx_llava.model.known_keys import TEXT_CHANGES
from mlx_llava.model.rope_config import check_factors, context_of, read_rope, unknown_rope_keys

#: Kinds of layers: with a window and without.
_KINDS = _SLIDING, _FULL = "sliding_attention", "full_attention"
#: What Qwen2 alone says of them.
_OF_WINDOWS = ("use_sliding_window", "layer_types")


@dataclass(frozen=True)
class _Family:
    """A class of decoders.

    Attributes:
        defaults: what its class has instead of `TextConfig`'s.
        fixed: what it has whatever config.json says, which its class ignores.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


#: By ``model_type``. Phi-3 is Mistral, once its fused layers are split (checkpoint/fused.py).
_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(fixed={"sliding_window": None}),
    "mistral": _Family(
        {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096 * 32,
            "sliding_window": 4096,
        }
    ),
    "qwen2": _Family(
        {
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
        },
        fixed={"attention_bias": True, "mlp_bias": False},
    ),
    "phi3": _Family(
        {
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        fixed={"model_type": "mistral"},
    ),
}


@dataclass(frozen=True)
class TextConfig:
    """The decoder (transformers' LlamaConfig, MistralConfig, Qwen2Config or Phi3Config).

    Attributes:
        sliding_window: how far layers with a window look back; None for all.
        layer_types: which of Qwen2's have one; () is all.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False
    layer_types: tuple[str, ...] = ()
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> TextConfig:
        """Reads ``text_config``, filled with the defaults of its own model family."""
        data = data or {}
        without = {key: value for key, value in data.items() if key not in _OF_WINDOWS}
        is_qwen2 = data.get("model_type") == "qwen2"
        _TEXT.check(without if is_qwen2 else data)
        data = {**without, **(_read_windows(data) if is_qwen2 else {})}
        family = _FAMILIES[data.get("model_type") or cls.model_type]
        data = {**family.defaults, **data, **family.fixed}
        config = _TEXT.read(cls, {**data, **read_rope(data)})
        config = replace(config, num_key_value_heads=config.kv_heads, head_dim=config.dims_per_head)
        check_factors(config.rope_scaling, config.dims_per_head)
        if config.num_attention_heads % config.kv_heads:
            expected = f"divisors of num_attention_heads={config.num_attention_heads}"
            _TEXT.refuse("num_key_value_heads", config.kv_heads, expected)
        return config

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def dims_per_head(self) -> int:
        """The width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def output_bias(self) -> bool:
        """Whether attention's last layer has a bias as the first have: LLaMA's, not Qwen2's."""
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far each layer looks back; None for all."""
        kinds = self.layer_types or (_SLIDING,) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == _SLIDING else None for kind in kinds)

    @property
    def attention_factor(self) -> float:
        """What LongRoPE multiplies rotated queries and keys with."""
        return float((self.rope_scaling or {}).get("attention_factor", 1))

    @property
    def context_length(self) -> int:
        """How many positions the decoder can tell apart."""
        return context_of(self.rope_scaling, self.max_position_embeddings)


def _read_windows(data: Mapping[str, Any]) -> dict[str, Any]:
    """What Qwen2 says of a window, which its first layers have not (transformers' Qwen2Config)."""
    window = data.get("sliding_window", 4096) if data.get("use_sliding_window") else None
    layers = data.get("num_hidden_layers") or TextConfig.num_hidden_layers
    first = data.get("max_window_layers", 28)
    kinds = data.get("layer_types") or [_FULL if i < first else _SLIDING for i in range(layers)]
    if len(kinds) != layers or not {*kinds} <= {*_KINDS}:
        _TEXT.refuse("layer_types", kinds, f"{layers} of {_SLIDING!r} and {_FULL!r}")
    if window is not None:
        used = {"use_sliding_window": True, "layer_types": tuple(kinds)}
        return {"sliding_window": window, **used}
    if data.get("layer_types") and _SLIDING in kinds:
        _TEXT.refuse("layer_types", kinds, f"{_FULL!r} alone without use_sliding_window")
    return {"sliding_window": None}


_TEXT = Section(
    "text_config",
    names_of(TextConfig).difference(_OF_WINDOWS)
    | {"original_max_position_embeddings", "rope_parameters"},
    TEXT_CHANGES,
    {"model_type": tuple(_FAMILIES), "hidden_act": ("silu", "swish")},
)


def unknown_text_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """What ``text_config`` says and nobody here understands, by ``section.key``."""
    return {**_TEXT.unknown(data, "text_config."), **unknown_rope_keys(data)}
