"""The vision tower's part of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_llava.model.config_checks import Section, names_of
from mlx_llava.model.known_keys import VISION_CHANGES

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
#: The names of what layers.py has.
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
#: The towers of transformers' classes where config.json has no vision_config: LLaVA's and
#: OneVision's, which lacks the last of SigLIP's layers.
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
}
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
}
#: What the defaults of a tower's class are instead of `VisionConfig`'s.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    CLIP: {},
    SIGLIP: {
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (transformers' CLIPVisionConfig or SiglipVisionConfig); sizes in pixels."""

    model_type: str = CLIP
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VisionConfig:
        """Reads ``vision_config``, filled with the defaults of its own class."""
        VISION.check(data)
        given = {key: value for key, value in data.items() if value is not None}
        config = VISION.read(cls, {**_DEFAULTS[given.get("model_type", cls.model_type)], **given})
        if config.hidden_size % (heads := config.num_attention_heads):
            expected = f"multiples of {heads} heads"
            VISION.refuse("hidden_size", config.hidden_size, expected)
        if config.patch_size > config.image_size:
            expected = f"1 to image_size={config.image_size}"
            VISION.refuse("patch_size", config.patch_size, expected)
        return config

    @property
    def is_siglip(self) -> bool:
        """Whether it is SigLIP's, not CLIP's."""
        return self.model_type == SIGLIP

    @property
    def has_class_token(self) -> bool:
        """Whether a token that stands for no patch comes before them."""
        return not self.is_siglip

    @property
    def patches_per_side(self) -> int:
        """The side of the square patch grid of one tile."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """How many tokens the tower makes of one tile."""
        return self.patches_per_side**2 + self.has_class_token


VISION = Section(
    "vision_config",
    names_of(VisionConfig),
    VISION_CHANGES,
    {"model_type": tuple(_DEFAULTS), "num_channels": (3,), "hidden_act": ACTIVATIONS},
)
