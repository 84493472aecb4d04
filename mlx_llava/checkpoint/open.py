"""Any checkpoint -> config, canonical tensors, tokenizer: the one way in for `load` and `convert`.

What a folder is, its keys and its config.json tell, never its name. A reader for each layout
hands back plain data, of which config and tokenizer are built once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_llava.checkpoint import adapters, gptq, original
from mlx_llava.checkpoint.contents import Contents
from mlx_llava.checkpoint.folder import read_folder, visible_files
from mlx_llava.checkpoint.gguf import read_gguf
from mlx_llava.checkpoint.hub import Source, find_checkpoint
from mlx_llava.checkpoint.tensors import PROJECTOR, LazyTensor, canonical_name, canonical_tensors
from mlx_llava.inputs.templates import guess_template
from mlx_llava.inputs.tokenizer import Tokenizer
from mlx_llava.json_files import read_json
from mlx_llava.model.config import LlavaConfig, unknown_keys
from mlx_llava.model.config_checks import unknown_warning
from mlx_llava.model.config_values import read_ends


@dataclass
class Checkpoint:
    """A whole LLaVA, whose weights are still on disk."""

    contents: Contents
    config: LlavaConfig
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]  # ends of an answer
    template_doubt: str  # why another may be right than the one in its files or by its names


def open_checkpoint(source: Source, memory: int | None = None) -> Checkpoint:
    """Finds a checkpoint of any layout, and opens it; see `find_checkpoint` for `memory`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: It is broken, not supported, or a part of it is not given.
    """
    path = find_checkpoint(source.model, source.revision, source.offline, memory)
    contents = _read(path, source)
    contents.read_from.insert(0, path)
    contents.split_fused()
    eos_ids = read_ends(contents.eos_ids, "generation_config.json")
    config, doubt = LlavaConfig.from_dict(contents.settings), ""
    if contents.names is not None:
        guess = guess_template(config, contents.names)
        config, doubt = replace(config, conv_mode=guess.name), guess.doubt
    if not contents.has_placeholder:
        text = replace(config.text_config, vocab_size=contents.add_placeholder())
        config = replace(config, text_config=text)
    tokenizer = contents.tokenizer(config.image_token_index)
    if not config.conv_mode and not tokenizer.chat_template:
        doubt = guess_template(config).doubt
    return Checkpoint(contents, config, tokenizer, eos_ids, doubt)


def _read(path: Path, source: Source) -> Contents:
    is_gguf = visible_files(path, "*.gguf") and not visible_files(path, "*.safetensors", "*.bin")
    if is_gguf or path.suffix == ".gguf" or source.mmproj:
        return read_gguf(path, source.find(source.mmproj) if source.mmproj else None)
    if path.is_file() and path.suffix not in (".bin", ".pt", ".safetensors"):
        raise ValueError(f"{path} is no checkpoint; a folder, a GGUF or an mm_projector.bin is.")
    data = read_json((path if path.is_dir() else path.parent) / "config.json")
    if path.is_file() or adapters.is_part(path):
        return _read_part(path, data, source)
    is_original = original.recognise(path, data)
    if not data:
        raise FileNotFoundError(f"{path} has no config.json, and no GGUF pair.")
    tensors, is_mlx = read_folder(path)
    if any(key.startswith("transformer.blocks.") for key in tensors):
        raise ValueError(f"{path} is LLaVA on MPT, which is not supported.")
    if is_original or any("mm_projector." in key for key in tensors):
        return original.read_original(path, data, tensors, source)
    if "llava" not in str(data.get("model_type")):
        kind = str(data.get("model_type"))
        tower = "SigLIP" if "siglip" in kind else "CLIP" if "clip" in kind else None
        what = f"a bare {tower}; give it as --vision-tower" if tower else "no LLaVA"
        raise ValueError(f"{path} is {what} (model_type={data.get('model_type')!r}).")
    for option, value in (("base", source.base), ("vision tower", source.vision_tower)):
        if value:
            raise ValueError(f"{path} is whole; the {option} {value} has no place in it.")
    return _read_hf(path, data, tensors, is_mlx)


def _read_hf(
    path: Path, data: dict[str, Any], tensors: Mapping[str, LazyTensor], is_mlx: bool
) -> Contents:
    found = canonical_tensors(tensors, is_mlx)
    gptq.repack_folder(path, data, found)
    warnings = unknown_warning(unknown_keys(data))
    for key in ("quantization", "quantization_config"):
        if isinstance(layers := data.get(key), dict):
            data[key] = {canonical_name(name): value for name, value in layers.items()}
    if found.layers:
        data["quantization"] = found.quantization()
    nested = read_json(path / "processor_config.json")
    contents = Contents(
        layout="llava-hf" + (", MLX" if is_mlx else ", GPTQ or AWQ" if found.layers else ""),
        settings=data,
        tensors=found.tensors,
        tokenizer=partial(Tokenizer.from_folder, path),
        image_processor=read_json(path / "preprocessor_config.json")
        or nested.get("image_processor"),
        video_processor=read_json(path / "video_preprocessor_config.json")
        or nested.get("video_processor"),
        eos_ids=read_json(path / "generation_config.json").get("eos_token_id"),
        dropped=found.dropped,
        warnings=warnings,
    )
    contents.tie_head()
    return contents


def _read_part(path: Path, data: dict[str, Any], source: Source) -> Contents:
    is_lora = adapters.is_adapter(path)
    kind = "LoRA" if is_lora else "projector"
    if not source.base:
        base = read_json(path / adapters.CONFIG).get("base_model_name_or_path")
        named = f" ({adapters.CONFIG} names {base})" if base else ""
        raise ValueError(
            f"{path} is a {kind}; give the model that it belongs to with --base{named}."
        )
    part = adapters.read_adapter(path) if is_lora else adapters.read_projector(path)
    folder = source.find(source.base)
    base_data = read_json(folder / "config.json")
    if original.is_original({**base_data, **data}):
        contents = _read_on_original(path, {**base_data, **data}, part, folder, source)
    elif "llava" in str(base_data.get("model_type")):
        contents = _read(folder, replace(source, base=None))
        if plain := contents.merge(part):
            contents.warnings.append(
                f"{len(plain)} quantised layers became plain; --model {folder} --adapter-path "
                f"{path} leaves them as they are."
            )
    else:
        raise ValueError(
            f"{path} needs a base that is a LLaVA, or a config.json with LLaVA's mm_ keys; "
            f"{folder} has model_type={base_data.get('model_type')!r}."
        )
    contents.layout = f"{kind} on {folder.name}"
    contents.read_from.insert(0, folder)
    return contents


def _read_on_original(
    path: Path, data: dict[str, Any], part: adapters.Lora, folder: Path, source: Source
) -> Contents:
    """A part on a LLaMA or an original LLaVA, whose vocabulary it was trained with."""
    base = canonical_tensors(*read_folder(folder)).tensors
    merged = adapters.merge_lora(base, part)
    contents = original.read_original(path, data, merged, source, tokenizer_folder=folder)
    contents.warnings += part.warnings
    has_projector = any(name.startswith(PROJECTOR) for name in base)
    if data.get("tune_mm_mlp_adapter") and has_projector and not part.changes:
        contents.warnings.append(
            "This projector is from stage 1 (pretraining), but the base is a tuned LLaVA with "
            "a projector of its own; together they cannot see."
        )
    return contents
