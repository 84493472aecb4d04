"""Any checkpoint -> config, canonical tensors, tokenizer: the one way in for `load` and `convert`.

What a folder is, its keys and its config.json tell, never its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llava.checkpoint import adapters, gptq, original
from mlx_llava.checkpoint.folder import find_files, read_folder, visible_files
from mlx_llava.checkpoint.gguf import find_pair, gguf_files, read_pair
from mlx_llava.checkpoint.layout import canonical_name, canonical_tensors
from mlx_llava.checkpoint.lora import CONFIG, PROJECTOR, Lora, merge_lora
from mlx_llava.checkpoint.tensors import LazyTensor
from mlx_llava.config import LlavaConfig, read_ends, unknown_keys
from mlx_llava.config_checks import unknown_warning
from mlx_llava.hub import checkpoint_name
from mlx_llava.json_files import read_json
from mlx_llava.template_choice import guess_template
from mlx_llava.tokenizer import Tokenizer, find_image_token

_EMBEDDINGS = "language_model.model.embed_tokens."
_LM_HEAD = "language_model.lm_head."


@dataclass
class Checkpoint:
    """A whole LLaVA, still on disk.

    Attributes:
        layout: what it was found to be, in words.
        config: its config.
        tensors: by canonical name.
        tokenizer: its tokenizer.
        image_processor: its preprocessor_config.json, if it has one.
        eos_ids: ends of answer from generation_config.json.
        dropped: tensors that were left out: source -> reason.
        warnings: what its user should know.
        template_doubt: why the template in its config may be another.
        read_from: the folders and files of it and of its parts.
    """

    layout: str
    config: LlavaConfig
    tensors: dict[str, LazyTensor]
    tokenizer: Tokenizer
    image_processor: dict[str, Any] | None
    eos_ids: tuple[int, ...] = ()
    dropped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    template_doubt: str = ""
    read_from: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Parts:
    """The other files that a checkpoint needs to be whole.

    Attributes:
        find: a path or a repository's name -> a local path.
        base: what a delta, a LoRA or a projector is put on.
        vision_tower: CLIP, where the checkpoint has no tower inside.
        mmproj: the second file of a GGUF pair.
    """

    find: Callable[[str | Path], Path]
    base: str | Path | None = None
    vision_tower: str | Path | None = None
    mmproj: str | Path | None = None


def open_checkpoint(path: Path, parts: Parts) -> Checkpoint:
    """Opens a checkpoint of any layout.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: It is broken, not supported, or a part of it is not given.
    """
    if path.suffix == ".gguf" or parts.mmproj or _is_gguf(path):
        return _open_gguf(path, parts)
    if path.is_file() and path.suffix not in (".bin", ".pt", ".safetensors"):
        raise ValueError(f"{path} is no checkpoint; a folder, a GGUF or an mm_projector.bin is.")
    folder = path if path.is_dir() else path.parent
    data = read_json(folder / "config.json")
    if path.is_file() or adapters.is_adapter(path) or _is_projector(path):
        return _open_adapter(path, data, parts)
    original.refuse_folder(path, data)
    if not data:
        raise FileNotFoundError(f"{path} has no config.json, and no GGUF pair.")
    tensors, is_mlx = read_folder(path)
    if any(key.startswith("transformer.blocks.") for key in tensors):
        raise ValueError(f"{path} is LLaVA on MPT, which is not supported.")
    if original.is_original(data) or any("mm_projector." in key for key in tensors):
        return _open_original(path, data, tensors, parts)
    if "llava" not in str(data.get("model_type")):
        is_clip = "clip" in str(data.get("model_type"))
        kind = "a bare CLIP; give it as --vision-tower" if is_clip else "no LLaVA"
        raise ValueError(f"{path} is {kind} (model_type={data.get('model_type')!r}).")
    for option, value in (("base", parts.base), ("vision tower", parts.vision_tower)):
        if value:
            raise ValueError(f"{path} is whole; the {option} {value} has no place in it.")
    return _open_hf(path, data, tensors, is_mlx)


def _open_hf(
    path: Path, data: dict[str, Any], tensors: Mapping[str, LazyTensor], is_mlx: bool
) -> Checkpoint:
    """llava-hf's layout in all its spellings, plain or quantised."""
    packed = _repack(path, data, tensors)
    found = canonical_tensors(packed.tensors, is_mlx)
    config = LlavaConfig.from_dict(data)
    if packed.settings:
        config = replace(config, quantization=gptq.mlx_quantization(packed.settings))
    elif config.quantization is not None:
        own = {canonical_name(path): value for path, value in config.quantization.items()}
        config = replace(config, quantization=own)
    nested = read_json(path / "processor_config.json").get("image_processor")
    checkpoint = Checkpoint(
        layout="llava-hf" + (", MLX" if is_mlx else ", GPTQ or AWQ" if packed.settings else ""),
        config=config,
        tensors=found.tensors,
        tokenizer=Tokenizer.from_folder(path, config.image_token_index),
        image_processor=read_json(path / "preprocessor_config.json") or nested,
        eos_ids=_eos_ids(path),
        dropped=packed.dropped | found.dropped,
        warnings=unknown_warning(unknown_keys(data)),
    )
    return _tie_head(checkpoint)


def _repack(path: Path, data: dict[str, Any], tensors: Mapping[str, LazyTensor]) -> gptq.Repacked:
    """MLX's layout for the layers of GPTQ and AWQ, if there are any.

    Other libraries' codes are refused; where a config speaks of some and all weights are plain,
    they were dequantised, or would be quantised by the program that loads them.
    """
    if not gptq.is_packed(tensors):
        settings = data.get("quantization_config")
        if isinstance(settings, Mapping) and "quant_method" in settings:
            gptq.refuse_codes(tensors, settings["quant_method"])
            del data["quantization_config"]
        return gptq.Repacked(dict(tensors), {}, {})
    own = read_json((path if path.is_dir() else path.parent) / "quantize_config.json")
    settings = data.pop("quantization_config", None) or own
    return gptq.repack(tensors, settings)


def _open_original(
    path: Path,
    data: dict[str, Any],
    tensors: Mapping[str, LazyTensor],
    parts: Parts,
    tokenizer_folder: Path | None = None,
) -> Checkpoint:
    """haotian-liu's layout: whole, or with a tower and a base from elsewhere."""
    packed = _repack(path, data, tensors)
    found = canonical_tensors(packed.tensors, is_mlx=False)
    layout = "original LLaVA" + (", GPTQ or AWQ" if packed.settings else "")
    weights = found.tensors
    if parts.base and tokenizer_folder is None:
        weights = adapters.apply_delta(_read_base(parts.find(parts.base)), weights)
        layout += ", delta applied"
    weights, vision, warnings = _with_tower(weights, data, parts)
    named = (path, tokenizer_folder or path)
    name = " ".join([*map(checkpoint_name, named), str(data.get("_name_or_path"))])
    config = original.read_config(data, vision, weights[_EMBEDDINGS + "weight"].shape[0], name)
    doubt = guess_template(config, name).doubt
    warnings += unknown_warning(original.unknown_keys(data, vision))
    warnings += [] if parts.base else adapters.delta_warning(checkpoint_name(path))
    weights, config, tokenizer = _with_placeholder(
        weights, config, tokenizer_folder or path, is_quantised=bool(packed.settings)
    )
    if not config.has_newline:
        weights.pop("image_newline", None)
    if packed.settings:
        config = replace(config, quantization=gptq.mlx_quantization(packed.settings))
    return _tie_head(
        Checkpoint(
            layout=layout,
            config=config,
            tensors=weights,
            tokenizer=tokenizer,
            image_processor=original.image_processor(data, config),
            eos_ids=_eos_ids(path),
            dropped=packed.dropped | found.dropped,
            warnings=warnings,
            template_doubt=doubt,
        )
    )


def _with_tower(
    weights: dict[str, LazyTensor], data: Mapping[str, Any], parts: Parts
) -> tuple[dict[str, LazyTensor], dict[str, Any], list[str]]:
    """The tower that is inside, which may be tuned and is never replaced, or the named one.

    Returns:
        The weights with a tower, its ``vision_config``, and warnings.
    """
    inside = {name: t for name, t in weights.items() if name.startswith(original.TOWER)}
    if inside:
        other = parts.find(parts.vision_tower) if parts.vision_tower else None
        return weights, *original.tower_inside(inside, data, other)
    where = parts.vision_tower or data.get("mm_vision_tower")
    if not where:
        raise ValueError("The checkpoint has no vision tower inside and names none: --vision-tower")
    try:
        folder = parts.find(where)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The vision tower {where} is needed; give it with --vision-tower. {error}"
        ) from error
    tower, vision = original.read_tower(folder)
    return weights | tower, vision, []


def _with_placeholder(
    weights: dict[str, LazyTensor], config: LlavaConfig, folder: Path, is_quantised: bool
) -> tuple[dict[str, LazyTensor], LlavaConfig, Tokenizer]:
    """The vocabulary with a placeholder for pictures: the tokenizer's own, or one more."""
    own, rows = find_image_token(folder), config.text_config.vocab_size
    if not is_quantised and (own is None or own >= rows):
        weights, config = original.add_placeholder(weights, config)
    if own is not None:
        config = replace(config, image_token_index=own)
    tokenizer = Tokenizer.from_folder(folder, config.image_token_index, prefer_sentencepiece=True)
    return weights, config, tokenizer


def _read_base(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of the model that a part is put on."""
    tensors, is_mlx = read_folder(folder)
    return canonical_tensors(tensors, is_mlx).tensors


def _is_gguf(path: Path) -> bool:
    """Whether a folder holds GGUF files and no other weights."""
    return bool(gguf_files(path)) and not visible_files(path, "*.safetensors", "*.bin")


def _is_projector(path: Path) -> bool:
    """Whether a folder holds a stand-alone projector and no model."""
    if not (path / adapters.PROJECTOR_FILE).exists():
        return False
    try:
        find_files(path)
    except FileNotFoundError:
        return True
    return False


def _open_adapter(path: Path, data: dict[str, Any], parts: Parts) -> Checkpoint:
    """A LoRA or a projector on a base: a LLaMA, or a whole LLaVA."""
    is_lora = adapters.is_adapter(path)
    kind = "LoRA" if is_lora else "projector"
    if not parts.base:
        base = read_json(path / CONFIG).get("base_model_name_or_path")
        named = f" ({CONFIG} names {base})" if base else ""
        raise ValueError(
            f"{path} is a {kind}; give the model that it belongs to with --base{named}."
        )
    part = adapters.read_adapter(path) if is_lora else adapters.read_projector(path)
    folder = parts.find(parts.base)
    base_data = read_json(folder / "config.json")
    if original.is_original({**base_data, **data}):
        checkpoint = _open_on_original(path, {**base_data, **data}, part, folder, parts)
    elif "llava" in str(base_data.get("model_type")):
        checkpoint = open_checkpoint(folder, replace(parts, base=None))
        part.check_tied(checkpoint.config.tie_word_embeddings)
        merged = merge_lora(checkpoint.tensors, part, checkpoint.config.quantization)
        plain = sum(name.endswith(".scales") for name in checkpoint.tensors.keys() - merged.keys())
        if plain:
            checkpoint.warnings.append(
                f"{plain} quantised layers became plain; --model {folder} --adapter-path {path} "
                "leaves them as they are."
            )
        checkpoint.tensors = merged
    else:
        raise ValueError(
            f"{path} needs a base that is a LLaVA, or a config.json with LLaVA's mm_ keys; "
            f"{folder} has model_type={base_data.get('model_type')!r}."
        )
    checkpoint.layout = f"{kind} on {folder.name}"
    checkpoint.warnings += part.warnings
    return checkpoint


def _open_on_original(
    path: Path, data: dict[str, Any], part: Lora, folder: Path, parts: Parts
) -> Checkpoint:
    """A part on a LLaMA or an original LLaVA, whose vocabulary it was trained with."""
    base = _read_base(folder)
    has_projector = any(name.startswith(PROJECTOR) for name in base)
    checkpoint = _open_original(path, data, merge_lora(base, part), parts, tokenizer_folder=folder)
    if data.get("tune_mm_mlp_adapter") and has_projector and not part.changes:
        checkpoint.warnings.append(
            "This projector is from stage 1 (pretraining), but the base is a tuned LLaVA with "
            "a projector of its own; together they cannot see."
        )
    return checkpoint


def _open_gguf(path: Path, parts: Parts) -> Checkpoint:
    """llama.cpp's pair of files, named or in one folder."""
    mmproj = parts.find(parts.mmproj) if parts.mmproj else None
    if path.is_dir():
        path, mmproj = find_pair(path, mmproj)
    if mmproj is None:
        raise ValueError(f"{path} is one file; a GGUF needs its mmproj too: --mmproj")
    model = read_pair(path, mmproj)
    config = LlavaConfig.from_dict(model.config)
    if model.settings:
        config = replace(config, quantization=gptq.mlx_quantization(model.settings))
    tensors = canonical_tensors(model.tensors, is_mlx=False).tensors
    if not any(name.endswith("post_layernorm.weight") for name in tensors):
        tensors |= _identity_norm(tensors)
    if not model.settings and config.image_token_index == config.text_config.vocab_size:
        tensors, config = original.add_placeholder(tensors, config)
    template, doubt = model.tokenizer_config.get("chat_template"), ""
    if not template:
        guess = guess_template(config, f"{path.name} {model.config['_name_or_path']}")
        config, doubt = replace(config, conv_mode=guess.name), guess.doubt
    tokenizer = Tokenizer(
        model.tokenizer, model.tokenizer_config, config.image_token_index, template
    )
    return Checkpoint(
        layout="GGUF pair",
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        image_processor=model.image_processor,
        eos_ids=model.eos_ids,
        dropped=model.dropped,
        warnings=model.warnings,
        template_doubt=doubt,
    )


def _identity_norm(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tower's last norm, which LLaVA never applies and GGUF files leave out."""
    prefix = "vision_tower.vision_model."
    like = tensors[f"{prefix}pre_layrnorm.weight"]
    return {
        f"{prefix}post_layernorm.weight": like.then(lambda w: w * 0 + 1),
        f"{prefix}post_layernorm.bias": like.then(lambda w: w * 0),
    }


def _tie_head(checkpoint: Checkpoint) -> Checkpoint:
    """Ties the output layer to the embedding where config.json says so and no tensor says no.

    transformers 4 asks ``text_config`` and 5 asks the top level too, whose ``true`` versions 4.36
    to 4.57 wrote unasked; so a stored head that is not the embedding is kept, as 5 does.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    tied = config.tie_word_embeddings
    head, embedding = _part(tensors, _LM_HEAD), _part(tensors, _EMBEDDINGS)
    if tied and head and not embedding:  # the one that is stored is both
        tensors |= {_EMBEDDINGS + key: head[key] for key in head}
    elif tied and head and not _same(head, embedding):
        tied = False
        checkpoint.warnings.append(
            "config.json says tie_word_embeddings, but the stored lm_head is not the embedding; "
            "the stored one is used."
        )
    if tied:
        for key in head:
            source = tensors.pop(_LM_HEAD + key).source
            checkpoint.dropped[source] = "is the embedding (tie_word_embeddings)"
    text = replace(config.text_config, tie_word_embeddings=tied)
    checkpoint.config = replace(config, text_config=text, tie_word_embeddings=tied)
    return checkpoint


def _part(tensors: Mapping[str, LazyTensor], prefix: str) -> dict[str, LazyTensor]:
    """The tensors of one layer."""
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def _same(one: Mapping[str, LazyTensor], other: Mapping[str, LazyTensor]) -> bool:
    """Whether two layers have the very same values."""
    return one.keys() == other.keys() and all(
        mx.array_equal(one[key].read(), other[key].read()).item() for key in one
    )


def _eos_ids(path: Path) -> tuple[int, ...]:
    name = "generation_config.json"
    return read_ends(read_json(path / name).get("eos_token_id"), name)
