"""llama.cpp's GGUF pair: a LLaMA file and an mmproj file -> canonical tensors and config.

llama.cpp names tensors its own way, permutes Q and K, and its legacy LLaVA converter swaps
fc1 and fc2 and drops the tower's last layer. What is quantised in blocks of 32 stays so; every
other type goes through the gguf package's dequantiser.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_llava.checkpoint.gptq import pack
from mlx_llava.checkpoint.tensors import LazyTensor
from mlx_llava.vocabulary import NORMAL, Piece, spec_from_byte_bpe, spec_from_pieces

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_TEXT_NAMES: tuple[tuple[str, str], ...] = (
    (r"^token_embd\.", "language_model.model.embed_tokens."),
    (r"^output_norm\.", "language_model.model.norm."),
    (r"^output\.", "language_model.lm_head."),
    (r"^blk\.(\d+)\.attn_norm\.", r"language_model.model.layers.\1.input_layernorm."),
    (r"^blk\.(\d+)\.ffn_norm\.", r"language_model.model.layers.\1.post_attention_layernorm."),
    (r"^blk\.(\d+)\.attn_output\.", r"language_model.model.layers.\1.self_attn.o_proj."),
    (r"^blk\.(\d+)\.attn_([qkv])\.", r"language_model.model.layers.\1.self_attn.\2_proj."),
    (r"^blk\.(\d+)\.ffn_(gate|up|down)\.", r"language_model.model.layers.\1.mlp.\2_proj."),
)
_TOWER = "vision_tower.vision_model."
_VISION_NAMES: tuple[tuple[str, str], ...] = (
    (r"^v\.class_embd$", _TOWER + "embeddings.class_embedding"),
    (r"^v\.patch_embd\.", _TOWER + "embeddings.patch_embedding."),
    (r"^v\.position_embd\.", _TOWER + "embeddings.position_embedding."),
    (r"^v\.pre_ln\.", _TOWER + "pre_layrnorm."),
    (r"^v\.post_ln\.", _TOWER + "post_layernorm."),
    (r"^v\.blk\.(\d+)\.ln([12])\.", _TOWER + r"encoder.layers.\1.layer_norm\2."),
    (r"^v\.blk\.(\d+)\.attn_out\.", _TOWER + r"encoder.layers.\1.self_attn.out_proj."),
    (r"^v\.blk\.(\d+)\.attn_([qkv])\.", _TOWER + r"encoder.layers.\1.self_attn.\2_proj."),
    (r"^mm\.(weight|bias)$", r"multi_modal_projector.linear_1.\1"),
    (r"^mm\.0\.", "multi_modal_projector.linear_1."),
    (r"^mm\.2\.", "multi_modal_projector.linear_2."),
    (r"^(model|v)\.image_newline$", "image_newline"),
)


@dataclass
class GGUFModel:
    """What a GGUF pair says.

    Attributes:
        tensors: by canonical name, the patch convolution as PyTorch lays it out.
        settings: bits and group_size of each quantised layer.
        config: a llava-hf config.json.
        image_processor: a preprocessor_config.json.
        tokenizer: the content of tokenizer.json.
        tokenizer_config: the content of tokenizer_config.json, chat_template included.
        dropped: source -> reason.
    """

    tensors: dict[str, LazyTensor]
    settings: dict[str, dict[str, Any]]
    config: dict[str, Any]
    image_processor: dict[str, Any]
    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    dropped: dict[str, str]


def open_reader(path: Path, architecture: str) -> GGUFReader:
    """Opens a GGUF file of an architecture.

    Raises:
        ValueError: The package is missing, or it is another file.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError("GGUF files need pip install 'mlx_llava[gguf]'.") from error
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{path} is not a GGUF file: {error}") from error
    found = _value(reader, "general.architecture")
    if found != architecture:
        raise ValueError(f"{path} is a GGUF of {found!r}, expected {architecture!r}.")
    return reader


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def read_pair(text_path: Path, vision_path: Path) -> GGUFModel:
    """Reads the two files of a LLaVA.

    Raises:
        ValueError: A file is not what it should be.
    """
    text, vision = open_reader(text_path, "llama"), open_reader(vision_path, "clip")
    projector = _value(vision, "clip.projector_type", "mlp")
    if projector != "mlp" or any(t.name == "mm.3.weight" for t in vision.tensors):
        raise ValueError(f"{vision_path} has a projector {projector!r}, expected LLaVA's mlp.")
    config = _read_config(text, vision)
    processor = _read_image_processor(vision, config)
    model = GGUFModel({}, {}, config, processor, *_read_tokenizer(text), {})
    heads = _value(text, "llama.attention.head_count")
    kv_heads = _value(text, "llama.attention.head_count_kv", heads)
    for tensor in text.tensors:
        rows = None
        if match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.weight", tensor.name):
            rows = _unpermuted(int(tensor.shape[1]), heads if match[1] == "q" else kv_heads)
        _add(model, text_path, tensor, _rename(tensor.name, _TEXT_NAMES), rows)
    for tensor in vision.tensors:
        name = _vision_name(tensor, model.config["vision_config"]["hidden_size"])
        _add(model, vision_path, tensor, name, None, keep_quantised=False)
    return model


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((re.sub(p, r, name) for p, r in table if re.search(p, name)), None)


def _vision_name(tensor: ReaderTensor, width: int) -> str | None:
    """The canonical name; the two layers of an MLP are told apart by shape, not by name."""
    match = re.fullmatch(r"v\.blk\.(\d+)\.ffn_(?:up|down)\.(weight|bias)", tensor.name)
    if not match:
        return _rename(tensor.name, _VISION_NAMES)
    shape = [int(n) for n in tensor.shape]  # GGUF's order: inputs first
    layer = "fc2" if shape[-1] == width and (len(shape) == 1 or shape[0] != width) else "fc1"
    return f"{_TOWER}encoder.layers.{match[1]}.mlp.{layer}.{match[2]}"


def _unpermuted(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """Which stored row belongs at each place (convert_hf_to_gguf.py, permute, undone)."""
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2)
    return order.swapaxes(1, 2).reshape(rows)


def _add(
    model: GGUFModel,
    path: Path,
    tensor: ReaderTensor,
    name: str | None,
    rows: npt.NDArray[np.int64] | None,
    keep_quantised: bool = True,
) -> None:
    """Adds one tensor under its canonical name, in MLX's quantised layout where there is one."""
    source = f"{path.name}:{tensor.name}"
    if name is None:
        model.dropped[source] = "follows from the config" if "rope" in tensor.name else "unknown"
        return
    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind = tensor.tensor_type.name
    unpack = _BLOCKS.get(kind) if keep_quantised and len(shape) == 2 else None

    def data() -> npt.NDArray[Any]:
        return tensor.data if rows is None else tensor.data[rows]

    if unpack is None:
        dtype = {"F32": mx.float32, "BF16": mx.bfloat16}.get(kind, mx.float16)

        def read() -> mx.array:
            if kind in ("F32", "F16"):
                return mx.array(data().reshape(shape))
            from gguf.quants import dequantize

            values = dequantize(data(), tensor.tensor_type)
            return mx.array(values.reshape(shape)).astype(dtype)

        model.tensors[name] = LazyTensor(source, shape, dtype, read)
        return
    bits, split = unpack
    path_of = name.removesuffix(".weight")
    model.settings[path_of] = {"bits": bits, "group_size": 32}
    shapes = ((shape[0], shape[1] * bits // 32), *[(shape[0], shape[1] // 32)] * 2)
    dtypes = (mx.uint32, mx.float16, mx.float16)

    def part(i: int) -> mx.array:
        return mx.array(split(data())[i])

    parts = zip(("weight", "scales", "biases"), shapes, dtypes, strict=True)
    for i, (suffix, part_shape, dtype) in enumerate(parts):
        read = functools.partial(part, i)
        model.tensors[f"{path_of}.{suffix}"] = LazyTensor(source, part_shape, dtype, read)


Split = Callable[[npt.NDArray[np.uint8]], tuple[npt.NDArray[Any], ...]]


def _blocks(data: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(data).reshape(data.shape[0], -1, size)


def _nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """16 bytes a block: the low halves are its first 16 codes, the high halves the others."""
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
    return pack(codes.reshape(codes.shape[0], -1), 4)


def _half(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    values: npt.NDArray[np.float16] = np.ascontiguousarray(data).view(np.float16)[..., 0]
    return values


def _split_q4_0(data: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[Any], ...]:
    blocks = _blocks(data, 18)
    scales = _half(blocks[..., :2])
    return _nibbles(blocks[..., 2:]), scales, scales * np.float16(-8)


def _split_q4_1(data: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[Any], ...]:
    blocks = _blocks(data, 20)
    return _nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _split_q8_0(data: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[Any], ...]:
    blocks = _blocks(data, 34)
    scales = _half(blocks[..., :2])
    codes = (blocks[..., 2:] ^ 0x80).reshape(blocks.shape[0], -1)  # int8 -> uint8, 0 -> 128
    return np.ascontiguousarray(codes).view(np.uint32), scales, scales * np.float16(-128)


#: Block formats that MLX has too: bits, and raw rows -> (weight, scales, biases).
_BLOCKS: dict[str, tuple[int, Split]] = {
    "Q4_0": (4, _split_q4_0),
    "Q4_1": (4, _split_q4_1),
    "Q8_0": (8, _split_q8_0),
}


def _read_config(text: GGUFReader, vision: GGUFReader) -> dict[str, Any]:
    """A llava-hf config.json from both files' metadata."""

    def llama(key: str, default: Any = None) -> Any:
        return _value(text, f"llama.{key}", default)

    def clip(key: str, default: Any = None) -> Any:
        return _value(vision, f"clip.vision.{key}", default)

    if _value(vision, "clip.use_silu"):
        raise ValueError("The tower's activation is SiLU, expected CLIP's GELU.")
    heads, width = llama("attention.head_count"), llama("embedding_length")
    scaling = llama("rope.scaling.type")
    is_anyres = clip("image_grid_pinpoints") is not None
    pairs = clip("image_grid_pinpoints") or []
    layers = clip("block_count")
    vocabulary = next(int(t.shape[1]) for t in text.tensors if t.name == "token_embd.weight")
    names = {tensor.name for tensor in (*text.tensors, *vision.tensors)}
    config: dict[str, Any] = {
        "model_type": "llava_next" if is_anyres else "llava",
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": llama("feed_forward_length"),
            "num_hidden_layers": llama("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": llama("attention.head_count_kv", heads),
            "head_dim": llama("rope.dimension_count", width // heads),
            "max_position_embeddings": llama("context_length"),
            "rms_norm_eps": llama("attention.layer_norm_rms_epsilon"),
            "rope_theta": llama("rope.freq_base", 10000.0),
        },
        "vision_config": {
            "hidden_size": clip("embedding_length"),
            "intermediate_size": clip("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": clip("attention.head_count"),
            "image_size": clip("image_size"),
            "patch_size": clip("patch_size"),
            "layer_norm_eps": clip("attention.layer_norm_epsilon"),
            "hidden_act": "gelu" if _value(vision, "clip.use_gelu") else "quick_gelu",
        },
        "tie_word_embeddings": "output.weight" not in names,
        "image_token_index": vocabulary,
        # Legacy files dropped the last of CLIP-L's 24 layers: what is stored is all run.
        "vision_feature_layer": clip("feature_layer") or (-2 if layers == 24 else -1),
        "mm_projector_type": "linear" if "mm.weight" in names else "mlp2x_gelu",
        "anyres_convention": "original",
    }
    if scaling == "linear":
        config["text_config"]["rope_scaling"] = {
            "rope_type": "linear",
            "factor": llama("rope.scaling.factor"),
        }
    elif scaling not in (None, "none"):
        raise ValueError(f"llama.rope.scaling.type={scaling!r} is not supported.")
    if is_anyres:
        config["image_grid_pinpoints"] = list(zip(pairs[::2], pairs[1::2], strict=True))
        config["mm_patch_merge_type"] = clip("mm_patch_merge_type", "spatial_unpad")
    return config


def _read_image_processor(vision: GGUFReader, config: Mapping[str, Any]) -> dict[str, Any]:
    """A preprocessor_config.json; LLaVA 1.5 pads, as the original does."""
    side = config["vision_config"]["image_size"]
    is_anyres = config["model_type"] == "llava_next"
    return {
        "image_processor_type": f"Llava{'Next' * is_anyres}ImageProcessor",
        "do_pad": True,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": _value(vision, "clip.vision.image_mean"),
        "image_std": _value(vision, "clip.vision.image_std"),
    }


def _read_tokenizer(text: GGUFReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json from the metadata."""

    def ggml(key: str, default: Any = None) -> Any:
        return _value(text, f"tokenizer.ggml.{key}", default)

    tokens, kind = ggml("tokens"), ggml("model")
    scores = ggml("scores") or [0.0] * len(tokens)
    kinds = ggml("token_type") or [NORMAL] * len(tokens)
    pieces = [Piece(*entry) for entry in zip(tokens, scores, kinds, strict=True)]
    if kind == "llama":
        spec = spec_from_pieces(pieces, {}, ggml("add_space_prefix", True))
    elif kind == "gpt2":
        spec = spec_from_byte_bpe(pieces, ggml("merges"), ggml("pre", "default"))
    else:
        raise ValueError(f"tokenizer.ggml.model={kind!r} is not supported.")
    config: dict[str, Any] = {"add_bos_token": bool(ggml("add_bos_token", True))}
    for name in ("bos", "eos"):
        if (i := ggml(f"{name}_token_id")) is not None:
            config[f"{name}_token"] = tokens[i]
    if template := _value(text, "tokenizer.chat_template"):
        config["chat_template"] = template
    return spec, config
