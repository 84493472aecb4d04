"""LoRA folders, stand-alone projectors, and the sum of these and the weights of a base.

LoRA: Hu et al. 2021 (arXiv:2106.09685); DoRA: Liu et al. 2024 (arXiv:2402.09353). Folders are
PEFT's (huggingface/peft 0.21, tuners/lora/config.py and layer.py), LLaVA's that have PEFT's in
them, or MLX's: ours, mlx-lm's (0.32, tuner/utils.py, load_adapters) and mlx-vlm's (0.6,
trainer/utils.py, apply_lora_layers). Which layers are changed, their tensors tell:
``target_modules``, ``layers_to_transform`` and the like chose them, once. A weight is (O, I),
outputs and inputs, or words and width in an embedding; R is the rank of its change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_llava.checkpoint.folder import read_file, visible_files
from mlx_llava.checkpoint.tensors import (
    PROJECTOR,
    LazyTensor,
    canonical_name,
    canonical_tensors,
    combine,
    plain_layer,
)
from mlx_llava.json_files import read_json, sensible_values
from mlx_llava.model.llava import Llava
from mlx_llava.model.lora import LoRALinear
from mlx_llava.model.quantized import plain_weight

CONFIG = "adapter_config.json"
MLX_WEIGHTS = "adapters.safetensors"
PROJECTOR_FILE = "mm_projector.bin"
#: What LLaVA's own training saves beside PEFT's file: the projector, and a tuned tower.
_TRAINED = "non_lora_trainables.bin"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", MLX_WEIGHTS)
#: Files of whole models.
_MODELS = ("*.safetensors", "pytorch_model*.bin")
_EMBEDDING = "language_model.model.embed_tokens.weight"
_BLOCKS = "language_model.model.layers."

#: A part of PEFT's LoRA layer; the adapter's name ("default") may stand behind it.
_PEFT_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>embedding_A|embedding_B|A|B|magnitude_vector)"
    r"(\.(?!bias$|weight$)[^.]+)?(\.weight)?"
)
#: A part of MLX's: mlx-lm's names, and A and B as mlx-vlm wrote them until 0.5.
_MLX_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|A|B|m)")
_PEFT_PREFIX = "base_model.model."
#: Wrappers of PEFT's around what is trained in full, or around what LoRA is on.
_WRAPPERS = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
#: A decoder that PEFT was put on alone.
_BARE_DECODER = re.compile(r"^(?=layers\.|embed_tokens\.|norm\.)")

#: Settings of PEFT's that change the maths and are not read.
_REFUSED = (
    *("alora_invocation_string", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("layer_replication", "lora_bias", "monteclora_config", "target_parameters"),
    *("trainable_token_indices", "use_bdlora", "use_mora", "use_qalora"),
)
#: Ways to begin that leave the base as it is; others (pissa, olora, corda, loftq) change it.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
#: Settings that are read, and those that say nothing about what was learned.
_READ = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying
    eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern
    layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_config
    megatron_core modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules task_type use_dora use_rslora velora_config
    """.split()
)


@dataclass(frozen=True)
class LowRank:
    """The change of one weight."""

    up: LazyTensor  # (O, R)
    down: LazyTensor  # (R, I)
    scale: float  # what their product is multiplied by
    # DoRA's length of each row (O, 1) or column (1, I) of the changed weight.
    magnitude: LazyTensor | None = None

    def check_shape(self, name: str, shape: tuple[int, ...] | None) -> None:
        """Raises ValueError unless it can change a weight of that shape."""
        if shape is None:
            raise ValueError(f"The adapter changes {name}, which the base does not have.")
        if (self.up.shape[0], self.down.shape[1]) != shape:
            raise ValueError(
                f"The adapter changes {name} by {self.up.shape} x {self.down.shape}, but the "
                f"base's is {shape}; it belongs to another base."
            )


@dataclass
class Lora:
    """The content of a LoRA folder, by canonical name."""

    changes: dict[str, LowRank]
    trained: dict[str, LazyTensor]  # tensors that replace the base's
    warnings: list[str] = field(default_factory=list)

    def check_tied(self, is_tied: bool) -> None:
        """Raises ValueError if the embedding is changed, but not the output layer that is tied."""
        if is_tied and self.changes and _EMBEDDING in {*self.changes, *self.trained}:
            raise ValueError(
                f"The adapter changes {_EMBEDDING}, which is the base's output layer too "
                "(tie_word_embeddings); merge it with PEFT (merge_and_unload) and load the result."
            )


def _add_low_rank(arrays: list[mx.array], scale: float) -> mx.array:
    """A weight and the parts of its change -> their sum, computed in float32."""
    weight, up, down, *magnitude = (array.astype(mx.float32) for array in arrays)
    weight = weight + scale * (up @ down)
    for lengths in magnitude:
        axis = 1 if lengths.shape[1] == 1 else 0
        weight = weight * (lengths / mx.linalg.norm(weight, axis=axis, keepdims=True))
    return weight.astype(arrays[0].dtype)


def merge_lora(
    base: Mapping[str, LazyTensor],
    lora: Lora,
    quantization: Mapping[str, Any] | None = None,
    beside: Container[str] = (),
) -> dict[str, LazyTensor]:
    """Adds a LoRA to its base; quantised weights that it changes become plain.

    Those named in `beside` stay as they are: they get LoRA layers.
    """
    result = dict(base)
    if lora.trained and not lora.changes and all(n.startswith(PROJECTOR) for n in lora.trained):
        # Another projector may have fewer layers.
        result = {name: t for name, t in base.items() if not name.startswith(PROJECTOR)}
    for name, tensor in lora.trained.items():
        if name in result:
            plain_layer(result, name.removesuffix(".weight"), quantization)
        result[name] = tensor
    for name, change in lora.changes.items():
        if name in beside:
            continue
        plain_layer(result, name.removesuffix(".weight"), quantization)
        weight = result.get(name)
        change.check_shape(name, weight.shape if weight else None)
        parts = [part for part in (change.up, change.down, change.magnitude) if part]
        result[name] = combine([result[name], *parts], partial(_add_low_rank, scale=change.scale))
    return result


def adapter_files(folder: Path) -> list[Path]:
    """The files of a folder that hold an adapter's weights."""
    return [folder / name for name in _WEIGHTS if (folder / name).exists()]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model, or a file is an adapter's."""
    if not path.is_dir():
        return path in adapter_files(path.parent)
    files, has_config = adapter_files(path), (path / CONFIG).exists()
    if bool(files) == has_config:
        return has_config
    return {*visible_files(path, *_MODELS)} <= {*files}


def is_part(path: Path) -> bool:
    """Whether a folder holds an adapter, or a projector and no model."""
    is_projector = (path / PROJECTOR_FILE).exists() and not visible_files(path, *_MODELS)
    return is_projector or is_adapter(path)


def read_projector(path: Path) -> Lora:
    """A stand-alone mm_projector.bin, or the one in a folder; other tensors are left out."""
    path = path if path.is_file() else path / PROJECTOR_FILE
    named = {_name_below_peft(key): tensor for key, tensor in read_file(path)[0].items()}
    found = {name: tensor for name, tensor in named.items() if name.startswith(PROJECTOR)}
    if not found:
        raise ValueError(f"{path} holds no projector.")
    return Lora({}, found)


def read_adapter(folder: Path) -> Lora:
    """Reads a LoRA by its folder or its file of weights; whole tensors replace the base's."""
    folder = folder.parent if folder.is_file() else folder
    settings, files = read_json(folder / CONFIG), adapter_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} has no adapter in it, none of {', '.join(_WEIGHTS)}.")
    if not settings:
        raise FileNotFoundError(
            f"{folder} has {files[0].name}, but no {CONFIG} that says how strong it is; it stands "
            "beside the weights where they were trained."
        )
    with sensible_values(folder):
        return _read(files[0], settings)


def _read(path: Path, settings: Mapping[str, Any]) -> Lora:
    is_mlx = path.name == MLX_WEIGHTS
    if not is_mlx:
        _check_peft(settings)
    beside = path.with_name(_TRAINED)
    trained = dict(read_file(beside)[0]) if beside.exists() and not is_mlx else {}
    modules: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in read_file(path)[0].items():
        if match := (_MLX_PART if is_mlx else _PEFT_PART).fullmatch(key):
            parts = modules.setdefault(match["module"].removeprefix(_PEFT_PREFIX), {})
            part = "m" if match["part"].startswith("m") else match["part"][-1].upper()
            if other := parts.get(part):
                raise ValueError(f"{other.source} and {tensor.source} are of two adapters.")
            parts[part] = tensor
        elif re.search(r"\.(lora|vera|ia3|hada|lokr|oft|token_adapter)_?", key):
            raise ValueError(f"{tensor.source} is no part of a LoRA that can be merged.")
        elif ".original_module." not in key:  # what modules_to_save takes the place of
            trained[key] = tensor
    named = {_name_below_peft(_WRAPPERS.sub("", key)): t for key, t in trained.items()}
    lora = Lora({}, canonical_tensors(named, is_mlx).tensors)
    unknown = [key for key, value in settings.items() if value and key not in _READ]
    if unknown and not is_mlx:
        lora.warnings.append(f"{CONFIG} has keys that are not read: {', '.join(unknown)}.")
    if modules and is_mlx:
        settings, lora.warnings = _mlx_settings(settings)
    for module, parts in modules.items():
        name = _name_below_peft(f"{module}.weight")
        if name in lora.changes:
            raise ValueError(f"The adapter changes {name} twice, under two names.")
        lora.changes[name] = _change(name, module, parts, settings, is_mlx)
    return lora


def _name_below_peft(key: str) -> str:
    """The canonical name of a tensor that PEFT saved below base_model.model."""
    return canonical_name(
        _BARE_DECODER.sub("language_model.model.", key.removeprefix(_PEFT_PREFIX))
    )


def _check_peft(settings: Mapping[str, Any]) -> None:
    kind = str(settings.get("peft_type", "LORA")).rpartition(".")[2]
    if kind.upper() != "LORA":
        raise ValueError(f"{CONFIG} says peft_type={kind!r}; mlx_llava reads LORA.")
    for key in _REFUSED:
        if settings.get(key):
            raise ValueError(
                f"{CONFIG} says {key}={settings[key]!r}, which mlx_llava does not read; merge the "
                "adapter with PEFT (merge_and_unload) and load the result."
            )
    init = settings.get("init_lora_weights")
    if init not in _INITS:
        raise ValueError(
            f"{CONFIG} says init_lora_weights={init!r}, which changes the base; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion, and it is a plain LoRA."
        )


def _mlx_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The rank, under PEFT's name, and the scale, of MLX's settings; and what to say of them."""
    given = settings.get("lora_parameters") or settings
    if "rank" not in given or not {"scale", "alpha"} & given.keys():
        raise ValueError(f"{CONFIG} names no rank and no scale (or alpha) of its LoRA layers.")
    rank, scale = given["rank"], given.get("scale")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{CONFIG} gives the LoRA layers the rank {rank!r}.")
    if scale is not None:
        return {"r": rank, "scale": float(scale)}, []
    scale = given["alpha"] / rank
    warning = (
        f"The adapter's scale is taken as alpha / rank = {scale:.6g}, as mlx-vlm does since 0.4.5; "
        f'if an older one trained it, write "scale": {given["alpha"]} into {CONFIG}.'
    )
    return {"r": rank, "scale": scale}, [warning]


def _change(
    name: str,
    module: str,
    parts: Mapping[str, LazyTensor],
    settings: Mapping[str, Any],
    is_mlx: bool,
) -> LowRank:
    """The change of one module.

    PEFT's layers compute x A.T B.T and its embeddings A.T B.T; MLX's x A B, and A B.
    """
    if not {"A", "B"} <= parts.keys():
        raise ValueError(f"The adapter has only {', '.join(parts)} of the two matrices of {name}.")
    is_embedding = "embed" in name.split(".")[-2]
    up, down = (parts["A"], parts["B"]) if is_embedding else (parts["B"], parts["A"])
    if is_embedding != is_mlx:
        up, down = up.then(lambda matrix: matrix.T), down.then(lambda matrix: matrix.T)
    if not (len(up.shape) == len(down.shape) == 2 and up.shape[1] == down.shape[0] > 0):
        raise ValueError(
            f"The adapter changes {name} by {up.shape} x {down.shape}, which is no product of two "
            "matrices: a convolution's, or not saved whole."
        )
    rank = _of_module(settings.get("rank_pattern"), module, settings.get("r", 8))
    if rank != down.shape[0]:
        raise ValueError(
            f"{CONFIG} gives {name} the rank {rank}, but its matrices have {down.shape[0]}."
        )
    scale = settings["scale"] if is_mlx else _peft_scale(module, rank, settings)
    if not math.isfinite(scale):
        raise ValueError(f"{CONFIG} gives {name} the scale {scale}, expected a finite number.")
    magnitude = parts.get("m")
    if settings.get("use_dora") and magnitude is None:
        raise ValueError(f"{CONFIG} says use_dora, but {name} has no lora_magnitude_vector.")
    if magnitude is not None:
        along = (1, -1) if is_embedding and not is_mlx else (-1, 1)
        magnitude = magnitude.then(lambda m: m.reshape(along))
    return LowRank(up, down, scale, magnitude)


def _peft_scale(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    alpha = _of_module(settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _of_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """A setting of one module: the first pattern that its name ends in (get_pattern_key)."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ValueError(f"{CONFIG} has the pattern {pattern!r}: {error}.") from error
    return default


def low_rank_layers(lora: Lora) -> dict[str, LowRank]:
    """What of an adapter can stay beside the linear layers of the decoder's blocks.

    What else it changes (DoRA's layers, embeddings, the tower) has to become new weights.
    """
    return {
        name: change
        for name, change in lora.changes.items()
        if change.magnitude is None and name.startswith(_BLOCKS)
    }


def put_beside(model: Llava, changes: Mapping[str, LowRank]) -> None:
    """Puts trained LoRA layers around linear layers, if they fit."""
    modules, adapted = dict(model.named_modules()), {}
    for name, change in changes.items():
        layer = modules.get(path := name.removesuffix(".weight"), nn.Module())
        change.check_shape(name, plain_weight(layer).shape if "weight" in layer else None)
        down, up = change.down.read(), change.up.read()
        adapted[path] = LoRALinear(layer, rank=len(down), scale=change.scale)
        adapted[path].lora_a, adapted[path].lora_b = down.T, up.T
    model.update_modules(tree_unflatten(list(adapted.items())))
    model.eval()
