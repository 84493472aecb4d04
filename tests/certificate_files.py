"""Checkpoints in every layout, written as their makers write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from safetensors.torch import save_file

from tests import layouts
from tests.certificate_tokenizers import (
    fast_tokenizer,
    sentencepiece_model,
    tokenizer_config,
)
from tests.checkpoint.test_gptq import LINEAR, pack_awq, pack_bits
from tests.conftest import SHARED
from tests.gguf_files import sentencepieces, write_text, write_vision
from tests.published.row import PINPOINTS, Published, Settings

Tensors = dict[str, torch.Tensor]

INDEX = "model.safetensors.index.json"
GROUP = 128  # of GPTQ and AWQ
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Written:
    """A checkpoint on disk.

    Attributes:
        path: what `load` is given.
        source: its other parts.
        meant: by canonical name, the weights that the files mean where they are not the
            reference's own.
    """

    path: Path
    source: dict[str, Path] = field(default_factory=dict)
    meant: Tensors = field(default_factory=dict)


def write_json(path: Path, data: Any) -> None:
    """Writes one of the small files."""
    path.write_text(json.dumps(data))


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], container: str) -> None:
    """Two shards of safetensors, or of PyTorch's files."""
    for i in range(2):
        part = {name: tensors[name].contiguous() for name in list(tensors)[i::2]}
        number = f"-{i + 1:05}-of-00002"
        if container == "safetensors":
            save_file(part, folder / f"model{number}.safetensors", {"format": "pt"})
        else:
            torch.save(part, folder / f"pytorch_model{number}.bin")


def cast(tensors: Tensors, row: Published) -> Tensors:
    """The tensors in the dtype that the row's config.json says."""
    text = row.config.get("text_config", row.config)
    dtype = DTYPES[text.get("torch_dtype", "float16")]
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def write_slow_tokenizer(folder: Path, row: Published) -> None:
    """The tokenizer files of an original checkpoint."""
    if row.vocabulary in ("llama3", "qwen2"):
        write_json(folder / "tokenizer.json", fast_tokenizer(row.vocabulary))
    else:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(row.vocabulary))
    write_json(folder / "tokenizer_config.json", tokenizer_config(row))
    if row.added_tokens:
        write_json(folder / "added_tokens.json", row.added_tokens)


def write_hf_settings(folder: Path, row: Published, config: Settings) -> None:
    """Everything but the weights of a checkpoint in llava-hf's layout."""
    folder.mkdir()
    write_json(folder / "config.json", config)
    video = config.get("video_token_index")
    marks = {"<image>": config["image_token_index"], **({"<video>": video} if video else {})}
    spec = fast_tokenizer(row.vocabulary, marks)
    write_json(folder / "tokenizer.json", spec)
    settings = {**tokenizer_config(row), "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", settings)
    is_next = config["model_type"] in ("llava_next", "llava_next_video")
    images = {
        "crop_size": {"height": 336, "width": 336},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": f"{'LlavaNext' if is_next else 'CLIP'}ImageProcessor",
        "image_std": STD,
        "processor_class": f"Llava{'Next' * is_next}Processor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 336},
    }
    is_siglip = config["vision_config"]["model_type"] == "siglip_vision_model"
    is_onevision = config["model_type"] == "llava_onevision"
    if is_siglip:
        del images["crop_size"], images["do_center_crop"]
        images |= {
            "do_convert_rgb": None,
            "image_mean": [0.5] * 3,
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5] * 3,
            "size": {"height": 384, "width": 384},
        }
    if is_next:
        images |= {"aspect_ratio_setting": "anyres", "image_grid_pinpoints": PINPOINTS}
    if is_onevision:
        images |= {
            "do_convert_rgb": True,
            "do_pad": True,
            "image_grid_pinpoints": config["image_grid_pinpoints"],
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
        }
    if config["model_type"] == "llava_next_video":
        images["processor_class"] = "LlavaNextVideoProcessor"
        kind = {"image_processor_type": "LlavaNextVideoImageProcessor"}
        frames = {k: v for k, v in images.items() if k != "image_grid_pinpoints"}
        write_json(folder / "video_preprocessor_config.json", {**frames, **kind})
    write_json(folder / "preprocessor_config.json", images)
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": int(not is_siglip),
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": images["processor_class"],
        "vision_feature_select_strategy": "full" if is_siglip else "default",
    }
    if is_onevision:
        del processor["num_additional_image_tokens"], processor["patch_size"]
        vision = config["vision_config"]
        processor["num_image_tokens"] = (vision["image_size"] // vision["patch_size"]) ** 2
        processor["video_token"] = "<video>"
    write_json(folder / "processor_config.json", processor)
    for path in (SHARED / "published" / row.real).glob("*") if row.real else ():
        if path.name not in ("README", "config.json", "processor_config.json", INDEX):
            shutil.copy(path, folder)  # the real tokenizer and its settings


def write_hf(row: Published, config: Settings, model: Any, folder: Path) -> Written:
    """llava-hf's own repositories."""
    write_hf_settings(folder / "model", row, config)
    write_tensors(folder / "model", cast(layouts.state_dict(model), row), row.container)
    return Written(folder / "model")


def write_mlx(row: Published, config: Settings, model: Any, folder: Path) -> Written:
    """mlx-vlm's conversions: the language model's matrices quantised, patches as NHWC."""
    write_hf_settings(folder / "model", row, config)
    arrays, meant = {}, {}
    tensors = cast(layouts.state_dict(model), row)
    if config["text_config"].get("tie_word_embeddings"):
        del tensors["language_model.lm_head.weight"]
    for name, tensor in tensors.items():
        array = mx.array(tensor.float().numpy()).astype(mx.float16)
        if name.endswith("patch_embedding.weight"):
            array = array.transpose(0, 2, 3, 1)
        arrays[name] = array
        if name.startswith("language_model.") and array.ndim == 2:
            path = name.removesuffix("weight")
            parts = mx.quantize(array, **row.quantization)
            names = (f"{path}{part}" for part in ("weight", "scales", "biases"))
            arrays |= dict(zip(names, parts, strict=True))
            wide = [parts[0], *(part.astype(mx.float32) for part in parts[1:])]
            exact = mx.dequantize(*wide, **row.quantization)
            meant[name] = torch.tensor(np.array(exact))
    mx.save_safetensors(str(folder / "model" / "model.safetensors"), arrays, {"format": "mlx"})
    return Written(folder / "model", meant=meant)


def original_tensors(row: Published, config: Settings, model: Any) -> Tensors:
    """The names of haotian-liu's repositories, and rows of the published vocabulary."""
    tensors = layouts.to_original(cast(layouts.state_dict(model), row), config["vocab_size"])
    if not is_linear(config):
        return tensors
    one = "model.mm_projector."
    return {name.replace(f"{one}0.", one): tensor for name, tensor in tensors.items()}


def is_linear(config: Settings) -> bool:
    """Whether the projector is one linear layer, as before LLaVA 1.5."""
    return bool(config.get("mm_projector_type", "linear") == "linear")


def write_original(
    row: Published, config: Settings, model: Any, folder: Path, tensors: Tensors | None = None
) -> Written:
    """A checkpoint whose tower is in CLIP's own repository."""
    (folder / "model").mkdir()
    clip = layouts.write_clip(folder / "clip", layouts.state_dict(model), model)
    write_json(folder / "model" / "config.json", config)
    write_slow_tokenizer(folder / "model", row)
    tensors = tensors or without_tower(original_tensors(row, config, model))
    write_tensors(folder / "model", tensors, row.container)
    return Written(folder / "model", {"vision_tower": clip})


def without_tower(tensors: Tensors) -> Tensors:
    """All but the vision tower."""
    return {name: t for name, t in tensors.items() if "vision_tower" not in name}


def write_tuned(row: Published, config: Settings, model: Any, folder: Path) -> Written:
    """A checkpoint with its own tower inside."""
    tensors = original_tensors(row, config, model)
    written = write_original(row, config, model, folder, tensors)
    return Written(written.path)


def llama_part(tensors: Tensors) -> Tensors:
    """The language model alone."""
    parts = ("model.mm_projector", "model.vision_tower", "model.image_newline")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(parts)}


def write_llama(folder: Path, row: Published, tensors: Tensors, config: Settings) -> Path:
    """The language model that a part belongs to."""
    folder.mkdir()
    llama = {k: v for k, v in config.items() if not k.startswith(("mm_", "image_", "tune_"))}
    llama |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    write_json(folder / "config.json", llama)
    write_slow_tokenizer(folder, row)
    write_tensors(folder, tensors, row.container)
    return folder


def canonical(name: str) -> str:
    """llava-hf's name of an original language model's tensor."""
    return f"language_model.{name}"


def write_delta(row: Published, config: Settings, model: Any, folder: Path) -> Written:
    """The difference to a LLaMA of 32000 rows."""
    generator = torch.Generator().manual_seed(1)
    delta = without_tower(original_tensors(row, config, model))
    base, meant = {}, {}
    for name, tensor in llama_part(delta).items():
        own = torch.randn(tensor[:32000].shape, generator=generator).half() * 0.1
        base[name] = own
        delta[name] = tensor.clone()
        delta[name][: len(own)] -= own
        total = delta[name].clone()
        total[: len(own)] += own
        meant[canonical(name)] = total.float()
    written = write_original(row, config, model, folder, delta)
    llama = write_llama(folder / "llama", row, base, {**config, "vocab_size": 32000})
    return Written(written.path, {**written.source, "base": llama}, meant)


def write_lora(row: Published, config: Settings, model: Any, folder: Path) -> Written:
    """A LoRA on Vicuna, its projector beside it, as LLaVA's finetune_lora.sh leaves them."""
    generator = torch.Generator().manual_seed(1)
    tensors = without_tower(original_tensors(row, config, model))
    clip = layouts.write_clip(folder / "clip", layouts.state_dict(model), model)
    base = write_llama(folder / "vicuna", row, llama_part(tensors), config)
    prefix, pairs, meant = "base_model.model.", {}, {}
    for name, tensor in llama_part(tensors).items():
        path = name.removesuffix(".weight")
        if path.endswith(LINEAR):
            out, inputs = tensor.shape
            down = torch.randn(4, inputs, generator=generator) * 0.1
            up = torch.randn(out, 4, generator=generator) * 0.1
            pairs |= {f"{prefix}{path}.lora_A.weight": down, f"{prefix}{path}.lora_B.weight": up}
            meant[canonical(name)] = (tensor.float() + 2 * (up @ down)).half().float()
    (folder / "model").mkdir()
    settings = {
        "auto_mapping": None,
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "revision": None,
        "target_modules": [name.split(".")[1] for name in LINEAR],
        "task_type": "CAUSAL_LM",
    }
    write_json(folder / "model" / "adapter_config.json", settings)
    write_json(folder / "model" / "config.json", config)
    torch.save(pairs, folder / "model" / "adapter_model.bin")
    trained = {prefix + k: torch.nn.Parameter(t) for k, t in tensors.items() if "mm_proj" in k}
    torch.save(trained, folder / "model" / "non_lora_trainables.bin")
    return Written(folder / "model", {"base": base, "vision_tower": clip}, meant)


def packed_layer(
    shape: torch.Size, kind: str, scattered: bool, seed: int
) -> tuple[Tensors, torch.Tensor]:
    """A GPTQ or AWQ layer: its tensors, and the weights (out, in) that they mean.

    Zeros are powers of two, which float16 multiplies exactly.
    """
    out, inputs = shape
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (inputs, out), dtype=np.uint8)
    zeros = 2 ** rng.integers(0, 4, (inputs // GROUP, out), dtype=np.uint8)
    scales = (rng.random(zeros.shape) * 0.03 + 0.01).astype(np.float16)
    index = np.arange(inputs) // GROUP
    index = rng.permutation(index) if scattered else index
    if kind == "awq":
        parts = {"qweight": pack_awq(codes), "qzeros": pack_awq(zeros), "scales": scales}
    else:
        words = pack_bits((zeros - 1).T, 4).T.copy()
        parts = {"qweight": pack_bits(codes, 4), "qzeros": words, "scales": scales}
        parts["g_idx"] = index.astype(np.int32)
    meant = scales.astype(np.float32)[index] * (codes.astype(np.float32) - zeros[index])
    return {key: torch.tensor(part) for key, part in parts.items()}, torch.tensor(meant.T)


def pack_decoder(tensors: Tensors, row: Published, kind: str) -> tuple[Tensors, Tensors]:
    """Replaces the matrices of the decoder's layers; gives the weights that are meant, too."""
    result, meant = {}, {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        path = name.removesuffix(".weight")
        if not path.endswith(LINEAR) or "vision" in path:
            result[name] = tensor
            continue
        scattered = bool(row.quantization.get("desc_act"))
        parts, weights = packed_layer(tensor.shape, kind, scattered, seed)
        result |= {f"{path}.{part}": array for part, array in parts.items()}
        is_hf = name.startswith("language_model.")
        meant[name if is_hf else canonical(name)] = weights
    return result, meant


def write_gptq(row: Published, config: Settings, model: Any, folder: Path) -> Written:
    """AutoGPTQ's of an original checkpoint."""
    tensors = without_tower(original_tensors(row, config, model))
    packed, meant = pack_decoder(tensors, row, "gptq")
    written = write_original(row, config, model, folder, packed)
    write_json(written.path / "quantize_config.json", row.quantization)
    return Written(written.path, written.source, meant)


def write_awq(row: Published, config: Settings, model: Any, folder: Path) -> Written:
    """AutoAWQ's of either layout."""
    if "text_config" in config:
        write_hf_settings(folder / "model", row, config)
        packed, meant = pack_decoder(cast(layouts.state_dict(model), row), row, "awq")
        write_tensors(folder / "model", packed, row.container)
        return Written(folder / "model", meant=meant)
    tensors = without_tower(original_tensors(row, config, model))
    packed, meant = pack_decoder(tensors, row, "awq")
    written = write_original(row, config, model, folder, packed)
    return Written(written.path, written.source, meant)


def write_gptq_decoder(row: Published, config: Settings, model: Any, folder: Path) -> Written:
    """GPTQ-for-LLaMa's: the language model alone, with biases of zero and no g_idx."""
    tensors = original_tensors(row, config, model)
    packed, meant = pack_decoder(llama_part(tensors), row, "gptq")
    for name in [name for name in packed if name.endswith(".g_idx")]:
        del packed[name]
        path = name.removesuffix("g_idx")
        packed[f"{path}bias"] = torch.zeros(packed[f"{path}scales"].shape[1])
    base = write_llama(folder / "gptq", row, packed, config)
    clip = layouts.write_clip(folder / "clip", layouts.state_dict(model), model)
    (folder / "delta").mkdir()
    write_json(folder / "delta" / "config.json", config)
    path = folder / "delta" / "mm_projector.bin"
    torch.save({k: t for k, t in tensors.items() if "mm_projector" in k}, path)
    return Written(path, {"base": base, "vision_tower": clip}, meant)


def write_gguf(row: Published, config: Settings, model: Any, folder: Path) -> Written:
    """llama.cpp's pair, by its converters of 2023 and 2024: the tower lacks its last layer."""
    text, vision = folder / "llm.gguf", folder / "mmproj.gguf"
    meant = write_text(
        text,
        model,
        row.container,
        vocabulary=sentencepieces(sentencepiece_model(row.vocabulary)),
        chat_template=row.chat_template,
    )
    tiles: Settings = {}
    if config["image_aspect_ratio"] == "anyres":
        tiles = {
            "image_aspect_ratio": "anyres",
            "image_crop_resolution": 224,
            "image_grid_pinpoints": [n for pair in config["image_grid_pinpoints"] for n in pair],
            "mm_patch_merge_type": config["mm_patch_merge_type"],
        }
    normal = {"image_mean": list(MEAN), "image_std": list(STD)}
    layers = model.config.vision_config.num_hidden_layers - 1
    write_vision(vision, model, layers, swapped=True, **normal, **tiles)
    return Written(text, {"mmproj": vision}, {k: torch.tensor(w) for k, w in meant.items()})


Writer = Callable[[Published, Settings, Any, Path], Written]
WRITERS: dict[str, Writer] = {
    "hf": write_hf,
    "mlx": write_mlx,
    "original": write_original,
    "tuned tower": write_tuned,
    "delta": write_delta,
    "lora": write_lora,
    "gptq": write_gptq,
    "awq": write_awq,
    "gptq decoder": write_gptq_decoder,
    "gguf": write_gguf,
}
