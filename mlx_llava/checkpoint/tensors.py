"""Tensors of a checkpoint, described now and read later one at a time, by the model's own names.

A name has as many spellings as there were programs: those of transformers 4.36-4.51, 4.52+, 5
and of mlx-vlm, the doubled prefixes of broken round trips between them, the original LLaVA's, and
bare CLIP's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_llava.model.quantized import layer_settings

EMBEDDINGS = "language_model.model.embed_tokens."
LM_HEAD = "language_model.lm_head."
PROJECTOR = "multi_modal_projector."
TOWER = "vision_tower.vision_model."
PATCH_EMBEDDING = f"{TOWER}embeddings.patch_embedding.weight"

#: Applied in order, each as often as it matches.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", LM_HEAD),
    (r"^(language_model|vision_tower|multi_modal_projector)\.\1\.", r"\1."),
    (r"^(language_model\.model)\.(language_model\.)?model\.", r"\1."),
    (r"^language_model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model.model."),
    (r"^vision_tower\.(?!vision_model\.)", TOWER),
    (r"^vision_model\.", TOWER),
    (r"^(model\.)?mm_projector\.clip_layernorm\.", f"{PROJECTOR}projector_layernorm."),
    (r"^(model\.)?mm_projector\.final_linear\.", "mm_projector."),
    (r"^(model\.)?mm_projector\.(?=weight$|bias$)", f"{PROJECTOR}linear_1."),
    *((rf"^(model\.)?mm_projector\.{2 * n}\.", f"{PROJECTOR}linear_{n + 1}.") for n in range(8)),
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model.model."),
)
#: What is no weight of a LLaVA, and why.
_DROPPED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$"), "follows from the config"),
    (re.compile(r"^(text_model\.|text_projection|visual_projection|logit_)"), "CLIP's text"),
    (re.compile(r"(^|\.)vision_(tower|model)\.head\."), "SigLIP's pooling"),
)

#: How file formats name their dtypes -> MLX's, and NumPy's to read them with. NumPy has no
#: bfloat16, and MLX no float64 on a GPU.
FILE_DTYPES: dict[str, tuple[mx.Dtype, str]] = {
    "F64": (mx.float32, "<f8"),
    "F32": (mx.float32, "<f4"),
    "F16": (mx.float16, "<f2"),
    "BF16": (mx.bfloat16, "<u2"),
    "I64": (mx.int64, "<i8"),
    "I32": (mx.int32, "<i4"),
    "I16": (mx.int16, "<i2"),
    "I8": (mx.int8, "i1"),
    "U32": (mx.uint32, "<u4"),
    "U8": (mx.uint8, "u1"),
    "BOOL": (mx.bool_, "?"),
}
#: The bytes of one stored value.
ITEM_SIZES = {kind: np.dtype(stored).itemsize for kind, (_, stored) in FILE_DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a file, or what is computed from some."""

    source: str  # where it comes from, for people
    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]  # reads or computes it, every time anew, and keeps nothing

    @property
    def nbytes(self) -> int:
        """How many bytes it takes once it is read."""
        return math.prod(self.shape) * self.dtype.size

    def then(self, change: Callable[[mx.array], mx.array]) -> LazyTensor:
        """This tensor after a change by MLX operations; shape and dtype follow from it."""
        return combine([self], lambda arrays: change(arrays[0]))


def combine(
    tensors: Sequence[LazyTensor], compute: Callable[[list[mx.array]], mx.array]
) -> LazyTensor:
    """What MLX operations make of several tensors; they also run on zeros, to learn its shape."""
    shadow = compute([mx.zeros(tensor.shape, tensor.dtype) for tensor in tensors])
    return LazyTensor(
        source=" + ".join(tensor.source for tensor in tensors),
        shape=shadow.shape,
        dtype=shadow.dtype,
        read=lambda: compute([tensor.read() for tensor in tensors]),
    )


def from_array(source: str, array: mx.array) -> LazyTensor:
    """A tensor that is in memory already."""
    return LazyTensor(source, array.shape, array.dtype, lambda: array)


def to_mlx(array: npt.NDArray[Any], kind: str) -> mx.array:
    """Copies raw values as read from a file into MLX."""
    if kind == "BF16":
        return mx.array(array).view(mx.bfloat16)
    if kind == "F64":
        array = array.astype(np.float32)
    return mx.array(array).astype(FILE_DTYPES[kind][0])


def map_values(path: Path, offset: int, count: int, kind: str) -> npt.NDArray[Any]:
    """Maps `count` values of a file into memory; they leave it with the returned array."""
    dtype = np.dtype(FILE_DTYPES[kind][1])
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


@dataclass
class Canonical:
    """Tensors under their canonical names, in MLX's layout."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)  # what was left out: source -> reason
    # Bits and group_size of layers whose codes were another program's.
    layers: dict[str, dict[str, int]] = field(default_factory=dict)

    def quantization(self) -> dict[str, Any]:
        """MLX's ``quantization`` for these layers: the commonest setting, and all that differ."""
        layers = {path: {**layer, "mode": "affine"} for path, layer in self.layers.items()}
        common = max(layers.values(), key=list(layers.values()).count)
        return {**common, **{path: layer for path, layer in layers.items() if layer != common}}


def canonical_name(key: str) -> str:
    """The canonical name of a tensor or module."""
    for pattern, replacement in _RENAMES:
        while (renamed := re.sub(pattern, replacement, key)) != key:
            key = renamed
    return key


def canonical_tensors(tensors: Mapping[str, LazyTensor], is_mlx: bool) -> Canonical:
    """Renames tensors, drops what is no weight, and lays out the patch convolution for MLX.

    That the files are MLX's own decides between (O, 3, 3, 3) and itself.
    """
    result = Canonical()
    for key, tensor in tensors.items():
        reason = next((why for pattern, why in _DROPPED if pattern.search(key)), None)
        if reason:
            result.dropped[tensor.source] = reason
            continue
        name = canonical_name(key)
        if name in result.tensors:
            other = result.tensors[name].source
            raise ValueError(f"{other} and {tensor.source} are both {name}; remove one of them.")
        result.tensors[name] = tensor
    patches = result.tensors.get(PATCH_EMBEDDING)
    if patches and patches.shape[1] == 3 and not (patches.shape[-1] == 3 and is_mlx):
        result.tensors[PATCH_EMBEDDING] = patches.then(lambda w: w.transpose(0, 2, 3, 1))
    return result


def to_torch_layout(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Lays the patch convolution out as PyTorch does, (O, 3, p, p)."""
    patches = tensors[PATCH_EMBEDDING].then(lambda w: w.transpose(0, 3, 1, 2))
    return {**tensors, PATCH_EMBEDDING: patches}


def plain_layer(
    tensors: dict[str, LazyTensor], path: str, quantization: Mapping[str, Any] | None
) -> None:
    """Puts a plain weight in place of a layer's codes, if it has some, in their scales' dtype."""
    if f"{path}.scales" not in tensors:
        return
    parts = [f"{path}.{part}" for part in ("weight", "scales", "biases")]
    present = [tensors.pop(part) for part in parts if part in tensors]
    settings = layer_settings(quantization or {}, path)
    plain = combine(present, partial(_dequantize, settings=settings))
    if order := tensors.pop(f"{path}.input_permutation", None):
        plain = combine([plain, order], lambda arrays: arrays[0][:, mx.argsort(arrays[1])])
    tensors[f"{path}.weight"] = plain


def _dequantize(arrays: list[mx.array], settings: Mapping[str, Any]) -> mx.array:
    weight, scales, *biases = arrays
    return mx.dequantize(weight, scales, biases[0] if biases else None, **settings)
