"""Parts of checkpoints: deltas, LoRA, stand-alone projectors, put on their base.

All take and give tensors by canonical name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_llava.checkpoint.folder import read_file
from mlx_llava.checkpoint.layout import canonical_name
from mlx_llava.checkpoint.tensors import LazyTensor, combine
from mlx_llava.json_files import read_json

PROJECTOR = "multi_modal_projector."
_LORA_KEY = re.compile(r"^(.*)\.lora_([AB])(?:\.default)?\.weight$")
_GROWING = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def apply_delta(
    base: Mapping[str, LazyTensor], delta: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """LLaVA v0 and v1 were published as the difference to LLaMA-1 (apply_delta.py).

    The sum is taken in the delta's own float16, as the original does. Rows that the delta adds
    to the vocabulary are final, and so is the projector.

    Raises:
        ValueError: The base is not the model that the delta was taken from.
    """
    result = {}
    for name, tensor in delta.items():
        if name not in base:
            if not name.startswith(PROJECTOR):
                raise ValueError(f"The base has no {name}; a delta needs the LLaMA it came from.")
            result[name] = tensor
        elif base[name].shape == tensor.shape:
            result[name] = combine([tensor, base[name]], _add)
        elif name in _GROWING and all(
            old <= new for old, new in zip(base[name].shape, tensor.shape, strict=True)
        ):
            result[name] = combine([tensor, base[name]], _add_rows)
        else:
            raise ValueError(
                f"{name} is {tensor.shape} in the delta but {base[name].shape} in the base; a "
                "delta needs the original LLaMA that it came from."
            )
    return result


def _add(arrays: list[mx.array]) -> mx.array:
    delta, base = arrays
    return delta + base.astype(delta.dtype)


def _add_rows(arrays: list[mx.array]) -> mx.array:
    delta, base = arrays
    rows, columns = base.shape
    return delta.at[:rows, :columns].add(base.astype(delta.dtype))


def find_lora_file(folder: Path) -> Path:
    """The adapter's weights.

    Raises:
        FileNotFoundError: There are none.
    """
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} has no adapter_model.safetensors or adapter_model.bin.")


def apply_lora(base: Mapping[str, LazyTensor], folder: Path) -> dict[str, LazyTensor]:
    """Merges a LoRA folder of peft and LLaVA into its base (builder.py).

    W + scale B A is computed in float32; what was trained in full replaces the base's.

    Raises:
        ValueError: The adapter does not fit the base.
    """
    settings = read_json(folder / "adapter_config.json")
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    result = dict(base)
    trained = folder / "non_lora_trainables.bin"
    if trained.exists():
        for key, tensor in read_file(trained)[0].items():
            result[_name_below_peft(key)] = tensor
    pairs: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in read_file(find_lora_file(folder))[0].items():
        match = _LORA_KEY.match(key)
        if not match:
            raise ValueError(f"{tensor.source} is no part of a LoRA that can be merged.")
        pairs.setdefault(_name_below_peft(match[1] + ".weight"), {})[match[2]] = tensor
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"} or name not in result:
            raise ValueError(f"The adapter changes {name}, which the base does not have.")
        down, up, weight = pair["A"], pair["B"], result[name]
        if (up.shape[0], down.shape[1]) != weight.shape or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"The adapter changes {name} by {up.shape} x {down.shape}, but the base's is "
                f"{weight.shape}; it belongs to another base."
            )
        result[name] = combine([weight, up, down], lambda arrays: _merge(arrays, scale))
    return result


def _merge(arrays: list[mx.array], scale: float) -> mx.array:
    weight, up, down = (array.astype(mx.float32) for array in arrays)
    return (weight + scale * (up @ down)).astype(arrays[0].dtype)


def _name_below_peft(key: str) -> str:
    """The canonical name of a tensor that peft saved below base_model.model."""
    return canonical_name(key.removeprefix("base_model.model."))


def read_projector(path: Path) -> dict[str, LazyTensor]:
    """A stand-alone mm_projector.bin; token rows that may come with it are left out.

    Raises:
        ValueError: There is no projector in it.
    """
    tensors, _ = read_file(path)
    named = {_name_below_peft(key): tensor for key, tensor in tensors.items()}
    found = {name: tensor for name, tensor in named.items() if name.startswith(PROJECTOR)}
    if not found:
        raise ValueError(f"{path} holds no projector.")
    return found
