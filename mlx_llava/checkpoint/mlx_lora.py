"""LoRA folders as MLX's programs write them: mlx_llava.train, mlx-lm, and mlx-vlm.

mlx-lm 0.32, tuner/utils.py (load_adapters), and mlx-vlm 0.6, trainer/utils.py
(apply_lora_layers). O, I and R as in lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_llava.checkpoint.folder import read_file
from mlx_llava.checkpoint.lora import CONFIG, Lora, LowRank
from mlx_llava.checkpoint.names import canonical_name, canonical_tensors
from mlx_llava.checkpoint.tensors import LazyTensor

WEIGHTS = ("adapters.safetensors",)

#: A part of a LoRA layer: mlx-lm's names, and A and B as mlx-vlm wrote them until 0.5.
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|A|B|m)")


def read_mlx(path: Path, settings: Mapping[str, Any]) -> Lora:
    """Reads a LoRA folder of MLX's programs; whole tensors in it replace the base's.

    Args:
        path (Path): Its file of weights.
        settings (dict): Its adapter_config.json.
    """
    modules: dict[str, dict[str, LazyTensor]] = {}
    trained = {}
    for key, tensor in read_file(path)[0].items():
        if match := _PART.fullmatch(key):
            modules.setdefault(match["module"], {})[match["part"].lower()[-1]] = tensor
        else:
            trained[key] = tensor
    named = canonical_tensors(trained, is_mlx=True).tensors
    if not modules:
        return Lora({}, named)
    rank, scale, warnings = _strength(settings)
    changes = {}
    for module, parts in modules.items():
        name = canonical_name(f"{module}.weight")
        changes[name] = _change(name, parts, scale)
        changes[name].check(name, rank)
    return Lora(changes, named, warnings)


def _strength(settings: Mapping[str, Any]) -> tuple[int, float, list[str]]:
    said = settings.get("lora_parameters") or settings
    if "rank" not in said or not {"scale", "alpha"} & said.keys():
        raise ValueError(f"{CONFIG} names no rank and no scale (or alpha) of its LoRA layers.")
    rank, scale = said["rank"], said.get("scale")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{CONFIG} gives the LoRA layers the rank {rank!r}.")
    if scale is not None:
        return rank, float(scale), []
    scale = said["alpha"] / rank
    warning = (
        f"The adapter's scale is taken as alpha / rank = {scale:.6g}, as mlx-vlm does since 0.4.5; "
        f'if an older one trained it, write "scale": {said["alpha"]} into {CONFIG}.'
    )
    return rank, scale, [warning]


def _change(name: str, parts: Mapping[str, LazyTensor], scale: float) -> LowRank:
    """The change of one module: of x W.T by x a b, or of an embedding W by a b."""
    if not {"a", "b"} <= parts.keys():
        raise ValueError(f"The adapter has only {', '.join(parts)} of the two matrices of {name}.")
    a, b, magnitude = parts["a"], parts["b"], parts.get("m")
    if "embed" not in name.split(".")[-2]:
        a, b = b.then(lambda array: array.T), a.then(lambda array: array.T)
    if magnitude is not None:
        magnitude = magnitude.then(lambda m: m.reshape(-1, 1))
    return LowRank(a, b, scale, magnitude)
