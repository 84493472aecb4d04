"""GPTQ and AWQ -> MLX's affine quantisation, code for code.

All three say w = scale (q - zero) with q in a few bits; they differ in how q and zero lie in
32-bit words. MLX keeps q as one stream of bits along the inputs, and bias = -scale zero.
formats: GPTQ-for-LLaMa quant.py, AutoAWQ packing_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_llava.checkpoint.tensors import LazyTensor, from_array

#: AutoAWQ's order of the eight 4-bit columns in a word, undone.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
_PART = re.compile(rf"^(.*)\.({'|'.join(_PARTS)})$")
#: MLX's group sizes for affine quantisation, the largest first.
_GROUP_SIZES = (128, 64, 32)


@dataclass
class Repacked:
    """A checkpoint with MLX's tensors in place of another's.

    Attributes:
        tensors: by key, as found but for the quantised layers.
        settings: bits and group_size of each quantised layer, by key without its last part.
        dropped: what was left out: source -> reason.
    """

    tensors: dict[str, LazyTensor]
    settings: dict[str, dict[str, Any]]
    dropped: dict[str, str]


def is_packed(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether there are layers of GPTQ or AWQ."""
    return any(key.endswith(".qweight") for key in tensors)


def repack(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Repacked:
    """Repacks every GPTQ or AWQ layer; what MLX has no layout for becomes plain weights.

    Args:
        tensors (dict): As found, by key.
        config (dict): ``quantization_config`` or the content of quantize_config.json.

    Raises:
        ValueError: A layer is incomplete or of an unknown kind.
    """
    layers = {key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}
    result = Repacked({}, {}, {})
    for key, tensor in tensors.items():
        match = _PART.match(key)
        if not match or match[1] not in layers:
            result.tensors[key] = tensor
    for path in sorted(layers):
        parts = {part: tensors[f"{path}.{part}"] for part in _PARTS if f"{path}.{part}" in tensors}
        if missing := {"qweight", "qzeros", "scales"} - set(parts):
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}.")
        _repack_layer(path, parts, config, result)
    return result


def _repack_layer(
    path: str,
    parts: dict[str, LazyTensor],
    config: Mapping[str, Any],
    result: Repacked,
) -> None:
    """Adds MLX's tensors for one layer."""
    qweight, scales = parts["qweight"], parts["scales"]
    groups, out = scales.shape
    is_awq = qweight.shape[1] * 8 == out
    if is_awq and config.get("version", "gemm").lower() != "gemm":
        raise ValueError(f"AWQ version {config['version']!r} is not supported, only gemm.")
    bits = 4 if is_awq else parts["qzeros"].shape[1] * 32 // out
    inputs = qweight.shape[0] if is_awq else qweight.shape[0] * 32 // bits
    given = config.get("group_size") or 0  # -1 is one group for each column
    is_ragged = inputs % groups or (given > 0 and inputs % given)
    group_size = None if is_ragged else _group_size(inputs // groups)
    order = None
    if not is_awq and group_size:
        order = _input_order(parts.get("g_idx"), inputs, groups)
    unpack = _unpack_awq if is_awq else _unpack_gptq
    # GPTQ stores zero - 1, except in files that say gptq_v2.
    plus = int(not is_awq and config.get("checkpoint_format") != "gptq_v2")
    bias = parts.get("bias")
    if bias is not None and not mx.any(bias.read() != 0).item():
        result.dropped[bias.source] = "is zero"
    elif bias is not None:
        result.tensors[f"{path}.bias"] = bias

    def zeros() -> npt.NDArray[np.int64]:
        return unpack(np.array(parts["qzeros"].read()), bits, 1).astype(np.int64) + plus

    if group_size is None:
        result.tensors[f"{path}.weight"] = LazyTensor(
            qweight.source,
            (out, inputs),
            scales.dtype,
            lambda: _dequantize(parts, zeros(), bits, unpack, given),
        )
        return

    def codes() -> mx.array:
        values = unpack(np.array(qweight.read()), bits, 1 if is_awq else 0).T
        return mx.array(pack(values if order is None else values[:, order], bits))

    repeat = inputs // group_size // groups
    shape = (out, inputs * bits // 32)
    if is_awq or order is not None:
        result.tensors[f"{path}.weight"] = LazyTensor(qweight.source, shape, mx.uint32, codes)
    else:  # GPTQ's words run along the inputs, as MLX's do: only the matrix is turned
        result.tensors[f"{path}.weight"] = qweight.then(
            lambda words: mx.contiguous(words.transpose()).view(mx.uint32)
        )

    def biases() -> mx.array:
        scale = scales.read().astype(mx.float32)
        bias = -scale * mx.array(zeros().astype(np.float32))
        return mx.repeat(bias.transpose(), repeat, axis=1).astype(scales.dtype)

    turned = scales.then(lambda scale: mx.repeat(scale.transpose(), repeat, axis=1))
    result.tensors[f"{path}.scales"] = turned
    source = parts["qzeros"].source
    result.tensors[f"{path}.biases"] = LazyTensor(source, turned.shape, scales.dtype, biases)
    if order is not None:
        permutation = mx.array(order.astype(np.int32))
        key = f"{path}.input_permutation"
        result.tensors[key] = from_array(parts["g_idx"].source, permutation)
    elif "g_idx" in parts:
        result.dropped[parts["g_idx"].source] = "inputs are in order"
    result.settings[path] = {"bits": bits, "group_size": group_size}


def _group_size(size: int) -> int | None:
    """MLX's group size for groups of a size, which may be parts of them; None if none fits."""
    return next((part for part in _GROUP_SIZES if size % part == 0), None)


def _input_order(
    g_idx: LazyTensor | None, inputs: int, groups: int
) -> npt.NDArray[np.int64] | None:
    """Which input comes at each place when they are sorted by group; None if they are."""
    if g_idx is None:
        return None
    index = np.array(g_idx.read())
    order: npt.NDArray[np.int64] = np.argsort(index, kind="stable")
    if not np.array_equal(index[order], np.arange(inputs) // (inputs // groups)):
        raise ValueError(f"{g_idx.source} does not divide {inputs} inputs into {groups} groups.")
    return None if np.array_equal(order, np.arange(inputs)) else order


def _unpack_gptq(words: npt.NDArray[Any], bits: int, axis: int) -> npt.NDArray[np.uint8]:
    """The codes in a stream of bits along an axis, the lowest bit first."""
    rows = np.ascontiguousarray(np.moveaxis(words, axis, -1)).view(np.uint8)
    stream = np.unpackbits(rows, axis=-1, bitorder="little").reshape(rows.shape[0], -1, bits)
    codes = np.packbits(stream, axis=-1, bitorder="little")[..., 0]
    return np.moveaxis(codes, -1, axis)


def _unpack_awq(words: npt.NDArray[Any], bits: int, axis: int) -> npt.NDArray[np.uint8]:
    """The 4-bit codes of AWQ, whose columns are shuffled in each word."""
    codes = _unpack_gptq(words, bits, axis)
    rows, columns = codes.shape
    return codes.reshape(rows, columns // 8, 8)[..., _AWQ_ORDER].reshape(rows, columns)


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """Codes (outputs, inputs) as MLX's stream of bits along the inputs."""
    rows, columns = codes.shape
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little", count=bits)
    packed = np.packbits(stream.reshape(rows, columns * bits), axis=-1, bitorder="little")
    return packed.view(np.uint32)


def _dequantize(
    parts: Mapping[str, LazyTensor],
    zeros: npt.NDArray[np.int64],
    bits: int,
    unpack: Any,
    group_size: int,
) -> mx.array:
    """The weights themselves, (outputs, inputs)."""
    awq = unpack is _unpack_awq
    codes = unpack(np.array(parts["qweight"].read()), bits, 1 if awq else 0).astype(np.float32)
    scales = np.array(parts["scales"].read().astype(mx.float32))
    inputs, groups = codes.shape[0], scales.shape[0]
    index = np.arange(inputs) // (group_size if group_size > 0 else -(-inputs // groups))
    if "g_idx" in parts:
        index = np.array(parts["g_idx"].read())
    weights = scales[index] * (codes - zeros[index])
    return mx.array(weights.T).astype(parts["scales"].dtype)
