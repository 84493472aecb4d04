"""As passes.py, compiled by numba: all rows in one call, which another thread need not wait for.

NumPy's own calls take turns at the interpreter's lock, some microseconds each.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from mlx_llava.model.linux.kernels import FAST, Floats, compiled, jit
from mlx_llava.model.linux.passes import ERFC

_HALF_ROOT = np.float32(math.sqrt(0.5))
_float, _word, _int = np.float32, np.uint32, np.int32
_PER_OCTAVE, _HIGH, _LOW = _float(1 / math.log(2)), _float(0.693359375), _float(-2.12194440e-4)
#: Below, e to the x is 0 here; above, it is as of this.
_LEAST, _MOST = _float(-87), _float(88)


@njit(nogil=True, fastmath=FAST - {"reassoc"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _exp(x: np.float32) -> np.float32:
    """e to the x: 2^n, which is made of bits, times e^r of a polynomial (Cephes' expf)."""
    bounded = min(max(x, _LEAST), _MOST)
    n = np.floor(bounded * _PER_OCTAVE + _float(0.5))
    r = bounded - n * _HIGH - n * _LOW
    power = _float(1.9875691500e-4)
    power = power * r + _float(1.3981999507e-3)
    power = power * r + _float(8.3334519073e-3)
    power = power * r + _float(4.1665795894e-2)
    power = power * r + _float(1.6666665459e-1)
    power = power * r + _float(5.0000001201e-1)
    power = power * r * r + r + _float(1)
    scaled = power * _word((_int(n) + _int(127)) << _int(23)).view(np.float32)
    return scaled if x > _LEAST else _float(0)


@compiled
def exponentiate(scores: Floats, largest: Floats, sums: Floats) -> None:
    """e to the scores (N, T) less the largest of their row, in place; their sums (N,)."""
    for n in range(len(scores)):
        total = _float(0)
        for t in range(scores.shape[1]):
            power = _exp(scores[n, t] - largest[n])
            scores[n, t] = power
            total += power
        sums[n] = total


@jit
def _gate(x: np.float32, outer: np.float32, inner: np.float32) -> np.float32:
    return x / (_float(1) + _exp(outer * (x + inner * x * x * x)))


@compiled
def gate(output: Floats, x: Floats, slope: float, cubic: float) -> None:
    """x sigmoid(slope (x + cubic x^3)), flat."""
    outer, inner = _float(-slope), _float(cubic)
    for i in range(len(x)):
        output[i] = _gate(x[i], outer, inner)


@compiled
def gate_times(output: Floats, x: Floats, factor: Floats, slope: float, cubic: float) -> None:
    """The same times something."""
    outer, inner = _float(-slope), _float(cubic)
    for i in range(len(x)):
        output[i] = _gate(x[i], outer, inner) * factor[i]


@compiled
def gelu(output: Floats, x: Floats) -> None:
    """x times the normal distribution's share below x."""
    for i in range(len(x)):
        z = abs(x[i]) * _HALF_ROOT
        t = _float(1) / (_float(1) + _float(0.5) * z)
        power = ERFC[9]
        power = power * t + ERFC[8]
        power = power * t + ERFC[7]
        power = power * t + ERFC[6]
        power = power * t + ERFC[5]
        power = power * t + ERFC[4]
        power = power * t + ERFC[3]
        power = power * t + ERFC[2]
        power = power * t + ERFC[1]
        power = power * t + ERFC[0]
        beyond = _float(0.5) * t * _exp(power - z * z)
        output[i] = x[i] * (_float(1) - beyond if x[i] > _float(0) else beyond)


@compiled
def rms_norm(output: Floats, x: Floats, weight: Floats, eps: float) -> None:
    """RMSNorm, (N, D)."""
    D = x.shape[1]
    for n in range(len(x)):
        squares = _float(0)
        for i in range(D):
            squares += x[n, i] * x[n, i]
        factor = _float(1) / np.sqrt(squares / _float(D) + _float(eps))
        for i in range(D):
            output[n, i] = x[n, i] * factor * weight[i]


@compiled
def layer_norm(output: Floats, x: Floats, weight: Floats, bias: Floats, eps: float) -> None:
    """LayerNorm, (N, D)."""
    D = x.shape[1]
    for n in range(len(x)):
        total = _float(0)
        for i in range(D):
            total += x[n, i]
        mean, squares = total / _float(D), _float(0)
        for i in range(D):
            squares += (x[n, i] - mean) * (x[n, i] - mean)
        factor = _float(1) / np.sqrt(squares / _float(D) + _float(eps))
        for i in range(D):
            output[n, i] = (x[n, i] - mean) * factor * weight[i] + bias[i]


@compiled
def rotate(output: Floats, x: Floats, cosine: Floats, sine: Floats) -> None:
    """As `llama.Attention.rope` does (N, H, W), by angles (N, W / 2)."""
    half = x.shape[2] // 2
    for n in range(len(x)):
        for h in range(x.shape[1]):
            for i in range(half):
                left, right = x[n, h, i], x[n, h, half + i]
                output[n, h, i] = left * cosine[n, i] - right * sine[n, i]
                output[n, h, half + i] = left * sine[n, i] + right * cosine[n, i]


@compiled
def add(output: Floats, x: Floats, y: Floats) -> None:
    """The sum, (N, D)."""
    for n in range(len(x)):
        for i in range(x.shape[1]):
            output[n, i] = x[n, i] + y[n, i]
