"""safetensors files, read lazily by MLX."""

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


def _read_header(path: Path) -> dict[str, Any]:
    """What a file says of its tensors; ValueError unless it is as long as that."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = parse(decode(file.read(min(length, size)), "it"), "it")
        metadata = dict(header.pop("__metadata__", None) or {})
        ends = [0, *(entry["data_offsets"][1] for entry in header.values())]
        for entry in header.values():
            start, end = entry["data_offsets"]
            kind, size_said = entry["dtype"], end - start
            if kind in FILE_DTYPES and size_said != math.prod(entry["shape"]) * ITEM_SIZES[kind]:
                raise ValueError("a tensor is not as long as its shape")
    except (struct.error, ValueError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors file, or its header is cut off.") from error
    expected = 8 + length + max(ends)
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, its header says {expected:,}.")
    return {**header, "__metadata__": metadata}


def read_file(path: Path) -> tuple[dict[str, LazyTensor], bool]:
    """The tensors of a safetensors file by name, and whether it is in MLX's own layout."""
    header = _read_header(path)
    metadata = header.pop("__metadata__")
    reader = _Reader(path)
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in FILE_DTYPES:
            raise ValueError(f"{path} holds {key} as {entry['dtype']}, which MLX has no type for.")
        dtype, _ = FILE_DTYPES[entry["dtype"]]
        read = functools.partial(reader.read, key)
        tensors[key] = LazyTensor(f"{path.name}:{key}", tuple(entry["shape"]), dtype, read)
    return tensors, metadata.get("format") == "mlx"


class _Reader:
    """A file that MLX reads, tensor by tensor, when they are used.

    What is read is handed over: nothing here keeps a tensor in memory that its user lets go.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, mx.array] = {}

    def read(self, key: str) -> mx.array:
        """One tensor; the first call, and reading one again, look at the whole header."""
        if key not in self.tensors:
            self.tensors = cast("dict[str, mx.array]", mx.load(str(self.path)))
        return self.tensors.pop(key)


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
    """Tensors to be written that are computed together, as a quantised layer's three are.

    Attributes:
        tensors: name, shape and dtype of each.
        compute: makes them, in the same order.
        source: where they come from, for people.
    """

    tensors: tuple[tuple[str, tuple[int, ...], mx.Dtype], ...]
    compute: Callable[[], Sequence[mx.array]]
    source: str

    @property
    def nbytes(self) -> int:
        """Their size in bytes."""
        return sum(math.prod(shape) * dtype.size for _, shape, dtype in self.tensors)


def output(name: str, tensor: LazyTensor) -> Output:
    """One tensor to be written as it is."""
    return Output(((name, tensor.shape, tensor.dtype),), lambda: [tensor.read()], tensor.source)


def write_weights(
    folder: Path,
    outputs: Sequence[Output],
    *,
    is_mlx: bool,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes tensors one after the other, as one file or as shards with their index.

    Args:
        folder (Path): Where to.
        outputs (list of Output): What; only one of them is in memory at a time.
        is_mlx (bool): The tensors are in MLX's layout, not PyTorch's.
        progress (callable): Is told the bytes of everything that is written.
    """
    shards = _split(outputs)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, {"format": "mlx" if is_mlx else "pt"}, progress)
    if len(shards) > 1:
        files = zip(names, shards, strict=True)
        places = {key: name for name, shard in files for o in shard for key, _, _ in o.tensors}
        total = sum(item.nbytes for item in outputs)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


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
    for item in outputs:
        for name, shape, dtype in item.tensors:
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
