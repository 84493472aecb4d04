"""What a block does to each token between its products, in NumPy; compiled_passes.py has the same.

Each function reads and writes some rows, which should stay in a core's cache.

N rows, D width, T keys, H heads, W head width.
"""

from __future__ import annotations

import math

import numpy as np

from mlx_llava.model.linux.weights import Array

#: erfc(z) is t e to the -z^2 + ERFC[0] + ERFC[1] t + ..., with t = 1 / (1 + z / 2).
ERFC = tuple(
    np.float32(number)
    for number in (
        *(-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806),
        *(0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277),
    )
)


def exponentiate(scores: Array, largest: Array, sums: Array) -> None:
    """e to the scores (N, T) less the largest of their row, in place; their sums (N,)."""
    scores -= largest[:, None]
    np.exp(scores, out=scores)
    np.sum(scores, axis=1, out=sums)


def gate(output: Array, x: Array, slope: float, cubic: float) -> None:
    """x sigmoid(slope (x + cubic x^3)), flat."""
    np.multiply(x, np.float32(-slope), out=output)
    with np.errstate(over="ignore"):  # x / inf is the right 0
        if cubic:
            output *= 1 + np.float32(cubic) * (x * x)
        np.exp(output, out=output)
    output += 1
    np.divide(x, output, out=output)


def gate_times(output: Array, x: Array, factor: Array, slope: float, cubic: float) -> None:
    """The same times something."""
    gate(output, x, slope, cubic)
    output *= factor


def gelu(output: Array, x: Array) -> None:
    """x times the normal distribution's share below x, by erfc to 2e-7 (Numerical Recipes)."""
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + z / 2)
    power = np.full_like(t, ERFC[-1])
    for coefficient in reversed(ERFC[:-1]):
        power *= t
        power += coefficient
    np.exp(power - z * z, out=output)
    output *= t / 2
    np.subtract(1, output, out=output, where=x > 0)
    output *= x


def rms_norm(output: Array, x: Array, weight: Array, eps: float) -> None:
    """RMSNorm, (N, D)."""
    np.multiply(x, _scale(x, eps), out=output)
    output *= weight


def layer_norm(output: Array, x: Array, weight: Array, bias: Array, eps: float) -> None:
    """LayerNorm, (N, D)."""
    np.subtract(x, x.mean(axis=1, keepdims=True), out=output)
    output *= _scale(output, eps)
    output *= weight
    output += bias


def _scale(x: Array, eps: float) -> Array:
    squares = np.einsum("ij,ij->i", x, x)[:, None] / np.float32(x.shape[1])
    return 1 / np.sqrt(squares + np.float32(eps))


def rotate(output: Array, x: Array, cosine: Array, sine: Array) -> None:
    """As `llama.Attention.rope` does (N, H, W), by angles (N, W / 2)."""
    half, cosine, sine = x.shape[2] // 2, cosine[:, None], sine[:, None]
    left, right = x[..., :half], x[..., half:]
    np.subtract(left * cosine, right * sine, out=output[..., :half])
    np.add(left * sine, right * cosine, out=output[..., half:])


def add(output: Array, x: Array, y: Array) -> None:
    """The sum."""
    np.add(x, y, out=output)
