"""safetensors files of a folder: one, or shards with an index, read lazily by MLX."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_llava.json_files import read_json, write_json

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 << 30


def find_files(folder: Path) -> list[Path]:
    """The weight files of a folder, checked to be all there.

    Raises:
        FileNotFoundError: There are none, or a shard is missing.
    """
    index = read_json(folder / INDEX)
    if index:
        expected = set(index.get("weight_map", {}).values())
        if any(Path(name).name != name for name in expected):
            raise ValueError(f"{folder / INDEX} names files outside its folder.")
    else:
        found = {path.name for path in folder.glob("*.safetensors")}
        expected = {sibling for name in found for sibling in _siblings(name)}
    if not expected:
        raise FileNotFoundError(f"{folder} has no *.safetensors files.")
    missing = sorted(name for name in expected if not (folder / name).exists())
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(expected)} weight files: "
            f"{', '.join(missing)}. Download them again."
        )
    return [folder / name for name in sorted(expected)]


def _siblings(name: str) -> Iterable[str]:
    """All shards of model-00001-of-00003.safetensors; a plain name is its own only sibling."""
    match = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", name)
    if not match:
        return [name]
    stem, number, of, total, end = match.groups()
    return [f"{stem}{i:0{len(number)}}{of}{total}{end}" for i in range(1, int(total) + 1)]


def _check_complete(path: Path) -> None:
    """Raises ValueError unless the file is as long as its header says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(min(length, size)))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors file, or its header is cut off.") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, its header says {expected:,}.")


def read_weights(folder: Path) -> tuple[list[tuple[str, mx.array]], bool]:
    """Reads the tensors of a folder; nothing is loaded before it is used.

    Returns:
        Every (key, tensor), and whether the files are in MLX's own layout.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is broken.
    """
    weights: list[tuple[str, mx.array]] = []
    is_mlx = False
    for path in find_files(folder):
        _check_complete(path)
        try:
            loaded = mx.load(str(path), return_metadata=True)
        except RuntimeError as error:
            raise ValueError(f"MLX cannot read {path}: {error}") from error
        tensors, metadata = cast("tuple[dict[str, mx.array], dict[str, Any]]", loaded)
        weights += tensors.items()
        is_mlx |= metadata.get("format") == "mlx"
    return weights, is_mlx


def write_weights(folder: Path, weights: Mapping[str, mx.array], *, is_mlx: bool) -> None:
    """Writes tensors as one file, or as shards of at most 5 GiB with their index."""
    shards: list[dict[str, mx.array]] = [{}]
    room = MAX_SHARD_BYTES
    for name, tensor in weights.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    metadata = {"format": "mlx" if is_mlx else "pt"}
    if len(shards) == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), shards[0], metadata)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        mx.save_safetensors(str(folder / name), shard, metadata)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)
