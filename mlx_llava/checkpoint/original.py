"""The original LLaVA's checkpoints (haotian-liu/LLaVA v0 to v1.6): config, tower, vocabulary.

Their config.json is a LLaMA's with keys that begin with ``mm_``; the vision tower is inside
(v1.6, tuned) or must be fetched from its own repository (v1.5 and before; tower.py); the vocabulary
has no placeholder for pictures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llava.checkpoint import gptq
from mlx_llava.checkpoint.contents import Contents, preprocessing
from mlx_llava.checkpoint.folder import read_folder
from mlx_llava.checkpoint.hub import Source, checkpoint_name
from mlx_llava.checkpoint.tensors import (
    EMBEDDINGS,
    LM_HEAD,
    PROJECTOR,
    LazyTensor,
    canonical_tensors,
    combine,
)
from mlx_llava.checkpoint.tower import VIP_TOWER, read_tower
from mlx_llava.inputs.tokenizer import Tokenizer, find_image_token
from mlx_llava.json_files import read_json
from mlx_llava.model.config import projector_layers
from mlx_llava.model.config import unknown_keys as unknown_hf_keys
from mlx_llava.model.config_checks import refuse_value, unknown_warning
from mlx_llava.model.vision_config import SIGLIP, VisionConfig

#: Keys that are not the decoder's: LLaVA's, and llava-hf's, which some files have too and the
#: original does not read. The decoder's sizes stand in text_config alone where a file was
#: rewritten for vLLM.
_NOT_THE_DECODERS = frozenset(
    """
    image_aspect_ratio image_grid_pinpoints mm_patch_merge_type mm_projector_type
    mm_resampler_type mm_use_im_start_end mm_vision_select_feature mm_vision_select_layer
    mm_vision_tower projector_hidden_act text_config vision_config vision_feature_layer
    vision_feature_select_strategy
    """.split()
)
#: Decoders that are read, by a word of their names. All have RMSNorm; Qwen 1, Phi 1 and 2 have not.
_DECODERS = {"mistral": "mistral", "qwen": "qwen2", "phi": "phi3"}
#: Others; the tensors of some have the same names and other maths.
_OTHER_DECODERS = frozenset(
    """
    apertus baichuan bloom chatglm cohere dbrx ernie exaone falcon gemma glm gpt granite helium
    hunyuan internlm jamba mamba minicpm mixtral moe mpt nemotron olmo opt persimmon smollm stablelm
    starcoder
    """.split()
)
#: LLaVAs with much the same config.json and other parts: a key or class of theirs, and what differs
#: (mbzuai-oryx/GeoChat, clip_encoder.py; its checkpoint holds the tower of 336 pixels).
_OTHER_LLAVAS = {
    "llm_cfg": "VILA, whose parts are others and lie in folders of their own",
    "mm_image_tower": "Video-LLaVA or MoE-LLaVA, whose towers or experts are not supported",
    "mm_video_tower": "Video-LLaVA, whose towers are not supported",
    "geochat": "GeoChat, which stretches its tower to pictures of 504 pixels",
}
#: Towers that are neither CLIP's nor SigLIP's, by a part of their names in lower case.
_OTHER_TOWERS = {
    "aimv2": "AIMv2",
    "convnext": "ConvNeXt",
    "dino": "DINO",
    "imagebind": "ImageBind",
    "internvit": "InternViT",
    "languagebind": "LanguageBind",
    "mlcd-vit-bigg": "MLCD's largest, which rotates positions",
    "open_clip": "one of OpenCLIP's own",
    "oryx": "Oryx's, whose pictures have any size",
    "radio": "RADIO",
    "siglip2": "SigLIP 2",
}
_CLASSES = ("LlavaLlama", "LlavaMistral", "LlavaMPT", "LlavaMpt", "LlavaPhi", "LlavaQwen")
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_MODES = {"square": "crop", "pad": "pad", "anyres": "anyres", None: "crop"}
#: OneVision's, whose grids are scaled down where they have far more tiles than these.
_ANYRES_MAX = re.compile(r"anyres_max_\d+")


def is_original(data: Mapping[str, Any]) -> bool:
    """Whether config.json is the original LLaVA's; ``model_type`` alone does not tell."""
    classes = data.get("architectures")
    return bool(data.get("mm_vision_tower")) or any(
        str(name).startswith(_CLASSES) for name in (classes if isinstance(classes, list) else ())
    )


def read_original(
    path: Path,
    data: dict[str, Any],
    tensors: Mapping[str, LazyTensor],
    source: Source,
    tokenizer_folder: Path | None = None,
) -> Contents:
    """haotian-liu's layout: whole, or with a tower and a base from elsewhere.

    Where a part was put on a base, `data` and `tensors` are of both, and its tokenizer is there.
    """
    found = canonical_tensors(tensors, is_mlx=False)
    gptq.repack_folder(path, data, found)
    layout = "original LLaVA" + (", GPTQ or AWQ" if found.layers else "")
    weights, read_from = found.tensors, []
    if source.base and tokenizer_folder is None:
        read_from.append(source.find(source.base))
        base = canonical_tensors(*read_folder(read_from[0])).tensors
        weights = _apply_delta(base, weights)
        layout += ", delta applied"
    tower = read_tower(weights, data, source)
    vision, warnings = tower.settings, tower.warnings
    read_from += [tower.folder] if tower.folder else []
    rows = weights[EMBEDDINGS + "weight"].shape[0]
    settings = translate(data, vision, rows)
    warnings += unknown_warning(unknown_keys(settings))
    if not source.base and re.search(r"\bdelta\b", checkpoint_name(path).lower()):
        warnings.append(
            f"{checkpoint_name(path)} is called a delta, the difference to a LLaMA. If it is one, "
            "it answers noise without that LLaMA: --base."
        )
    side = vision.get("image_size") or VisionConfig.image_size
    images = preprocessing(_image_mode(data), side, tower.is_siglip)
    vocabulary = tokenizer_folder or path
    placeholder = find_image_token(vocabulary)
    if placeholder is not None:
        settings["image_token_index"] = placeholder
    if found.layers:
        settings["quantization"] = found.quantization()
    if _image_mode(data) != "anyres" or settings["mm_patch_merge_type"] != "spatial_unpad":
        weights.pop("image_newline", None)
    contents = Contents(
        layout=layout,
        settings=settings,
        tensors=weights,
        tokenizer=partial(Tokenizer.from_folder, vocabulary, prefer_sentencepiece=True),
        image_processor=images,
        eos_ids=read_json(path / "generation_config.json").get("eos_token_id"),
        names=" ".join([*map(checkpoint_name, (path, vocabulary)), str(data.get("_name_or_path"))]),
        has_placeholder=bool(found.layers) or (placeholder is not None and placeholder < rows),
        dropped=found.dropped | tower.dropped,
        warnings=warnings,
        read_from=read_from,
    )
    contents.tie_head()
    return contents


def _apply_delta(
    base: Mapping[str, LazyTensor], delta: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """LLaVA v0 and v1 were published as the difference to LLaMA-1 (apply_delta.py).

    The sum is taken in the delta's own float16, as the original does. Rows that the delta adds
    to the vocabulary are final, and so is the projector.
    """
    result = {}
    for name, tensor in delta.items():
        old = base.get(name)
        if old is None and name.startswith(PROJECTOR):
            result[name] = tensor
        elif old is None:
            raise ValueError(f"The base has no {name}; a delta needs the LLaMA it came from.")
        elif old.shape == tensor.shape or (
            name in (f"{EMBEDDINGS}weight", f"{LM_HEAD}weight")
            and all(a <= b for a, b in zip(old.shape, tensor.shape, strict=True))
        ):
            result[name] = combine([tensor, old], _add)
        else:
            raise ValueError(
                f"{name} is {tensor.shape} in the delta but {old.shape} in the base; a delta "
                "needs the original LLaMA that it came from."
            )
    return result


def _add(arrays: list[mx.array]) -> mx.array:
    """A delta and what of it a base covers."""
    delta, base = arrays[0], arrays[1].astype(arrays[0].dtype)
    if base.shape == delta.shape:
        return delta + base
    return delta.at[tuple(slice(n) for n in base.shape)].add(base)


def translate(
    data: Mapping[str, Any], vision: Mapping[str, Any], vocabulary: int
) -> dict[str, Any]:
    """Says with llava-hf's keys what the original's config.json says.

    Args:
        data (dict): The original config.json.
        vision (dict): The tower's ``vision_config``.
        vocabulary (int): How many rows the embedding has, whatever config.json says.
    """
    _refuse_others(data)
    text = {k: value for k, value in _settings(data).items() if k not in _NOT_THE_DECODERS}
    if (data.get("bos_token_id"), text.get("eos_token_id")) in ((0, 1), (0, [1])):
        del text["eos_token_id"]  # Lightning's ids are wrong; 1 is <s>
    is_anyres, ratio = _image_mode(data) == "anyres", str(data.get("image_aspect_ratio"))
    merge = data.get("mm_patch_merge_type") or "flat" if is_anyres else "spatial_unpad"
    selected = data.get("mm_vision_select_feature") or "patch"
    seen = {
        "vision_feature_layer": data.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _STRATEGIES.get(selected, selected),
    }
    if vision.get("model_type") == SIGLIP:  # whatever config.json says (siglip_encoder.py)
        seen = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    is_vip = data.get("mm_vision_tower") == VIP_TOWER
    kind = "llava_next" if is_anyres else "vipllava" if is_vip else "llava"
    is_onevision = bool(_ANYRES_MAX.fullmatch(ratio))
    return {
        "model_type": "llava_onevision" if is_onevision else kind,
        "vision_config": dict(vision),
        "text_config": {
            **text,
            "model_type": _decoder(data),
            "vocab_size": vocabulary,
        },
        "image_token_index": vocabulary,
        "tie_word_embeddings": data.get("tie_word_embeddings", False),
        **({} if is_vip else seen),
        "vision_aspect_ratio": ratio if is_onevision else None,
        "mm_spatial_pool_mode": data.get("mm_spatial_pool_mode") if is_onevision else None,
        "mm_newline_position": data.get("mm_newline_position") if is_onevision else None,
        "image_grid_pinpoints": data.get("image_grid_pinpoints") if is_anyres else None,
        "mm_projector_type": data.get("mm_projector_type") or "linear",
        "mm_patch_merge_type": merge,
        "anyres_convention": "original",
        "mm_use_im_start_end": bool(data.get("mm_use_im_start_end", False)),
    }


def _image_mode(data: Mapping[str, Any]) -> str:
    """How images are cut; raises ValueError for a way that is not supported."""
    ratio = data.get("image_aspect_ratio")
    if ratio in _MODES:
        return _MODES[ratio]
    if not _ANYRES_MAX.fullmatch(str(ratio)):
        expected = "'square', 'pad', 'anyres' and 'anyres_max_N'"
        refuse_value("config.json", "image_aspect_ratio", ratio, expected)
    return "anyres"


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """All keys; a text_config that was written beside them is the weaker."""
    return {**(data.get("text_config") or {}), **data}


def _kind(data: Mapping[str, Any]) -> str:
    return f"{data.get('model_type')} {data.get('architectures')}"


def recognise(folder: Path, data: Mapping[str, Any]) -> bool:
    """Whether a folder is an original LLaVA's, by its config.json, before weights are fetched.

    Raises:
        ValueError: It is another LLaVA's, which is not supported.
    """
    # xtuner's config.json is the decoder's, or missing.
    is_llava = "llava" in str(data.get("model_type"))
    if (folder / "projector" / "config.json").exists() and not is_llava:
        raise ValueError(
            f"{folder} is in xtuner's own layout; take the repository with -hf or -transformers "
            "behind its name, or convert it with xtuner's convert_xtuner_weights_to_hf.py."
        )
    if not is_original(data):
        return False
    _refuse_others(data)
    return True


def _refuse_others(data: Mapping[str, Any]) -> None:
    kind = _kind(data)
    for mark, what in _OTHER_LLAVAS.items():
        if data.get(mark) or mark in kind.lower():
            raise ValueError(f"config.json ({kind}) is that of {what}.")
    _ = _decoder(data), _image_mode(data)
    named = str(data.get("mm_vision_tower"))
    for mark, tower in _OTHER_TOWERS.items():
        if mark in named.lower():
            raise ValueError(
                f"config.json has mm_vision_tower={named!r}: the tower is {tower}, which is not "
                "supported, only CLIP and SigLIP."
            )
    if data.get("mm_resampler_type"):
        refuse_value("config.json", "mm_resampler_type", data["mm_resampler_type"], "none")
    projector_layers(data.get("mm_projector_type") or "linear")
    reads_videos = _ANYRES_MAX.fullmatch(str(data.get("image_aspect_ratio")))
    if reads_videos and data.get("add_faster_video"):
        refuse_value("config.json", "add_faster_video", True, "false")
    if data.get("quantization"):
        raise ValueError(
            "config.json is the original LLaVA's, but its weights are quantised by MLX; take the "
            "repository that it was made from, and quantise that with mlx_llava.convert."
        )


def _decoder(data: Mapping[str, Any]) -> str:
    """The decoder's ``model_type``; raises ValueError for one that is not supported."""
    kind = _kind(data)
    words = {word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", kind)}
    named = [word for word in _DECODERS if word in words]
    others = words & _OTHER_DECODERS
    if named and "rms_norm_eps" not in _settings(data):
        others |= {*named} - {"mistral"}
    others |= {*re.findall(r"qwen_?[3-9]", kind.lower())}
    if others:
        raise ValueError(
            f"config.json says {kind}: the decoder {', '.join(sorted(others))} is not supported, "
            "only LLaMA, Mistral, Qwen2 and Phi-3."
        )
    return _DECODERS[named[0]] if named else "llama"


def unknown_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What neither the original's config.json nor its tower's should say (config.unknown_keys)."""
    unknown = unknown_hf_keys(settings)
    return {key.removeprefix("text_config."): value for key, value in unknown.items()}
