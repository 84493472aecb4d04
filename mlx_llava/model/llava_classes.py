"""The classes of transformers that are LLaVAs, and what each has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mlx_llava.model.vision_config import CLIP_L_336, SIGLIP_SO400M

#: Averages of squares of the tower's features (LLaVA-NeXT-Video), or every grid of projected ones
#: scaled to half of its side, with one newline behind all (OneVision).
POOLINGS = AVERAGE, BILINEAR = "average", "bilinear"


@dataclass(frozen=True)
class LlavaClass:
    """A class of transformers.

    Attributes:
        name: how the names of its config, its model and its processors begin.
        defaults: what it has instead of `LlavaConfig`'s.
        fixed: what it has whatever config.json says, which it ignores.
        tower: its ``vision_config`` where there is none, and the kind of one that names none.
        decoder: the kind of a ``text_config`` that names none.
        pooling: how the features of a video's frames become fewer, one of `POOLINGS`; None where
            frames are images.
    """

    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tower: Mapping[str, Any] = field(default_factory=lambda: CLIP_L_336)
    decoder: str = "llama"
    pooling: str | None = None


_NO_NORM = {"projector_layernorm_eps": None}
#: By ``model_type``.
CLASSES: Mapping[str, LlavaClass] = {
    "llava": LlavaClass("Llava", fixed=_NO_NORM),
    "llava_next": LlavaClass("LlavaNext", fixed=_NO_NORM),
    "llava_next_video": LlavaClass(
        "LlavaNextVideo",
        {"image_token_index": 32001, "video_token_index": 32000},
        fixed=_NO_NORM,
        pooling=AVERAGE,
    ),
    "llava_onevision": LlavaClass(
        "LlavaOnevision",
        {
            "image_token_index": 151646,
            "video_token_index": 151647,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": tuple(product(range(384, 2305, 384), repeat=2)),
            "vision_aspect_ratio": "anyres_max_9",
        },
        fixed=_NO_NORM,
        tower=SIGLIP_SO400M,
        decoder="qwen2",
        pooling=BILINEAR,
    ),
    "vipllava": LlavaClass(
        "VipLlava",
        {"vision_feature_layer": (-2, -5, -8, -11, 6), "projector_layernorm_eps": 1e-5},
        fixed={"vision_feature_select_strategy": "default", "multimodal_projector_bias": True},
    ),
}
