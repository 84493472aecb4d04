"""llama.cpp's GGUF pair: a decoder's file and an mmproj file -> canonical tensors and settings.

llama.cpp names tensors its own way, permutes Q and K of LLaMA's, and its legacy LLaVA converter
swaps fc1 and fc2 and drops the tower's last layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_llava.checkpoint.contents import Contents, preprocessing
from mlx_llava.checkpoint.folder import check_download, visible_files
from mlx_llava.checkpoint.gguf_blocks import BLOCKS, GROUP_SIZE, Bytes, dequantize
from mlx_llava.checkpoint.gguf_config import read_config, read_tokenizer, value
from mlx_llava.checkpoint.tensors import (
    FILE_DTYPES,
    TOWER,
    Canonical,
    LazyTensor,
    canonical_tensors,
    map_values,
    to_mlx,
)
from mlx_llava.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

Rows: TypeAlias = npt.NDArray[np.int64]
Read: TypeAlias = Callable[[], mx.array]

#: What llama.cpp calls the decoders that are read; the first is Mistral's and Yi's too.
DECODERS = LLAMA, _, PHI3 = "llama", "qwen2", "phi3"

_BLOCK, _LAYER = r"language_model.model.layers.\1.", TOWER + r"encoder.layers.\1."
_NAMES = (
    (r"^token_embd\.", "language_model.model.embed_tokens."),
    (r"^output_norm\.", "language_model.model.norm."),
    (r"^output\.", "language_model.lm_head."),
    (r"^blk\.(\d+)\.attn_norm\.", _BLOCK + "input_layernorm."),
    (r"^blk\.(\d+)\.ffn_norm\.", _BLOCK + "post_attention_layernorm."),
    (r"^blk\.(\d+)\.attn_output\.", _BLOCK + "self_attn.o_proj."),
    (r"^blk\.(\d+)\.attn_(q|k|v|qkv)\.", _BLOCK + r"self_attn.\2_proj."),
    (r"^blk\.(\d+)\.ffn_(gate|up|down)\.", _BLOCK + r"mlp.\2_proj."),
    (r"^v\.class_embd$", TOWER + "embeddings.class_embedding"),
    (r"^v\.patch_embd\.", TOWER + "embeddings.patch_embedding."),
    (r"^v\.position_embd\.", TOWER + "embeddings.position_embedding."),
    (r"^v\.pre_ln\.", TOWER + "pre_layrnorm."),
    (r"^v\.post_ln\.", TOWER + "post_layernorm."),
    (r"^v\.blk\.(\d+)\.ln([12])\.", _LAYER + r"layer_norm\2."),
    (r"^v\.blk\.(\d+)\.attn_out\.", _LAYER + "self_attn.out_proj."),
    (r"^v\.blk\.(\d+)\.attn_([qkv])\.", _LAYER + r"self_attn.\2_proj."),
    (r"^mm\.(weight|bias)$", r"multi_modal_projector.linear_1.\1"),
    (r"^mm\.0\.", "multi_modal_projector.linear_1."),
    (r"^mm\.2\.", "multi_modal_projector.linear_2."),
    (r"^(model|v)\.image_newline$", "image_newline"),
)
#: What says nothing about weights of ours: read elsewhere, made anew, or CLIP's other half.
_DROPPED = (
    (r"^rope_(freqs|factors_long|factors_short)\.weight$", "is in the config"),
    (r"^blk\.\d+\.attn_rot_embd\b", "follows from the config"),
    (r"^(t\.|text_projection|visual_projection|logit_scale)", "is CLIP's text encoder"),
)


def _find_pair(folder: Path, mmproj: Path | None) -> tuple[Path, Path]:
    """The two files of a LLaVA in a folder, told apart by what is in them."""
    decoders: list[Path] = []
    towers: list[Path] = []
    for path in visible_files(folder, "*.gguf"):
        if architecture := _architecture(path):
            (towers if architecture == "clip" else decoders).append(path)
    towers = towers if mmproj is None else [mmproj]
    for found, what, option in (
        (decoders, "language model", "--model FILE"),
        (towers, "mmproj", "--mmproj FILE"),
    ):
        if not found:
            raise FileNotFoundError(f"{folder} holds no {what} GGUF; name one: {option}")
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            several = f"{len(found)} {what} GGUFs, {names}"
            raise ValueError(f"{folder} holds {several}; name one: {option}")
    return decoders[0], towers[0]


def _architecture(path: Path) -> str | None:
    """What the first keys of a file say that it is; reading all of them takes seconds."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    # A key, the type of its value (8: text), and the length of the text.
    _, _, rest = head.partition(b"general.architecture" + (8).to_bytes(4, "little"))
    length = int.from_bytes(rest[:8], "little")
    return rest[8 : 8 + length].decode("utf-8", "replace") or None


def open_reader(path: Path, *architectures: str) -> GGUFReader:
    """Opens a GGUF file of one of some architectures."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError("GGUF files need pip install 'mlx_llava[gguf]'.") from error
    check_download(path)
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{path} is not a GGUF file, or not all of one: {error}") from error
    if reader.byte_order == "S":
        raise ValueError(f"{path} is a GGUF for big-endian machines; gguf-convert-endian turns it.")
    found = value(reader, "general.architecture")
    if found not in architectures:
        expected = " or ".join(map(repr, architectures))
        raise ValueError(f"{path} is a GGUF of {found!r}, expected {expected}.")
    if (parts := value(reader, "split.count", 1)) > 1:
        raise ValueError(f"{path} is one of {parts} parts; llama-gguf-split --merge joins them.")
    return reader


def read_gguf(path: Path, mmproj: Path | None) -> Contents:
    """Reads the two files of a LLaVA, named or in one folder."""
    if path.is_dir():
        path, mmproj = _find_pair(path, mmproj)
    if mmproj is None:
        raise ValueError(f"{path} is one file; a GGUF needs its mmproj too: --mmproj")
    text, vision = open_reader(path, *DECODERS), open_reader(mmproj, "clip")
    newer = value(vision, "clip.vision.projector_type", "mlp")
    projector = value(vision, "clip.projector_type", newer)
    if projector != "mlp" or any(t.name == "mm.3.weight" for t in vision.tensors):
        raise ValueError(f"{mmproj} has a projector {projector!r}, expected LLaVA's mlp.")
    if not any(tensor.name == "v.class_embd" for tensor in vision.tensors):
        raise ValueError(
            f"{mmproj} has a tower without a class token, as SigLIP is; of GGUF only CLIP's is "
            "supported. Take the repository that it was made from."
        )
    settings = read_config(text, vision)
    spec, tokenizer_config, warnings = read_tokenizer(text)
    template = tokenizer_config.get("chat_template")
    found = _read_tensors((path, text), (mmproj, vision), settings)
    if found.layers:
        settings["quantization"] = found.quantization()
    mode = "anyres" if settings["model_type"] == "llava_next" else "pad"  # as the original
    processing = {
        **preprocessing(mode, settings["vision_config"]["image_size"]),
        "image_mean": value(vision, "clip.vision.image_mean"),
        "image_std": value(vision, "clip.vision.image_std"),
    }
    ends = [value(text, f"tokenizer.ggml.{end}_token_id") for end in ("eot", "eom")]
    has_row = settings["image_token_index"] != settings["text_config"]["vocab_size"]
    return Contents(
        layout="GGUF pair",
        settings=settings,
        tensors=found.tensors,
        tokenizer=partial(Tokenizer, spec, tokenizer_config, chat_template=template),
        image_processor=processing,
        eos_ids=[end for end in ends if end is not None],
        names=None if template else f"{path.name} {settings['_name_or_path']}",
        has_placeholder=has_row or bool(found.layers),
        dropped=found.dropped,
        warnings=warnings,
        read_from=[mmproj],
    )


def _read_tensors(
    decoder: tuple[Path, GGUFReader], tower: tuple[Path, GGUFReader], settings: Mapping[str, Any]
) -> Canonical:
    found = Canonical()
    kind = settings["text_config"]["model_type"]
    for tensor in decoder[1].tensors:
        rows = _row_order(tensor, settings["text_config"]) if kind == LLAMA else None
        name = _rename(tensor.name)
        if kind == PHI3 and name:  # gate and up in one
            name = name.replace("mlp.up_proj", "mlp.gate_up_proj")
        _add(found, decoder[0], tensor, name, rows)
    for tensor in tower[1].tensors:
        name = _vision_name(tensor, settings["vision_config"]["hidden_size"])
        _add(found, tower[0], tensor, name, keep_quantised=False)
    found.tensors = canonical_tensors(found.tensors, is_mlx=False).tensors
    if f"{TOWER}post_layernorm.weight" not in found.tensors:  # LLaVA never applies it
        like = found.tensors[f"{TOWER}pre_layrnorm.weight"]
        found.tensors[f"{TOWER}post_layernorm.weight"] = like.then(lambda w: w * 0 + 1)
        found.tensors[f"{TOWER}post_layernorm.bias"] = like.then(lambda w: w * 0)
    return found


def _rename(name: str) -> str | None:
    return next((re.sub(p, r, name) for p, r in _NAMES if re.search(p, name)), None)


def _vision_name(tensor: ReaderTensor, width: int) -> str | None:
    """The canonical name; the two layers of an MLP are told apart by shape, not by name."""
    match = re.fullmatch(r"v\.blk\.(\d+)\.ffn_(?:up|down)\.(weight|bias)", tensor.name)
    if not match:
        return _rename(tensor.name)
    shape = [int(n) for n in tensor.shape]  # GGUF's order: inputs first
    layer = "fc2" if shape[-1] == width and (len(shape) == 1 or shape[0] != width) else "fc1"
    return f"{TOWER}encoder.layers.{match[1]}.mlp.{layer}.{match[2]}"


def _row_order(tensor: ReaderTensor, config: Mapping[str, Any]) -> Rows | None:
    """Which stored row of Q or K belongs where (convert_hf_to_gguf.py, permute, undone)."""
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name)
    if not match:
        return None
    heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
    rows = int(tensor.shape[-1])
    if rows % (2 * heads):
        raise ValueError(f"Q or K of the GGUF has {rows} rows, which {heads} heads cannot share.")
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2)
    return order.swapaxes(1, 2).reshape(rows)


def _add(
    result: Canonical,
    path: Path,
    tensor: ReaderTensor,
    name: str | None,
    rows: Rows | None = None,
    keep_quantised: bool = True,
) -> None:
    source = f"{path.name}:{tensor.name}"
    if name is None:
        reason = next((why for pattern, why in _DROPPED if re.search(pattern, tensor.name)), None)
        if reason is None:
            raise ValueError(f"{path} has a tensor {tensor.name}, which no LLaVA has.")
        result.dropped[source] = reason
        return
    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind = tensor.tensor_type
    module = name.removesuffix(".weight")

    def data() -> Bytes:
        """The raw rows; they leave memory with the returned array."""
        raw = map_values(path, int(tensor.data_offset), int(tensor.n_bytes), "U8")
        raw = raw.reshape(shape[0] if len(shape) > 1 or kind.name in FILE_DTYPES else 1, -1)
        return raw if rows is None else raw[rows]

    def add(name: str, shape: tuple[int, ...], dtype: mx.Dtype, read: Read) -> None:
        result.tensors[name] = LazyTensor(source, shape, dtype, read)

    if kind.name in FILE_DTYPES:
        dtype, stored = FILE_DTYPES[kind.name]
        add(name, shape, dtype, lambda: to_mlx(data().view(stored).reshape(shape), kind.name))
    elif keep_quantised and len(shape) == 2 and (blocks := BLOCKS.get(kind.name)):
        result.layers[module] = {"bits": blocks.bits, "group_size": GROUP_SIZE}
        codes, groups = (shape[0], shape[1] * blocks.bits // 32), (shape[0], shape[1] // GROUP_SIZE)
        add(f"{module}.weight", codes, mx.uint32, lambda: blocks.read_codes(data()))
        add(f"{module}.scales", groups, blocks.dtype, lambda: blocks.read_affine(data())[0])
        add(f"{module}.biases", groups, blocks.dtype, lambda: blocks.read_affine(data())[1])
    else:
        add(name, shape, mx.float16, lambda: dequantize(data(), kind, mx.float16).reshape(shape))
