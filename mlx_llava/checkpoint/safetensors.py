"""safetensors files: read lazily by MLX, written a tensor at a time.

mx.save_safetensors and the safetensors library hold all that they write: of 2.15 GB of float16
tensors, made as they are written, the process grows to 2.1 and 2.2 GB with them, to 0.17 GB here.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from mlx_llava.checkpoint.tensors import FILE_DTYPES, ITEM_SIZES, LazyTensor
from mlx_llava.json_files import decode, parse, write_json

if TYPE_CHECKING:
    from typing_extensions import Buffer

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 << 30
_NAMES = {dtype: name for name, (dtype, _) in FILE_DTYPES.items() if name != "F64"}


def read_file(path: Path) -> tuple[dict[str, LazyTensor], bool]:
    """The tensors of a safetensors file by name, and whether it is in MLX's own layout."""
    header, metadata = _read_header(path)
    read = _reader(path)
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in FILE_DTYPES:
            raise ValueError(f"{path} holds {key} as {entry['dtype']}, which MLX has no type for.")
        shape, dtype = tuple(entry["shape"]), FILE_DTYPES[entry["dtype"]][0]
        tensors[key] = LazyTensor(f"{path.name}:{key}", shape, dtype, functools.partial(read, key))
    return tensors, metadata.get("format") == "mlx"


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says of its tensors and of itself; ValueError unless it is as long as that."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = parse(decode(file.read(min(length, size)), "it"), "it")
        metadata = dict(header.pop("__metadata__", None) or {})
        ends = [0, *(entry["data_offsets"][1] for entry in header.values())]
        for entry in header.values():
            start, end = entry["data_offsets"]
            item = ITEM_SIZES.get(entry["dtype"])
            if item is not None and end - start != math.prod(entry["shape"]) * item:
                raise ValueError("a tensor is not as long as its shape")
    except (struct.error, ValueError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors file, or its header is cut off.") from error
    expected = 8 + length + max(ends)
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, its header says {expected:,}.")
    return header, metadata


def _reader(path: Path) -> Callable[[str], mx.array]:
    """Reads a tensor by its key and keeps none; the first, and one again, take the whole header."""
    unread: dict[str, mx.array] = {}

    def read(key: str) -> mx.array:
        if key not in unread:
            unread.update(cast("dict[str, mx.array]", mx.load(str(path))))
        return unread.pop(key)

    return read


def write_arrays(
    path: Path, arrays: Mapping[str, mx.array], metadata: dict[str, str] | None = None
) -> None:
    """Writes a file at once."""
    try:
        mx.save_safetensors(str(path), dict(arrays), metadata)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written; is the disk full? {error}") from error


@dataclass(frozen=True)
class Output:
    """Tensors to be written that are computed together, as a quantised layer's three are."""

    tensors: tuple[tuple[str, tuple[int, ...], mx.Dtype], ...]  # name, shape and dtype of each
    compute: Callable[[], Sequence[mx.array]]  # makes them, in the same order
    source: str  # where they come from, for people

    @property
    def nbytes(self) -> int:
        """Their size in bytes."""
        return sum(math.prod(shape) * dtype.size for _, shape, dtype in self.tensors)


def output(name: str, tensor: LazyTensor) -> Output:
    """One tensor to be written as it is."""
    return Output(((name, tensor.shape, tensor.dtype),), lambda: [tensor.read()], tensor.source)


def write_weights(
    folder: Path, outputs: Sequence[Output], is_mlx: bool, progress: Callable[[int], object]
) -> None:
    """Writes outputs one after the other, as one file or as shards with their index.

    Only one of them is in memory at a time; `progress` is told the bytes of each.
    """
    shards = _split(outputs)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    file_of: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, {"format": "mlx" if is_mlx else "pt"}, progress)
        file_of |= {key: name for item in shard for key, _, _ in item.tensors}
    if len(shards) > 1:
        total = sum(item.nbytes for item in outputs)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})


def _split(outputs: Sequence[Output]) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    room = MAX_SHARD_BYTES
    for item in outputs:
        if item.nbytes > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(item)
        room -= item.nbytes
    return shards


def _write_file(
    path: Path,
    outputs: Sequence[Output],
    metadata: dict[str, str],
    progress: Callable[[int], object],
) -> None:
    """One file: its header, which is known beforehand, then each tensor's bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape, dtype in (tensor for item in outputs for tensor in item.tensors):
        start, end = end, end + math.prod(shape) * dtype.size
        entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # One thread writes while this one, which owns all MLX work, makes the next tensors.
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as writer:
        writing = writer.submit(file.write, struct.pack("<Q", len(text)) + text)
        for item in outputs:
            for array, (name, shape, dtype) in zip(item.compute(), item.tensors, strict=True):
                if (array.shape, array.dtype) != (shape, dtype):
                    raise AssertionError(f"{name} is {array.dtype} {array.shape}, not as planned")
                flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
                mx.eval(flat)
                writing.result()
                writing = writer.submit(file.write, memoryview(cast("Buffer", flat)))
            progress(item.nbytes)
            mx.clear_cache()
        writing.result()
