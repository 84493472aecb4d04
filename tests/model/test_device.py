"""The machine: what it is, what it can hold, and in which numbers it computes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_llava import cli, convert, generate, load, stream_generate
from mlx_llava.analysis import machine
from mlx_llava.checkpoint import precision
from mlx_llava.checkpoint.convert import Quantization
from mlx_llava.generation import memory
from mlx_llava.model import device
from mlx_llava.model.cache import make_cache, nbytes
from mlx_llava.model.linux import layers, weights
from mlx_llava.model.quantized import is_quantized
from tests.conftest import GOLDENS, PICTURE, ROOT, load_as_stored

on_linux_cpu = pytest.mark.skipif(
    sys.platform != "linux" or not machine.on_cpu(), reason="about MLX's CPU backend on Linux"
)


def test_doctor_describes_and_measures(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"].split(":")[0] in ("cpu", "gpu")
    assert found["memory_gb"] >= found["available_gb"] > 0
    assert found["matmul_gflops"]["float32"] > 0
    assert found["read_gb_per_second"] > 0
    assert found["versions"]["mlx"]


def test_doctor_is_readable(capsys, monkeypatch):
    monkeypatch.setattr("mlx_llava.doctor.matmul_rate", lambda dtype: 100.0)
    monkeypatch.setattr("mlx_llava.doctor.read_rate", lambda: 30.0)
    monkeypatch.setattr(machine, "BLAS", None)
    monkeypatch.setattr(machine, "on_cpu", lambda: True)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "read gb per second   30.0\n" in out
    if sys.platform == "linux":
        assert out.splitlines()[-1].startswith("MLX uses its own slow BLAS for training")


BLAS = "import mlx_llava.model.blas as b, ctypes; print(b.BLAS)"


def blas_in(code: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize(("set_to", "found"), [(None, "0"), ("1", "1")])
def test_float32_is_not_rounded_unless_that_is_asked_for(monkeypatch, set_to, found):
    """Which MLX does by itself on an M5."""
    monkeypatch.delenv("MLX_ENABLE_TF32")
    code = "import os, mlx_llava.model; print(os.environ['MLX_ENABLE_TF32'])"
    assert blas_in(code, **({"MLX_ENABLE_TF32": set_to} if set_to else {})) == found


@on_linux_cpu
def test_the_blas_is_chosen_safely():
    assert blas_in(BLAS, MLX_LLAVA_BLAS="off") == "None"
    assert blas_in(BLAS, MLX_LLAVA_BLAS="/nowhere/libblas.so") == "None"
    assert blas_in(BLAS, MLX_LLAVA_BLAS="libm.so.6") == "None"  # a library, but no BLAS
    assert blas_in("import mlx.core; " + BLAS) == "None"  # too late


@on_linux_cpu
def test_a_blas_that_came_before_ours_is_not_said_to_be_ours():
    from mlx_llava.model import blas as backend

    libraries = backend._candidates()
    if len(libraries) < 2:
        pytest.skip("takes two BLAS libraries: pip install '.[train]' brings MKL")
    first, second = libraries[:2]
    code = f"import ctypes; ctypes.CDLL({first!r}, mode=ctypes.RTLD_GLOBAL); " + BLAS
    assert blas_in(code, MLX_LLAVA_BLAS=second) == "None"


@on_linux_cpu
def test_importing_settles_nothing_in_the_process():
    settled = (
        "from mlx_llava.model.linux import adopt as l; print(l._settle_process.cache_info()[3])"
    )
    assert blas_in("from mlx_llava import load; " + settled) == "0"


def dtypes(model) -> set[mx.Dtype]:
    return {array.dtype for array in precision.arrays_of(model)}


@pytest.fixture
def no_numba(monkeypatch):
    """Nothing reads few bits fast."""
    for module in (layers, weights):
        monkeypatch.setattr(module, "kernels", lambda: None)


@on_linux_cpu
@pytest.mark.parametrize("quantization", [None, Quantization(bits=4, group_size=32)], ids=str)
def test_a_cpu_computes_in_float32(tmp_path, caplog, quantization, no_numba):
    convert(GOLDENS / "llava", tmp_path / "m", dtype="bfloat16", quantization=quantization)
    with caplog.at_level(logging.WARNING, "mlx_llava"):
        model, processor = load(tmp_path / "m")
    assert dtypes(model) == {mx.float32}
    assert not any(is_quantized(layer) for layer in model.modules())
    assert model.config.quantization is None
    assert ("From 4 bits to float32 for the CPU: 0.2 MB." in caplog.text) == bool(quantization)
    assert_computes_as_stored(model, processor, tmp_path / "m")


@on_linux_cpu
@pytest.mark.parametrize("bits", [None, 4])
def test_a_small_model_becomes_float32_without_numba(tmp_path, caplog, monkeypatch, bits):
    quantization = Quantization(bits=bits, group_size=32) if bits else None
    convert(GOLDENS / "llava", tmp_path / "m", dtype="bfloat16", quantization=quantization)
    monkeypatch.setattr(precision, "SMALL", 1 << 26)
    monkeypatch.setattr(precision, "is_read_fast", None)
    with caplog.at_level(logging.INFO, "mlx_llava"):
        model, processor = load(tmp_path / "m")
    assert dtypes(model) == {mx.float32}
    assert not caplog.text
    assert_computes_as_stored(model, processor, tmp_path / "m")


def assert_computes_as_stored(model, processor, folder):
    stored, _ = load_as_stored(folder)
    assert mx.bfloat16 in dtypes(stored)
    stored.set_dtype(mx.float32)
    inputs = processor("What is this?", PICTURE)
    assert mx.allclose(model(**inputs), stored(**inputs), atol=1e-4)


@on_linux_cpu
@pytest.mark.parametrize("kind", ["bfloat16", "3 bits", "4 bits"])
def test_few_bits_stay_where_they_are_read_faster(tmp_path, caplog, kind):
    """Which 3 bits are not."""
    pytest.importorskip("numba")
    bits = int(kind[0]) if kind.endswith("bits") else None
    quantization = Quantization(bits=bits, group_size=32) if bits else None
    convert(GOLDENS / "llava", tmp_path / "m", dtype="bfloat16", quantization=quantization)
    with caplog.at_level(logging.INFO, "mlx_llava"):
        model, processor = load(tmp_path / "m")
    narrow = {"bfloat16": mx.bfloat16, "3 bits": mx.float32, "4 bits": mx.uint32}[kind]
    block, projector = model.language_model.layers[0], model.multi_modal_projector
    assert block.mlp.up_proj.weight.dtype == narrow
    if kind == "4 bits":
        assert block.mlp.up_proj.scales.dtype == mx.bfloat16
        assert model.language_model.model.embed_tokens.scales.dtype == mx.float32
    assert model.language_model.dtype == model.vision_tower.dtype == mx.float32
    assert projector.linear_1.weight.dtype == mx.float32
    assert (model.config.quantization is None) == (kind != "4 bits")
    assert f"{kind} are read as they are: 0.1 MB, in float32 0.2 MB." in caplog.text or bits == 3
    assert_computes_as_stored(model, processor, tmp_path / "m")


@on_linux_cpu
@pytest.mark.parametrize("bits", [None, 4])
def test_what_would_not_fit_in_float32_stays(tmp_path, caplog, monkeypatch, no_numba, bits):
    quantization = Quantization(bits=bits, group_size=32) if bits else None
    convert(GOLDENS / "llava", tmp_path / "m", dtype="bfloat16", quantization=quantization)
    monkeypatch.setattr(precision, "available_memory", lambda: 1000)
    with caplog.at_level(logging.WARNING, "mlx_llava"):
        model, processor = load(tmp_path / "m")
    assert (mx.uint32 if bits else mx.bfloat16) in dtypes(model)
    kind = "4 bits" if bits else "bfloat16"
    assert f"0.0 MB are free; they stay in {kind}, which is slow on a CPU." in caplog.text
    assert_computes_as_stored(model, processor, tmp_path / "m")


def test_weights_that_cannot_fit_are_refused(monkeypatch):
    monkeypatch.setattr(device, "total_memory", lambda: 10_000)
    with pytest.raises(ValueError, match=r"take 0.0 GB and .* 0.0 GB of mem.*; conv"):
        load(GOLDENS / "llava")


@pytest.mark.parametrize(
    ("info", "total", "free", "said"),
    [
        (
            {"max_recommended_working_set_size": 6 * 10**9, "memory_size": 8 * 10**9},
            *(6 * 10**9, 5 * 10**9, "Metal recommends at most 6.0 GB of this machine's 8 GB of"),
        ),
        (
            {"total_memory": 8 * 10**9, "free_memory": 3 * 10**9},
            *(8 * 10**9, 5 * 10**9, "this graphics card has 8.0 GB of"),
        ),
    ],
    ids=["metal", "cuda"],
)
def test_each_kind_of_gpu_tells_its_memory(monkeypatch, info, total, free, said):
    """Names as of MLX's backend/metal/device_info.cpp and backend/cuda/device_info.cpp."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 10**9)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 2 * 10**9)
    assert (device.total_memory(), device.available_memory()) == (total, free)
    assert device.memory_said() == f"{said} memory"


def test_a_prompt_that_cannot_fit_is_refused(loaded, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"\d+ tokens of prompt and 5 of answer need .*pictures 0"):
        next(stream_generate(*loaded, "hi", PICTURE, max_tokens=5))
    monkeypatch.undo()
    assert generate(*loaded, "hi", PICTURE, max_tokens=5)


def test_the_estimate_of_keys_and_values_is_exact():
    model, processor = load(dtype="float32")
    inputs = processor("hi", PICTURE)
    length = inputs.input_ids.shape[1]
    for bits in (None, 8, 4):
        cache = make_cache(model.config.text_config, length, bits)
        model.language_model(input_embeddings=model.embed(**inputs), cache=cache)
        capacity = cache[0].keys[0].shape[-2] if bits else cache[0].keys.shape[2]
        assert memory.kv_bytes(model.config, capacity, 4, bits) == nbytes(cache)


@on_linux_cpu
def test_resident_memory_does_not_grow_with_requests(loaded):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    def ask(times: int) -> None:
        for _ in range(times):
            generate(*loaded, "What is this?", PICTURE, max_tokens=3)

    ask(50)
    before = resident()
    ask(100)
    assert resident() < 1.02 * before
