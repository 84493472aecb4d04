"""Products with weights as they are stored are those of the same numbers in float64."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava.model.linux import products, weights
from mlx_llava.model.linux.functions import NUMPY, view
from mlx_llava.model.linux.products import multiply, multiply_back
from mlx_llava.model.linux.weights import Affine, Half, Plain

pytestmark = pytest.mark.skipif(not NUMPY, reason="NumPy multiplies on Linux only")
HAS_NUMBA = NUMPY and weights.kernels() is not None
NEEDS_NUMBA = "there is no numba: pip install '.[cpu]'"
ROWS = (1, 3, 4, 5, 16, 17, 100, 600)
OUTPUTS, INPUTS = 37, 384


@pytest.fixture(params=["numba", "numba and BLAS", "numpy"])
def kernels(request, monkeypatch):
    """What numba compiles, with vectors that are registers or not, and NumPy in its place."""
    if request.param == "numpy":
        monkeypatch.setattr(weights, "kernels", lambda: None)
    elif not HAS_NUMBA:
        pytest.skip(NEEDS_NUMBA)
    else:
        monkeypatch.setattr(weights.columns(), "WIDE", request.param == "numba")


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def check(weight, plain):
    """Few rows and many, forth and back, against float64."""
    plain = np.asarray(plain, np.float64)
    for rows in ROWS:
        x = normal(rows, INPUTS)
        expected = x.astype(np.float64) @ plain.T
        error = np.linalg.norm(multiply(x, weight)[0] - expected)
        assert error < 2e-6 * np.linalg.norm(expected), rows
    y = normal(2, 3, OUTPUTS)
    expected = y @ plain
    assert np.linalg.norm(multiply_back(y, weight) - expected) < 2e-6 * np.linalg.norm(expected)


def affine(bits, group, dtype=mx.float32, permutation=None):
    """Codes of a random matrix, and the numbers that they stand for."""
    codes, *floats = mx.quantize(mx.array(normal(OUTPUTS, INPUTS)), group_size=group, bits=bits)
    stored = [array.astype(dtype) for array in floats]
    wide = [array.astype(mx.float32) for array in stored]
    plain = mx.dequantize(codes, *wide, group_size=group, bits=bits)
    words = [view(array.view(mx.uint16) if array.itemsize == 2 else array) for array in stored]
    weight = Affine(view(codes), *words, bits, dtype == mx.bfloat16, permutation)
    return weight, view(plain)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes(bits, group, dtype, kernels):
    check(*affine(bits, group, dtype))


@pytest.mark.parametrize("bits", [3, 4])
def test_permuted_codes(bits, kernels):
    permutation = np.random.default_rng(1).permutation(INPUTS).astype(np.int32)
    weight, plain = affine(bits, 32, permutation=permutation)
    check(weight, plain[:, np.argsort(permutation)])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rows_of_codes(bits, dtype, kernels):
    weight, plain = affine(bits, 64, dtype)
    ids = np.array([[3, 0, 36], [7, 7, 1]])
    assert np.allclose(weight.rows(ids), plain[ids], atol=1e-6)


def test_float16_of_every_size(kernels):
    """Zeros, subnormals and the largest as well."""
    words = np.arange(1 << 16, dtype=np.uint16)
    words = words[np.isfinite(words.view(np.float16))][: OUTPUTS * INPUTS * 4]
    for part in np.array_split(words, 4):
        words = np.resize(part, (OUTPUTS, INPUTS))
        weight = Half(words, is_bfloat16=False)
        assert np.array_equal(weight.block(0, OUTPUTS), words.view(np.float16).astype(np.float32))
        check(weight, words.view(np.float16))


def test_bfloat16(kernels):
    words = (normal(OUTPUTS, INPUTS).view(np.uint32) >> 16).astype(np.uint16)
    check(Half(words, is_bfloat16=True), (words.astype(np.uint32) << 16).view(np.float32))


def test_float32():
    values = normal(OUTPUTS, INPUTS)
    check(Plain(values), values)


def test_parts_of_several_threads_and_blocks(kernels, monkeypatch):
    monkeypatch.setattr("mlx_llava.model.linux.threads.threads", lambda: 3)
    monkeypatch.setattr("mlx_llava.model.linux.threads.SMALLEST", 0)
    monkeypatch.setattr(products, "BLOCK", 5 * INPUTS)
    check(*affine(4, 64))
    check(Plain(values := normal(OUTPUTS, INPUTS)), values)


@pytest.mark.skipif(not HAS_NUMBA, reason=NEEDS_NUMBA)
@pytest.mark.parametrize("can_write", [True, False])
def test_kernels_are_kept_where_a_folder_can_be_written(tmp_path, can_write):
    """And work where there is none, which numba refuses."""
    forbid = "def f(self): raise PermissionError\nc._CacheLocator.ensure_cache_path = f\n"
    code = (
        "import numba.core.caching as c, numpy as np\n"
        f"{'' if can_write else forbid}"
        "from mlx_llava.model.linux.kernels import dot_bfloat16 as dot\n"
        "x = np.ones(32, 'f4')\n"
        "dot(np.full((2, 32), 0x3F80, 'u2'), x, output := np.zeros(2, 'f4'))\n"
        "print(output)"
    )
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_DEBUG_CACHE": "1"}
    for hits in (0, can_write):
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert run.stdout.endswith("[32. 32.]\n")
        assert run.stdout.count("data loaded from") == hits
    assert any(tmp_path.iterdir()) == can_write


def double(x, output):
    output[:] = x + x


@pytest.mark.skipif(not HAS_NUMBA, reason=NEEDS_NUMBA)
@pytest.mark.parametrize("cut", ["*.nbi", "*.nbc"])
def test_kernels_work_where_a_disk_is_full_or_a_file_was_cut_off(tmp_path, monkeypatch, cut):
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def doubled() -> list[float]:
        weights.kernels().compiled(double)(normal(3), output := np.zeros(3, np.float32))
        return (output / normal(3)).tolist()

    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        assert doubled() == [2, 2, 2]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert doubled() == [2, 2, 2]
    (file,) = tmp_path.rglob(cut)
    file.write_bytes(file.read_bytes()[:20])
    assert doubled() == [2, 2, 2]


@pytest.mark.skipif(not HAS_NUMBA, reason=NEEDS_NUMBA)
def test_kernels_of_other_codes_are_kept_in_other_files(monkeypatch):
    kernels = weights.kernels()
    monkeypatch.setattr(kernels, "compiled", lambda function: function)
    codes = list(product(kernels.WHOLE, (4, 8)))
    names = {kernels.dot_words.__wrapped__(*code).__qualname__ for code in codes}
    assert len(names) == len(codes)
