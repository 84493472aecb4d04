"""PyTorch's files are read as torch reads them, and nothing in them is run."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import subprocess
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_llava.checkpoint.torch_file import read_torch_file

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")

DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool),
]


@st.composite
def tensors(draw):
    """A tensor that is whole, or a view of another: sliced, turned, stretched."""
    shape = draw(st.lists(st.integers(0, 5), min_size=0, max_size=3))
    tensor = (torch.randn(shape) * 50).to(draw(st.sampled_from(DTYPES)))
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["slice", "step", "turn", "stretch", "pick"]))
        if tensor.ndim == 0:
            break
        n = tensor.shape[0]
        if kind == "slice" and n:
            tensor = tensor[draw(st.integers(0, n - 1)) :]
        elif kind == "step":
            tensor = tensor[::2]
        elif kind == "turn":
            tensor = tensor.transpose(0, -1)
        elif kind == "stretch":
            tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
        elif kind == "pick" and n:
            tensor = tensor[draw(st.integers(0, n - 1))]
    return tensor


def same(ours: mx.array, theirs) -> bool:
    theirs = theirs.detach()
    ours = np.array(ours.astype(mx.float32))
    return ours.shape == tuple(theirs.shape) and np.array_equal(
        ours, theirs.to(torch.float32).numpy(), equal_nan=True
    )


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.dictionaries(st.text(max_size=8), tensors(), max_size=5), st.booleans())
def test_reads_what_torch_reads(tmp_path, state, tied):
    path = tmp_path / "x.bin"
    if state and tied:
        first = next(iter(state.values()))
        state = {**state, "tied": first, "parameter": torch.nn.Parameter(first, False)}
    torch.save(OrderedDict(state), path)
    expected = torch.load(path, weights_only=True)
    found = read_torch_file(path)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        array = found[key].read()
        assert (array.shape, array.dtype) == (found[key].shape, found[key].dtype)
        assert same(array, tensor), key


def test_state_dicts_of_modules_and_wrapped_ones(tmp_path):
    path = tmp_path / "x.bin"
    module = torch.nn.Linear(3, 4)
    for state in (module.state_dict(), {"state_dict": module.state_dict()}):
        torch.save(state, path)
        assert same(read_torch_file(path)["weight"].read(), module.weight)


def test_a_file_saved_on_a_gpu_is_read_anywhere(tmp_path):
    torch.save({"x": torch.arange(5.0)}, tmp_path / "cpu.bin")
    with zipfile.ZipFile(tmp_path / "cpu.bin") as source:
        members = {name: source.read(name) for name in source.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = members[name].replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:7")
    assert b"cuda:7" in members[name]
    write_zip(tmp_path / "gpu.bin", members)
    assert read_torch_file(tmp_path / "gpu.bin")["x"].read().tolist() == [0, 1, 2, 3, 4]


def test_values_stay_on_disk_until_they_are_read(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({f"x{i}": torch.ones(500_000) for i in range(20)}, path)
    tracemalloc.start()
    found = read_torch_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 20
    assert peak < 2_000_000


def write_zip(path: Path, members: dict[str, bytes], compress: bool = False) -> Path:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


REBUILD = torch._utils._rebuild_tensor_v2


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Storage:
    """Stands for a storage in a pickle; its class is looked up like torch's own."""


class StoragePickler(pickle.Pickler):
    """Writes storages as torch does: as persistent ids."""

    def persistent_id(self, value):
        return value.pid if isinstance(value, Reference) else None


class Reference:
    def __init__(self, kind, key, count, *more) -> None:
        self.pid = ("storage", kind, key, "cpu", count, *more)


def tensor_call(count=4, offset=0, shape=(4,), strides=(1,), kind=torch.FloatStorage, key="0"):
    reference = Reference(kind, key, count)
    arguments = (reference, offset, shape, strides, False, OrderedDict())
    return Call(REBUILD, *arguments)


def pickled(value, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    StoragePickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def torch_zip(path: Path, value, data: bytes = bytes(16), **options) -> Path:
    members = {"x/data.pkl": value if isinstance(value, bytes) else pickled(value)}
    return write_zip(path, {**members, "x/data/0": data, "x/version": b"3"}, **options)


def nested(depth: int) -> bytes:
    """Tuples in tuples, as a pickle."""
    return b"\x80\x02" + b"(" * depth + b"t" * depth + b"."


HOSTILE = {
    "os.system": {"a": Call(os.system, "touch {marker}")},
    "eval": {"a": Call(builtins.eval, "open('{marker}', 'w')")},
    "exec": {"a": Call(builtins.exec, "open('{marker}', 'w')")},
    "open": {"a": Call(builtins.open, "{marker}", "w")},
    "popen": {"a": Call(subprocess.Popen, ["touch", "{marker}"])},
    "getattr": {"a": Call(getattr, "text", "upper")},
    "import": {"a": Call(builtins.__import__, "os")},
    "nested": {"a": [{"b": (Call(os.system, "touch {marker}"),)}]},
    "in a tensor": {"a": Call(REBUILD, Call(os.system, "touch {marker}"))},
    "a class": {"a": Storage()},
    "numpy": {"a": np.ones(3)},
    "a number": {"a": 3},
    "a list": [1, 2, 3],
    "past the end": {"a": tensor_call(offset=2)},
    "negative": {"a": tensor_call(offset=-1)},
    "negative stride": {"a": tensor_call(strides=(-1,))},
    "shape of floats": {"a": tensor_call(shape=(2.5,))},
    "shape without strides": {"a": tensor_call(shape=(2, 2))},
    "huge": {"a": tensor_call(shape=(1 << 60,), strides=(0,))},
    "too few values": {"a": tensor_call(count=400, shape=(400,))},
    "another storage": {"a": tensor_call(key="../../../etc/passwd")},
    "no storage": {"a": Call(REBUILD, "x", 0, (1,), (1,))},
    "a view": {"a": Call(REBUILD, Reference(torch.FloatStorage, "0", 4, (1,)))},
    "protocol 5": pickle.dumps({"a": bytearray(10)}, 5),
    "an object": pickle.dumps({"a": Storage()}, 4),
    "an extension": b"\x80\x02\x82\x01.",
    "deep": nested(200_000),
    "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "no end": pickled({"a": tensor_call()})[:-5],
    "nothing": b"",
    "noise": bytes(range(256)) * 4,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_files_are_refused(tmp_path, name):
    marker = tmp_path / "pwned"
    value = HOSTILE[name]
    data = value if isinstance(value, bytes) else pickled(value)
    if b"{marker}" in data:  # same length, so that the pickle stays whole
        data = data.replace(b"{marker}", b"pwned...")
    path = tmp_path / "x.bin"
    torch_zip(path, data)
    before = set(tmp_path.iterdir())
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"x\.bin is refused: "):
        read_torch_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000
    assert set(tmp_path.iterdir()) == before
    assert not marker.exists()
    assert not Path("pwned...").exists()


def broken_zips(tmp_path: Path):
    good = {"x/data.pkl": pickled({"a": tensor_call()}), "x/data/0": bytes(16)}
    yield write_zip(tmp_path / "compressed", good, compress=True)
    yield write_zip(tmp_path / "bomb", {**good, "x/data.pkl": bytes(10_000_000)}, compress=True)
    yield write_zip(tmp_path / "no-pickle", {"x/data/0": bytes(16)})
    yield write_zip(tmp_path / "two", {**good, "y/data.pkl": good["x/data.pkl"]})
    yield write_zip(tmp_path / "no-data", {"x/data.pkl": good["x/data.pkl"]})
    yield write_zip(tmp_path / "short", {**good, "x/data/0": bytes(15)})
    yield write_zip(tmp_path / "big-endian", {**good, "x/byteorder": b"big"})
    whole = write_zip(tmp_path / "whole", good).read_bytes()
    for size in (3, 60, len(whole) // 2, len(whole) - 5):
        path = tmp_path / f"cut-{size}"
        path.write_bytes(whole[:size])
        yield path
    (tmp_path / "text").write_text("no model at all")
    yield tmp_path / "text"


def test_broken_containers_are_refused(tmp_path):
    paths = list(broken_zips(tmp_path))
    assert len(paths) == 12
    for path in paths:
        with pytest.raises(ValueError, match="is refused: "):
            read_torch_file(path)
    assert read_torch_file(tmp_path / "whole")["a"].read().tolist() == [0, 0, 0, 0]


def test_the_container_before_torch_1_6_is_refused_by_name(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "x", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="is refused: it is no file of torch.save"):
        read_torch_file(tmp_path / "x")
