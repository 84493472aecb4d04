"""GPTQ and AWQ -> MLX's affine quantisation, code for code.

All three say w = scale (q - zero) with q in a few bits; they differ in how q and zero lie in
32-bit words. MLX keeps q as one stream of bits along the inputs, and bias = -scale zero.
formats: GPTQ-for-LLaMa quant.py, AutoAWQ packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_llava.checkpoint.tensors import Canonical, LazyTensor, from_array
from mlx_llava.json_files import read_json

#: AutoAWQ's order of the eight 4-bit columns in a word, undone.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
#: MLX's group sizes for affine quantisation, the largest first.
_GROUP_SIZES = (128, 64, 32)


def repack_folder(path: Path, data: dict[str, Any], found: Canonical) -> None:
    """MLX's layout for the layers of GPTQ and AWQ, if there are any; other codes are refused.

    Where a config speaks of codes and all weights are plain, they were dequantised, or would be
    quantised by the program that loads them; it loses its ``quantization_config``.
    """
    if any(name.endswith(".qweight") for name in found.tensors):
        beside = read_json((path if path.is_dir() else path.parent) / "quantize_config.json")
        repack(found, data.pop("quantization_config", None) or beside)
        return
    settings = data.get("quantization_config")
    if isinstance(settings, Mapping) and "quant_method" in settings:
        for name, tensor in found.tensors.items():
            is_codes = name.endswith(".weight") and not mx.issubdtype(tensor.dtype, mx.floating)
            if is_codes or ".weight_" in name or ".weight." in name:
                raise ValueError(
                    f"The weights are quantised with {settings['quant_method']!r} ({name}), which "
                    "is not read; take the checkpoint in 16 bits, and quantise it with convert -q."
                )
        del data["quantization_config"]


def repack(found: Canonical, config: Mapping[str, Any]) -> None:
    """Repacks every GPTQ or AWQ layer; what MLX has no layout for becomes plain weights."""
    for path in [n.removesuffix(".qweight") for n in found.tensors if n.endswith(".qweight")]:
        names = {part: f"{path}.{part}" for part in _PARTS if f"{path}.{part}" in found.tensors}
        if missing := {"qweight", "qzeros", "scales"} - names.keys():
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}.")
        parts = {part: found.tensors.pop(name) for part, name in names.items()}
        _repack_layer(path, parts, config, found)


@dataclass(frozen=True)
class _Layer:
    parts: Mapping[str, LazyTensor]  # as found; scales are (groups, outputs)
    is_awq: bool  # packed by AutoAWQ along the outputs, not by GPTQ along the inputs
    bits: int
    plus: int  # what is added to a stored zero: GPTQ stores zero - 1, unless it says gptq_v2
    group_of: npt.NDArray[np.int64]  # which group each input belongs to

    @classmethod
    def read(cls, parts: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> _Layer:
        qweight, (groups, out) = parts["qweight"], parts["scales"].shape
        is_awq = qweight.shape[1] * 8 == out
        if is_awq and config.get("version", "gemm").lower() != "gemm":
            raise ValueError(f"AWQ version {config['version']!r} is not supported, only gemm.")
        bits = 4 if is_awq else parts["qzeros"].shape[1] * 32 // out
        inputs = qweight.shape[0] if is_awq else qweight.shape[0] * 32 // bits
        size = config.get("group_size") or -1  # -1 is one group for each column
        group_of = np.arange(inputs) // (size if size > 0 else -(-inputs // groups))
        if "g_idx" in parts:
            group_of = np.array(parts["g_idx"].read(), dtype=np.int64)
        plus = int(not is_awq and config.get("checkpoint_format") != "gptq_v2")
        return cls(parts, is_awq, bits, plus, group_of)

    @property
    def order(self) -> npt.NDArray[np.int64]:
        return np.argsort(self.group_of, kind="stable")

    @property
    def is_in_order(self) -> bool:
        return bool((np.diff(self.group_of) >= 0).all())

    @property
    def group_size(self) -> int | None:
        """MLX's group size for these groups, or for parts of them; None if none fits."""
        groups = self.parts["scales"].shape[0]
        counts = np.bincount(self.group_of, minlength=groups)
        if len(counts) > groups or counts.min() != counts.max():
            return None
        return next((size for size in _GROUP_SIZES if counts[0] % size == 0), None)

    def codes(self) -> npt.NDArray[np.uint8]:
        """(inputs, outputs)."""
        return self._unpack("qweight", axis=0)

    def zeros(self) -> npt.NDArray[np.int64]:
        """(groups, outputs)."""
        return self._unpack("qzeros", axis=1).astype(np.int64) + self.plus

    def _unpack(self, part: str, axis: int) -> npt.NDArray[np.uint8]:
        """The codes in a stream of bits along an axis, the lowest bit first; AWQ's are shuffled."""
        words = np.array(self.parts[part].read())
        rows = np.ascontiguousarray(np.moveaxis(words, -1 if self.is_awq else axis, -1))
        stream = np.unpackbits(rows.view(np.uint8), axis=-1, bitorder="little")
        stream = stream.reshape(len(rows), -1, self.bits)
        codes = np.packbits(stream, axis=-1, bitorder="little")[..., 0]
        if self.is_awq:
            return codes.reshape(len(rows), -1, 8)[..., _AWQ_ORDER].reshape(codes.shape)
        return np.moveaxis(codes, -1, axis)

    def packed(self) -> LazyTensor:
        """The codes as MLX lays them out, (outputs, inputs x bits / 32)."""
        qweight = self.parts["qweight"]
        if self.is_in_order and not self.is_awq:
            # GPTQ's words run along the inputs, as MLX's do: only the matrix is turned.
            return qweight.then(lambda words: mx.contiguous(words.transpose()).view(mx.uint32))
        shape = (self.parts["scales"].shape[1], len(self.group_of) * self.bits // 32)
        read = lambda: mx.array(pack(self.codes()[self.order].T, self.bits))  # noqa: E731
        return LazyTensor(qweight.source, shape, mx.uint32, read)

    def biases(self) -> mx.array:
        """What MLX adds to scale x code, (outputs, groups)."""
        scales = self.parts["scales"].read()
        zeros = mx.array(self.zeros().astype(np.float32))
        return (-scales.astype(mx.float32) * zeros).transpose().astype(scales.dtype)

    def plain(self) -> LazyTensor:
        """The weights themselves, (outputs, inputs)."""
        stored = self.parts["scales"]

        def read() -> mx.array:
            scales = np.array(stored.read().astype(mx.float32))
            shifted = self.codes().astype(np.float32) - self.zeros()[self.group_of]
            return mx.array((scales[self.group_of] * shifted).T).astype(stored.dtype)

        shape = (stored.shape[1], len(self.group_of))
        return LazyTensor(self.parts["qweight"].source, shape, stored.dtype, read)


def _repack_layer(
    path: str, parts: Mapping[str, LazyTensor], config: Mapping[str, Any], result: Canonical
) -> None:
    layer = _Layer.read(parts, config)
    if bias := parts.get("bias"):
        if mx.any(bias.read() != 0).item():
            result.tensors[f"{path}.bias"] = bias
        else:  # GPTQ-for-LLaMa always saves one
            result.dropped[bias.source] = "is zero"
    if (group_size := layer.group_size) is None:
        result.tensors[f"{path}.weight"] = layer.plain()
        return
    repeat = len(layer.group_of) // group_size // parts["scales"].shape[0]
    scales = parts["scales"].then(lambda array: mx.repeat(array.transpose(), repeat, axis=1))
    biases = lambda: mx.repeat(layer.biases(), repeat, axis=1)  # noqa: E731
    result.tensors |= {
        f"{path}.weight": layer.packed(),
        f"{path}.scales": scales,
        f"{path}.biases": LazyTensor(parts["qzeros"].source, scales.shape, scales.dtype, biases),
    }
    if not layer.is_in_order:
        order = mx.array(layer.order.astype(np.int32))
        result.tensors[f"{path}.input_permutation"] = from_array(parts["g_idx"].source, order)
    elif "g_idx" in parts:
        result.dropped[parts["g_idx"].source] = "inputs are in order"
    result.layers[path] = {"bits": layer.bits, "group_size": group_size}


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """Codes (outputs, inputs) as MLX's stream of bits along the inputs."""
    rows, columns = codes.shape
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little", count=bits)
    packed = np.packbits(stream.reshape(rows, columns * bits), axis=-1, bitorder="little")
    return packed.view(np.uint32)
