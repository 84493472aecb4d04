"""LoRA folders as PEFT writes them (huggingface/peft 0.21, tuners/lora/config.py and layer.py).

Which layers are changed, their tensors tell: ``target_modules``, ``layers_to_transform`` and the
like chose them, once. O, I and R as in lora.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_llava.checkpoint.folder import read_file
from mlx_llava.checkpoint.lora import CONFIG, Lora, LowRank
from mlx_llava.checkpoint.names import canonical_name, canonical_tensors
from mlx_llava.checkpoint.tensors import LazyTensor

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
#: What LLaVA's own training saves beside PEFT's file: the projector, and a tuned tower.
TRAINED = "non_lora_trainables.bin"

_PREFIX = "base_model.model."
#: A part of a LoRA layer; the adapter's name ("default") may stand behind it.
_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>embedding_A|embedding_B|A|B|magnitude_vector)"
    r"(\.(?!bias$|weight$)[^.]+)?(\.weight)?"
)
#: Wrappers of PEFT's around what is trained in full, or around what LoRA is on.
_WRAPPERS = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
#: A decoder that PEFT was put on alone.
_BARE_DECODER = re.compile(r"^(?=layers\.|embed_tokens\.|norm\.)")

#: Settings that change the maths and are not read.
_REFUSED = (
    *("alora_invocation_string", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("layer_replication", "lora_bias", "monteclora_config", "target_parameters"),
    *("trainable_token_indices", "use_bdlora", "use_mora", "use_qalora"),
)
#: Ways to begin that leave the base as it is; others (pissa, olora, corda, loftq) change it.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
#: Settings that are read, and those that say nothing about what was learned.
_KNOWN = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying
    eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern
    layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_config
    megatron_core modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules task_type use_dora use_rslora velora_config
    """.split()
)


def read_peft(folder: Path, path: Path, settings: Mapping[str, Any]) -> Lora:
    """Reads a LoRA folder of PEFT's, and of LLaVA's that has PEFT's in it.

    Args:
        folder (Path): The folder.
        path (Path): Its file of weights.
        settings (dict): Its adapter_config.json.
    """
    _check(settings)
    modules: dict[str, dict[str, LazyTensor]] = {}
    trained = dict(read_file(folder / TRAINED)[0]) if (folder / TRAINED).exists() else {}
    for key, tensor in read_file(path)[0].items():
        if match := _PART.fullmatch(key):
            parts = modules.setdefault(match["module"].removeprefix(_PREFIX), {})
            if other := parts.get(match["part"]):
                raise ValueError(f"{other.source} and {tensor.source} are of two adapters.")
            parts[match["part"]] = tensor
        elif re.search(r"\.(lora|vera|ia3|hada|lokr|oft|token_adapter)_?", key):
            raise ValueError(f"{tensor.source} is no part of a LoRA that can be merged.")
        elif ".original_module." not in key:  # what modules_to_save takes the place of
            trained[key] = tensor
    changes = {}
    for module, parts in modules.items():
        name = name_below_peft(f"{module}.weight")
        if name in changes:
            raise ValueError(f"The adapter changes {name} twice, under two names.")
        changes[name] = _change(name, module, parts, settings)
    named = {name_below_peft(_WRAPPERS.sub("", key)): t for key, t in trained.items()}
    unknown = [key for key, value in settings.items() if value and key not in _KNOWN]
    warnings = [f"{CONFIG} has keys that are not read: {', '.join(unknown)}."] if unknown else []
    return Lora(changes, canonical_tensors(named, is_mlx=False).tensors, warnings)


def name_below_peft(key: str) -> str:
    """The canonical name of a tensor that PEFT saved below base_model.model."""
    return canonical_name(_BARE_DECODER.sub("language_model.model.", key.removeprefix(_PREFIX)))


def _check(settings: Mapping[str, Any]) -> None:
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


def _change(
    name: str, module: str, parts: Mapping[str, LazyTensor], settings: Mapping[str, Any]
) -> LowRank:
    embedding = "embedding_" if "embedding_A" in parts else ""
    if not {f"{embedding}A", f"{embedding}B"} <= parts.keys():
        raise ValueError(f"The adapter has only {', '.join(parts)} of the two matrices of {name}.")
    down, up = parts[f"{embedding}A"], parts[f"{embedding}B"]
    if embedding and len(down.shape) == len(up.shape) == 2:
        down, up = up.then(lambda b: b.T), down.then(lambda a: a.T)
    rank = _of_module(settings.get("rank_pattern"), module, settings.get("r", 8))
    alpha = _of_module(settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8))
    LowRank(up, down, 0.0).check(name, rank)
    magnitude = parts.get("magnitude_vector")
    if settings.get("use_dora") and magnitude is None:
        raise ValueError(f"{CONFIG} says use_dora, but {name} has no lora_magnitude_vector.")
    if magnitude is not None:
        along = (1, -1) if embedding else (-1, 1)
        magnitude = magnitude.then(lambda m: m.reshape(along))
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return LowRank(up, down, scale, magnitude)


def _of_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """A setting of one module: the first pattern that its name ends in (get_pattern_key)."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ValueError(f"{CONFIG} has the pattern {pattern!r}: {error}.") from error
    return default
