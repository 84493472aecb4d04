"""Parts of checkpoints: deltas, adapters, stand-alone projectors, by canonical name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_llava.checkpoint import mlx_lora, peft
from mlx_llava.checkpoint.folder import read_file, visible_files
from mlx_llava.checkpoint.lora import CONFIG, PROJECTOR, Lora
from mlx_llava.checkpoint.tensors import LazyTensor, combine
from mlx_llava.json_files import read_json, sensible_values

PROJECTOR_FILE = "mm_projector.bin"
_GROWING = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def apply_delta(
    base: Mapping[str, LazyTensor], delta: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """LLaVA v0 and v1 were published as the difference to LLaMA-1 (apply_delta.py).

    The sum is taken in the delta's own float16, as the original does. Rows that the delta adds
    to the vocabulary are final, and so is the projector.
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


def delta_warning(name: str) -> list[str]:
    """What to say of a checkpoint without a base whose name is a delta's."""
    if not re.search(r"\bdelta\b", name.lower()):
        return []
    return [
        f"{name} is called a delta, the difference to a LLaMA. If it is one, it answers noise "
        "without that LLaMA: --base."
    ]


def _add(arrays: list[mx.array]) -> mx.array:
    delta, base = arrays
    return delta + base.astype(delta.dtype)


def _add_rows(arrays: list[mx.array]) -> mx.array:
    delta, base = arrays
    rows, columns = base.shape
    return delta.at[:rows, :columns].add(base.astype(delta.dtype))


def adapter_files(folder: Path) -> list[Path]:
    """The files of a folder that hold an adapter's weights."""
    names = (*peft.WEIGHTS, *mlx_lora.WEIGHTS)
    return [folder / name for name in names if (folder / name).exists()]


def read_adapter(folder: Path) -> Lora:
    """Reads a LoRA, by its folder or weights, of PEFT's, LLaVA's, mlx-lm's, mlx-vlm's or ours."""
    folder = folder.parent if folder.is_file() else folder
    settings, files = read_json(folder / CONFIG), adapter_files(folder)
    if not files:
        names = ", ".join((*peft.WEIGHTS, *mlx_lora.WEIGHTS))
        raise FileNotFoundError(f"{folder} has no adapter in it, none of {names}.")
    if not settings:
        raise FileNotFoundError(
            f"{folder} has {files[0].name}, but no {CONFIG} that says how strong it is; it stands "
            "beside the weights where they were trained."
        )
    with sensible_values(folder):
        if files[0].name in mlx_lora.WEIGHTS:
            return mlx_lora.read_mlx(files[0], settings)
        return peft.read_peft(folder, files[0], settings)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model, or a file is an adapter's."""
    if not path.is_dir():
        return path in adapter_files(path.parent)
    files, has_config = {*adapter_files(path)}, (path / CONFIG).exists()
    others = {*visible_files(path, "*.safetensors", "pytorch_model*.bin")} - files
    return bool(files and has_config) or (bool(files or has_config) and not others)


def read_projector(path: Path) -> Lora:
    """A stand-alone mm_projector.bin, or the one in a folder; other tensors are left out."""
    path = path if path.is_file() else path / PROJECTOR_FILE
    tensors, _ = read_file(path)
    named = {peft.name_below_peft(key): tensor for key, tensor in tensors.items()}
    found = {name: tensor for name, tensor in named.items() if name.startswith(PROJECTOR)}
    if not found:
        raise ValueError(f"{path} holds no projector.")
    return Lora({}, found)
