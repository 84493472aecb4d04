"""PyTorch's .bin and .pt files, read without PyTorch and without running anything in them.

The container is the ZIP of torch >= 1.6 (torch/serialization.py) with a pickle in it, which is a
program. This reader executes only the few operations and the few names that saved tensors need,
all of them its own; whatever else a file holds is refused by name.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_llava.checkpoint.tensors import FILE_DTYPES, ITEM_SIZES, LazyTensor, map_values, to_mlx

#: torch's storage classes -> the names of FILE_DTYPES.
_STORAGES = {
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
#: The operations of a pickled state dict (protocol 2); none of them makes an object of a class
#: except REDUCE and BUILD, whose names go through `_Unpickler.find_class`.
_OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE UNICODE BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS GLOBAL
    BINPERSID REDUCE BUILD BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE POP POP_MARK
    """.split()
)
#: No state dict's pickle is larger; one of 100,000 tensors has about 20 MB.
_MAX_PICKLE_BYTES = 256 << 20
#: A view may repeat values (stride 0), but not without end.
_MAX_REPEATED = 1 << 20


class _Storage(NamedTuple):
    key: str
    kind: str
    size: int  # in values


class _View(NamedTuple):
    """A tensor: where it begins in its storage, and its steps, in values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    """torch._utils._rebuild_tensor_v2."""
    numbers = [offset, *shape, *strides]
    is_sensible = all(type(n) is int and n >= 0 for n in numbers) and len(shape) == len(strides)
    if not isinstance(storage, _Storage) or not is_sensible:
        raise ValueError("it describes a tensor that cannot be")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.size:
        raise ValueError(f"a tensor reaches to value {last} of the {storage.size} it has")
    if math.prod(shape) > max(storage.size, _MAX_REPEATED):
        raise ValueError(f"it blows {storage.size} values up to a tensor of {tuple(shape)}")
    return _View(storage, offset, tuple(shape), tuple(strides))


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): kind for name, kind in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise ValueError(f"it wants {module}.{name}, which no weights need")
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError(f"it refers to {pid!r:.80}, which is no storage")
        _, kind, key, _, count, *view = pid
        if kind not in FILE_DTYPES or type(count) is not int or count < 0 or any(view):
            raise ValueError(f"it refers to {pid!r:.80}, which is no storage")
        return _Storage(str(key), kind, count)


def _unpickle(data: bytes) -> Any:
    for opcode, _, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise ValueError(f"its pickle has the operation {opcode.name}, which no weights need")
    return _Unpickler(io.BytesIO(data), encoding="utf-8").load()


def read_torch_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a .bin or .pt file by name; their values stay on disk until read.

    It is torch.save's of a state dict, or of a dict with one as ``state_dict`` or ``model``.
    """
    try:
        state, offsets = _read_zip(path)
        return {key: _lazy(path, key, view, offsets) for key, view in _tensors(state).items()}
    except RecursionError as error:
        raise ValueError(f"{path} is refused: its pickle is nested too deep.") from error
    except Exception as error:  # a pickle can bring about most of Python's
        raise ValueError(f"{path} is refused: {error}.") from error


def _tensors(state: Any) -> dict[str, _View]:
    for name in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}, not a dict of tensors")
    strangers = [key for key, value in state.items() if not isinstance(value, _View)]
    if strangers:
        raise ValueError(f"{strangers[0]!r:.80} in it is not a tensor")
    return {str(key): view for key, view in state.items()}


def _lazy(path: Path, key: str, view: _View, offset_of: Callable[[_Storage], int]) -> LazyTensor:
    """A view of a storage as a tensor; only the part of the file that it spans is mapped."""
    kind = view.storage.kind
    item = ITEM_SIZES[kind]
    steps = zip(view.shape, view.strides, strict=True)
    span = 0 if 0 in view.shape else 1 + sum((n - 1) * step for n, step in steps)
    start = offset_of(view.storage) + view.offset * item
    if span and start + span * item > path.stat().st_size:
        raise ValueError(f"it ends before the values of {key}")

    def read() -> mx.array:
        values = map_values(path, start, span, kind)
        strides = [step * item for step in view.strides]
        return to_mlx(np.lib.stride_tricks.as_strided(values, view.shape, strides), kind)

    return LazyTensor(f"{path.name}:{key}", view.shape, FILE_DTYPES[kind][0], read)


def _read_zip(path: Path) -> tuple[Any, Callable[[_Storage], int]]:
    """FOLDER/data.pkl, and where each storage begins, stored plainly as FOLDER/data/KEY."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no file of torch.save (torch 1.6 and later)")
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} data.pkl, so torch did not write it")
        root = pickles[0].removesuffix("data.pkl")
        stored = {n: i for n, i in members.items() if i.compress_type == zipfile.ZIP_STORED}
        if pickles[0] not in stored or members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise ValueError("its pickle is compressed or too long")
        byteorder = stored.get(f"{root}byteorder")
        if byteorder and byteorder.file_size < 10 and archive.read(byteorder) != b"little":
            raise ValueError("it was written on a big-endian machine")
        state = _unpickle(archive.read(pickles[0]))

    def offset_of(storage: _Storage) -> int:
        name = f"{root}data/{storage.key}"
        info = stored.get(name)
        size = storage.size * ITEM_SIZES[storage.kind]
        if info is None or info.file_size != size or info.compress_size != size:
            raise ValueError(f"{name} in it is missing, compressed, or not {size:,} bytes long")
        return _data_offset(path, info)

    return state, offset_of


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored ZIP member begin: behind its own local header."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    # Local file header: signature, 22 bytes, length of the name, length of the extra field.
    signature, name_length, extra_length = struct.unpack("<4s22xHH", header)
    if signature != b"PK\x03\x04":
        raise ValueError(f"the ZIP entry {info.filename} has no header")
    return int(info.header_offset + 30 + name_length + extra_length)
