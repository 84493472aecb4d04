"""llama.cpp's blocks of quantised weights -> MLX's affine quantisation, or plain numbers.

Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K and Q8_0 say w = scale q + bias for every 32 weights, as MLX
does, so their codes are kept bit for bit. MLX has no layout for the other types, most of which
have groups of 16; gguf's dequantiser reads those.
Formats: llama.cpp, ggml/src/ggml-common.h, and gguf-py, gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

#: A file's rows as 16-bit words, (rows, blocks, words of a block).
Words = npt.NDArray[np.uint16]
Bytes = npt.NDArray[np.uint8]

GROUP_SIZE = 32


@dataclass(frozen=True)
class Blocks:
    """A type of blocks that MLX's quantisation says as well."""

    bits: int
    nbytes: int  # of a block
    dtype: mx.Dtype  # of scales and biases; float32 where a scale is the product of two numbers
    codes: Callable[[Words], Bytes]  # words -> MLX's bytes, (rows, bytes)
    affine: Callable[[Words], tuple[mx.array, mx.array]]  # -> scales and biases, (rows, groups)

    def read_codes(self, data: Bytes) -> mx.array:
        """The codes (rows, inputs x bits / 32), uint32, of raw rows (rows, bytes)."""
        parts = [self.codes(self._words(part)) for part in _parts(data)]
        return mx.array(np.concatenate(parts).view(np.uint32))

    def read_affine(self, data: Bytes) -> tuple[mx.array, mx.array]:
        """Scales and biases (rows, inputs / 32) of raw rows (rows, bytes)."""
        return self.affine(self._words(data))

    def _words(self, data: Bytes) -> Words:
        words = np.ascontiguousarray(data).view(np.uint16)
        return words.reshape(len(data), -1, self.nbytes // 2)


def dequantize(data: Bytes, kind: GGMLQuantizationType, dtype: mx.Dtype) -> mx.array:
    """Plain numbers of raw rows (rows, bytes) of any type, a part at a time."""
    from gguf.quants import dequantize

    parts = []
    for part in _parts(data):
        parts.append(mx.array(dequantize(part, kind)).astype(dtype))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def _parts(data: Bytes) -> Iterator[Bytes]:
    """The rows, a few at a time: what stays in a processor's cache is several times faster."""
    step = max(1, (1 << 18) // data.shape[1])
    return (data[start : start + step] for start in range(0, len(data), step))


def _halves(packed: Words) -> Bytes:
    """4-bit codes of a first and a second half in each byte -> of two neighbours, as MLX's."""
    packed = np.ascontiguousarray(packed)
    low, high = packed & np.uint16(0x0F0F), packed >> np.uint16(4) & np.uint16(0x0F0F)
    codes = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
    codes[..., 0, :] = low | low >> np.uint16(4)
    codes[..., 1, :] = high | high >> np.uint16(4)
    return codes.reshape(len(packed), -1)


def _fives(codes: Bytes) -> Bytes:
    """5-bit codes, one a byte, as a stream of bits: two, four, then eight of them side by side."""
    x = codes.reshape(len(codes), -1).view(np.uint64)
    for mask, shift in ((0x00FF00FF00FF00FF, 3), (0x0000FFFF0000FFFF, 6), (0x00000000FFFFFFFF, 12)):
        x = x & np.uint64(mask) | (x & ~np.uint64(mask)) >> np.uint64(shift)
    return x.view(np.uint8).reshape(len(codes), -1, 8)[..., :5].reshape(len(codes), -1)


def _nibbles(packed: Words) -> Bytes:
    """4-bit codes (..., 2, bytes), one a byte: the low halves, then the high ones."""
    raw = np.ascontiguousarray(packed).view(np.uint8)
    return np.stack([raw & 15, raw >> 4], axis=-2)


def _half(words: Words) -> mx.array:
    """One float16 a block."""
    return mx.array(np.ascontiguousarray(words).view(np.float16))


def _affine(words: Words, zero: int | None = None) -> tuple[mx.array, mx.array]:
    """A scale and a minimum, or the code that stands for 0."""
    scales = _half(words[..., 0])
    return scales, _half(words[..., 1]) if zero is None else scales * -zero


def _q8_0_codes(words: Words) -> Bytes:
    """int8 -> uint8: 0 becomes 128."""
    codes = np.ascontiguousarray(words[..., 1:] ^ np.uint16(0x8080))
    return codes.reshape(len(codes), -1).view(np.uint8)


def _q5_codes(words: Words) -> Bytes:
    """Words of fifth bits, two a block, then bytes with both halves' others."""
    fifth = np.ascontiguousarray(words[..., :2]).view(np.uint8)
    bits = np.unpackbits(fifth, axis=-1, bitorder="little")
    return _fives(_nibbles(words[..., 2:]).reshape(bits.shape) | bits << np.uint8(4))


def _q4_k_codes(words: Words) -> Bytes:
    """Four times 32 bytes, each of which hold two groups."""
    return _halves(words[..., 8:].reshape(len(words), -1, 16))


def _q5_k_codes(words: Words) -> Bytes:
    """32 bytes with a fifth bit for each of eight groups, then four times 32 as in Q4_K."""
    fifth = np.ascontiguousarray(words[..., 8:24]).view(np.uint8)[..., None, :]
    bits = fifth >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    packed = words[..., 24:].reshape(*words.shape[:2], 4, 16)
    return _fives(_nibbles(packed).reshape(bits.shape) | bits << np.uint8(4))


def _k_affine(words: Words) -> tuple[mx.array, mx.array]:
    """Eight groups' 6-bit scales and minima, in 12 bytes, times the block's own."""
    packed = np.ascontiguousarray(words[..., 2:8]).view(np.uint8)
    first, second, mixed = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, mixed & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, mixed >> 4 | second >> 6 << 4], axis=-1)
    outer = _half(words[..., :2]).astype(mx.float32)
    shape = (len(words), -1)
    return (
        (outer[..., :1] * mx.array(scales)).reshape(shape),
        (-outer[..., 1:] * mx.array(minima)).reshape(shape),
    )


#: By gguf's name of the type.
BLOCKS: dict[str, Blocks] = {
    "Q4_0": Blocks(4, 18, mx.float16, lambda w: _halves(w[..., 1:]), lambda w: _affine(w, 8)),
    "Q4_1": Blocks(4, 20, mx.float16, lambda w: _halves(w[..., 2:]), _affine),
    "Q4_K": Blocks(4, 144, mx.float32, _q4_k_codes, _k_affine),
    "Q5_0": Blocks(5, 22, mx.float16, lambda w: _q5_codes(w[..., 1:]), lambda w: _affine(w, 16)),
    "Q5_1": Blocks(5, 24, mx.float16, lambda w: _q5_codes(w[..., 2:]), _affine),
    "Q5_K": Blocks(5, 176, mx.float32, _q5_k_codes, _k_affine),
    "Q8_0": Blocks(8, 34, mx.float16, _q8_0_codes, lambda w: _affine(w, 128)),
}
