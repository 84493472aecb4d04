"""What a checkpoint's config.json says, under Hugging Face's names.

A config holds only what differs from the defaults of its class, so the defaults here are
those of transformers' LlavaConfig (vision_config.py and text_config.py for its parts). A key
that changes the maths is read or refused by name (known_keys.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mlx_llava.model.config_checks import Section, names_of
from mlx_llava.model.config_values import read_ends, read_pinpoints, read_placeholders
from mlx_llava.model.known_keys import CHANGES
from mlx_llava.model.llava_classes import AVERAGE, BILINEAR, CLASSES, POOLINGS
from mlx_llava.model.text_config import TextConfig, unknown_text_keys
from mlx_llava.model.vision_config import ACTIVATIONS, VISION, VisionConfig

#: Keys that transformers does not know; written only where they say something.
_EXTENSIONS = frozenset(
    """
    anyres_convention mm_projector_type mm_patch_merge_type mm_use_im_start_end conv_mode
    quantization projector_layernorm_eps vision_aspect_ratio video_token_index spatial_pool_mode
    spatial_pool_stride mm_spatial_pool_mode mm_newline_position
    """.split()
)
#: Of how it reads videos.
_OF_ONEVISION = ("mm_spatial_pool_mode", "mm_newline_position")
_ANYRES_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class LlavaConfig:
    """A whole LLaVA (transformers' LlavaConfig, and those of its `CLASSES`).

    Attributes:
        vision_feature_layer: which of the tower's hidden states is read; 0 is the embedding.
            A list is concatenated along the width.
        vision_feature_select_strategy: ``default`` drops the first token, which is CLIP's class
            token; ``full`` keeps all.
        image_grid_pinpoints: (height, width) of the canvases that anyres chooses from.
        video_token_index: the placeholder of videos, where frames are no images.
        spatial_pool_stride: of LLaVA-NeXT-Video's averages.
        mm_spatial_pool_mode: how OneVision halves the sides of a frame's grid; LLaVA-Video takes
            ``average`` or ``max``.
        mm_newline_position: where its newlines stand in a video: ``one_token`` behind all, behind
            every ``frame``, behind every row (``grid``), or ``no_token``.
        vision_aspect_ratio: OneVision's ``anyres_max_N``, see `max_tiles`.
        anyres_convention: whose rounding anyres follows, ``hf`` or ``original`` (anyres.py).
        projector_layernorm_eps: of ViP-LLaVA's layer norm before the projector; None is none.
        mm_projector_type: ``mlpNx_gelu`` (N layers), ``linear`` or ``identity``.
        mm_patch_merge_type: how anyres tiles become a sequence, ``spatial_unpad`` (LLaVA 1.6),
            ``spatial`` or ``flat``.
        mm_use_im_start_end: LLaVA v0 wraps each image in ``<im_start>`` and ``<im_end>``.
        conv_mode: the built-in template, where the checkpoint has none of its own.
        eos_token_id: every id that ends an answer according to this file.
        quantization: MLX's quantisation: bits, group_size, mode, and settings per path.
    """

    vision_config: VisionConfig
    text_config: TextConfig
    model_type: str = "llava"
    image_token_index: int = 32000
    video_token_index: int | None = None
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    projector_layernorm_eps: float | None = None
    vision_feature_layer: int | tuple[int, ...] = -2
    vision_feature_select_strategy: str = "default"
    image_grid_pinpoints: tuple[tuple[int, int], ...] = _ANYRES_PINPOINTS
    spatial_pool_mode: str = AVERAGE
    spatial_pool_stride: int = 2
    mm_spatial_pool_mode: str = BILINEAR
    mm_newline_position: str = "one_token"
    vision_aspect_ratio: str | None = None
    anyres_convention: str = "hf"
    mm_projector_type: str = "mlp2x_gelu"
    mm_patch_merge_type: str = "spatial_unpad"
    mm_use_im_start_end: bool = False
    conv_mode: str | None = None
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = ()
    quantization: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LlavaConfig:
        """Reads the content of a llava-hf config.json.

        Raises:
            ValueError: The config names a model, a value or a key that is not supported.
        """
        data = _read_vip({**data, "model_type": str(data.get("model_type"))})
        if data["model_type"] != "llava_onevision":  # to others they mean nothing
            data = {key: value for key, value in data.items() if key not in _OF_ONEVISION}
        _TOP.check(data)
        kind = CLASSES[data["model_type"]]
        given = {key: value for key, value in data.items() if value is not None}
        data = {**kind.defaults, **given, **read_placeholders(given), **kind.fixed}
        ends = data.get("eos_token_id")
        if ends is None:
            ends = (data.get("text_config") or {}).get("eos_token_id")
        vision = VisionConfig.from_dict(_part(data.get("vision_config"), kind.tower))
        text = TextConfig.from_dict(_part(data.get("text_config"), {"model_type": kind.decoder}))
        layers = data.get("vision_feature_layer")
        pinpoints = data.get("image_grid_pinpoints") or cls.image_grid_pinpoints
        data |= {
            "eos_token_id": read_ends(ends, _TOP.where),
            "vision_config": vision,
            "text_config": text,
            "quantization": _mlx_quantization(data),
            "vision_feature_layer": tuple(layers) if isinstance(layers, list) else layers,
            "image_grid_pinpoints": read_pinpoints(pinpoints, vision.image_size),
            "tie_word_embeddings": text.tie_word_embeddings or data.get("tie_word_embeddings"),
        }
        config = _TOP.read(cls, data)
        if config.is_anyres and config.tokens_per_tile != vision.patches_per_side**2:
            expected = f"{'default' if vision.has_class_token else 'full'} with {config.model_type}"
            how = config.vision_feature_select_strategy
            _TOP.refuse("vision_feature_select_strategy", how, expected)
        if config.is_anyres and data.get("use_image_newline_parameter", True) is not True:
            _TOP.refuse("use_image_newline_parameter", False, "True")
        # These may refuse their keys.
        _ = config.projector_layers, config.feature_layers, config.max_tiles
        return config

    @property
    def is_anyres(self) -> bool:
        """Whether images are cut into tiles (LLaVA 1.6, OneVision)."""
        return self.model_type in ("llava_next", "llava_next_video", "llava_onevision")

    @property
    def pooling(self) -> str | None:
        """How the features of a video's frames become fewer; None where frames are images."""
        return CLASSES[self.model_type].pooling

    @property
    def frame_side(self) -> int:
        """The side of the grid of a frame's features when they are pooled."""
        side = self.vision_config.patches_per_side
        if self.pooling == AVERAGE:
            return side // self.spatial_pool_stride
        return (side + (self.mm_spatial_pool_mode == BILINEAR)) // 2

    @property
    def pads_several(self) -> bool:
        """Whether several images of one prompt are padded to a tile each (OneVision)."""
        return self.model_type == "llava_onevision"

    @property
    def max_tiles(self) -> int | None:
        """How many tiles' features an image may have about, before they are scaled down."""
        if self.vision_aspect_ratio is None:
            return None
        match = re.fullmatch(r"anyres_max_([1-9]\d*)", self.vision_aspect_ratio)
        if not match or not self.pads_several:
            expected = "'anyres_max_N' with llava_onevision"
            _TOP.refuse("vision_aspect_ratio", self.vision_aspect_ratio, expected)
        return int(match[1])

    @property
    def class_name(self) -> str:
        """How the names of transformers' classes for this model begin."""
        return CLASSES[self.model_type].name

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The hidden states that are read, counted from the embedding = 0."""
        layers = self.vision_feature_layer
        states = self.vision_config.num_hidden_layers + 1
        chosen = (layers,) if isinstance(layers, int) else layers
        if not chosen or any(layer not in range(-states, states) for layer in chosen):
            expected = f"indices from {-states} to {states - 1}"
            _TOP.refuse("vision_feature_layer", layers, expected)
        return tuple(layer % states for layer in chosen)

    @property
    def projector_layers(self) -> int:
        """How many linear layers the projector has, activations between them."""
        return projector_layers(self.mm_projector_type)

    @property
    def drops_first(self) -> bool:
        """Whether the first of a tower's tokens, which is CLIP's class token, is left out."""
        return self.vision_feature_select_strategy == "default"

    @property
    def has_newline(self) -> bool:
        """Whether every row of an anyres grid ends with a learned feature."""
        return self.is_anyres and self.mm_patch_merge_type == "spatial_unpad"

    @property
    def tokens_per_tile(self) -> int:
        """How many positions one tile (or one LLaVA 1.5 image) takes in the prompt."""
        return self.vision_config.num_positions - self.drops_first

    def are_placeholders(self, ids: Any) -> Any:
        """Where ids, as an array of any kind, are those of images or videos."""
        found = ids == self.image_token_index
        if self.video_token_index is None:
            return found
        return found | (ids == self.video_token_index)

    def to_dict(self) -> dict[str, Any]:
        """The config.json that says the same, with every value spelled out."""
        data: dict[str, Any] = {key: value for key, value in asdict(self).items() if value != ()}
        if self.vision_config.is_siglip:
            data["vision_config"]["vision_use_head"] = False  # transformers would want its weights
        for key in ("use_sliding_window", "layer_types"):
            if not data["text_config"][key]:
                del data["text_config"][key]
        data["architectures"] = [f"{self.class_name}ForConditionalGeneration"]
        for part in fields(self):
            if part.name in _EXTENSIONS and getattr(self, part.name) == part.default:
                del data[part.name]
        if not self.is_anyres:
            del data["image_grid_pinpoints"]
        return data


_TOP = Section(
    "config.json",
    names_of(LlavaConfig)
    | {"image_token_id", "video_token_id", "quantization_config", "use_image_newline_parameter"},
    CHANGES,
    {
        "model_type": tuple(CLASSES),
        "projector_hidden_act": ACTIVATIONS,
        "vision_feature_select_strategy": ("default", "full"),
        "mm_patch_merge_type": ("spatial_unpad", "spatial", "flat"),
        "anyres_convention": ("hf", "original"),
        "spatial_pool_mode": (AVERAGE,),
        "mm_spatial_pool_mode": (*POOLINGS, "max"),
        "mm_newline_position": ("one_token", "frame", "grid", "no_token"),
    },
)


def unknown_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a llava-hf config.json says and nobody here understands, by ``section.key``.

    It could change the maths, but then it would need other tensors or be a key that is known.
    """
    text, vision = data.get("text_config") or {}, data.get("vision_config") or {}
    return {
        **_TOP.unknown(data),
        **unknown_text_keys(text),
        **VISION.unknown(vision, "vision_config."),
    }


def projector_layers(kind: str) -> int:
    """How many linear layers ``mm_projector_type`` names; raises ValueError for others."""
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if not match or not 0 < int(match[1]) <= 8:
        _TOP.refuse("mm_projector_type", kind, "'linear', 'identity' and 'mlpNx_gelu'")
    return int(match[1])


def _read_vip(data: dict[str, Any]) -> dict[str, Any]:
    """The layers of a ViP-LLaVA under the key that LLaVA's have.

    Version 4 of transformers wrote and read ``vision_feature_layers``; what the other key says in
    its files (llava-hf/vip-llava-7b-hf: -2) it did not read.
    """
    if data["model_type"] != "vipllava":
        return data
    layers = data.pop("vision_feature_layers", None)
    if layers is not None or str(data.get("transformers_version")).startswith("4."):
        data["vision_feature_layer"] = layers
    return data


def _part(given: Mapping[str, Any] | None, default: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of config.json: all of the default, or what is given and the default's kind."""
    return default if given is None else {"model_type": default["model_type"], **given}


def _mlx_quantization(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """MLX's ``quantization``; another library's ``quantization_config`` is refused."""
    found = data.get("quantization") or data.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, Mapping):
        _TOP.refuse("quantization", found, "an object")
    if "quant_method" in found or "bits" not in found:
        method = found.get("quant_method", "unknown")
        raise ValueError(f"The checkpoint is quantised with {method!r}, which is not MLX's own.")
    return dict(found)
