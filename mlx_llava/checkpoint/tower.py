"""The vision tower of an original LLaVA: inside its checkpoint, or in a repository of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_llava.checkpoint.folder import read_folder
from mlx_llava.checkpoint.hub import Source
from mlx_llava.checkpoint.tensors import PATCH_EMBEDDING, TOWER, LazyTensor, canonical_tensors
from mlx_llava.json_files import read_json
from mlx_llava.model.vision_config import CLIP, SIGLIP, VisionConfig

#: CLIPs that are not OpenAI's, most of which have an exact GELU.
_OTHER_TOWERS = re.compile(r"laion|datacomp|dfn|\beva")
#: What a tower's shapes do not say.
_HABITS = {
    CLIP: ("num_attention_heads", "model_type"),
    SIGLIP: ("num_attention_heads", "model_type", "image_size", "num_hidden_layers"),
}
#: The name that ViP-LLaVA's files have for a tower of which five layers are read, and whose it is.
VIP_TOWER, _VIP_CLIP = "clip_4layers_336", "openai/clip-vit-large-patch14-336"
#: How many layers Google's SigLIPs have, by width.
_SIGLIP_DEPTHS = {768: 12, 1024: 24, 1152: 27}


@dataclass
class Tower:
    """What was found of a tower."""

    settings: dict[str, Any]  # its vision_config
    warnings: list[str] = field(default_factory=list)
    folder: Path | None = None  # its repository, if one was read
    dropped: dict[str, str] = field(default_factory=dict)  # tensors: source -> reason

    @property
    def is_siglip(self) -> bool:
        """Whether it is SigLIP's, not CLIP's."""
        return self.settings.get("model_type") == SIGLIP


def read_tower(weights: dict[str, LazyTensor], data: Mapping[str, Any], source: Source) -> Tower:
    """Adds a tower to a checkpoint's tensors where none, which may be tuned, is inside."""
    tower = _find(weights, data, source)
    if tower.is_siglip:
        _drop_last_layer(weights, tower)
    return tower


def _drop_last_layer(weights: dict[str, LazyTensor], tower: Tower) -> None:
    """What the original does with SigLIP's before it trains and saves it (siglip_encoder.py)."""
    depth = tower.settings.get("num_hidden_layers", VisionConfig.num_hidden_layers)
    tower.settings["num_hidden_layers"] = depth - 1
    last = f"{TOWER}encoder.layers.{depth - 1}."
    for name in [name for name in weights if name.startswith(last)]:
        tower.dropped[weights.pop(name).source] = "SigLIP's last layer, which LLaVA does not read"


def _find(weights: dict[str, LazyTensor], data: Mapping[str, Any], source: Source) -> Tower:
    """The tower before its last layer is dropped, which may be done already."""
    named = str(data.get("mm_vision_tower"))
    inside = {name: tensor for name, tensor in weights.items() if name.startswith(TOWER)}
    if inside and source.vision_tower is None:
        vision = _from_shapes(inside)
        doubt = (
            f"The vision tower inside was {named}, but is read as OpenAI's CLIP "
            f"({vision['num_attention_heads']} heads, quick_gelu); if it is another, give the "
            "repository that it came from with --vision-tower."
        )
        return Tower(vision, [doubt] if _OTHER_TOWERS.search(named.lower()) else [])
    folder = _find_folder(source.vision_tower or data.get("mm_vision_tower"), source)
    settings = read_json(folder / "config.json")
    if inside:  # a repository of its kind says what its shapes do not
        vision = _from_shapes(inside)
        told = tower_settings(settings)
        if told.get("hidden_size", VisionConfig.hidden_size) == vision["hidden_size"]:
            habits = _HABITS[vision["model_type"]]
            vision = {**told, **{k: value for k, value in vision.items() if k not in habits}}
        unused = f"The checkpoint has a vision tower inside; the weights of {folder} are not used."
        return Tower(vision, [unused], folder)
    found = canonical_tensors(*read_folder(folder)).tensors
    tower = {name: tensor for name, tensor in found.items() if name.startswith(TOWER)}
    if not tower:
        raise ValueError(f"{folder} has no CLIP or SigLIP vision tower.")
    weights |= tower
    return Tower(tower_settings(settings) if settings else _from_shapes(tower), folder=folder)


def _find_folder(where: str | Path | None, source: Source) -> Path:
    if not where:
        raise ValueError("The checkpoint has no vision tower inside and names none: --vision-tower")
    where = _VIP_CLIP if where == VIP_TOWER else where
    try:
        return source.find(where)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The vision tower {where} is needed; give it with --vision-tower. {error}"
        ) from error


def tower_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """The ``vision_config`` of a tower's own config.json: of a whole CLIP or SigLIP, or of half.

    As in CLIPConfig, ``vision_config_dict`` wins.
    """
    parts = (data.get("vision_config") or {}, data.get("vision_config_dict") or {})
    vision = {**parts[0], **parts[1]} or dict(data)
    if vision.get("model_type") in (None, "", "clip", "siglip"):
        vision["model_type"] = SIGLIP if data.get("model_type") == "siglip" else CLIP
    return vision


def _from_shapes(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """The ``vision_config`` of a tower without one, from its shapes and its makers' habits."""
    has_class_token = f"{TOWER}embeddings.class_embedding" in tensors
    positions, width = tensors[f"{TOWER}embeddings.position_embedding.weight"].shape
    patch = tensors[PATCH_EMBEDDING].shape[1]
    depth = len({n.split(".")[4] for n in tensors if ".encoder.layers." in n})
    side = patch * math.isqrt(positions - has_class_token)
    return {
        "model_type": CLIP if has_class_token else SIGLIP,
        "hidden_size": width,
        "intermediate_size": tensors[f"{TOWER}encoder.layers.0.mlp.fc1.bias"].shape[0],
        "num_hidden_layers": depth if has_class_token else _SIGLIP_DEPTHS.get(width, depth + 1),
        # All of OpenAI's and Google's have heads of 64 but for so400m, whose 27 patches of 14
        # pixels are a row of 384.
        "num_attention_heads": width // (72 if width == 1152 else 64),
        "patch_size": patch,
        "image_size": 384 if side == 378 and not has_class_token else side,
    }
