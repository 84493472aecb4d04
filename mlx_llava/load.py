"""A folder or a hub repository <-> a model and its processor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_llava.checkpoint.layout import canonical_name, canonical_weights, to_torch_layout
from mlx_llava.checkpoint.safetensors import read_weights, write_weights
from mlx_llava.config import LlavaConfig
from mlx_llava.json_files import read_json, write_json
from mlx_llava.llava import Llava
from mlx_llava.preprocess import ImageProcessor
from mlx_llava.processor import Processor
from mlx_llava.templates import get_template
from mlx_llava.tokenizer import Tokenizer

_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
_DTYPES = ("float32", "float16", "bfloat16")


def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: str | None = None,
    vision_dtype: str | None = None,
    projector_dtype: str | None = None,
    vision_device: str | None = None,
    image_mode: str | None = None,
    template: str | None = None,
    lazy: bool = False,
) -> tuple[Llava, Processor]:
    """Loads a LLaVA checkpoint.

    Args:
        path_or_repo (str or Path): A folder, or a repository on the Hugging Face hub.
        revision (str, optional): A branch, tag or commit of the repository.
        offline (bool): Uses only what was downloaded before.
        dtype (str, optional): ``float32``, ``float16`` or ``bfloat16`` for all weights.
            Default: as they are.
        vision_dtype (str, optional): The same for the vision tower alone.
        projector_dtype (str, optional): The same for the projector alone.
        vision_device (str, optional): ``cpu`` or ``gpu``: where pictures are encoded.
        image_mode (str, optional): ``crop``, ``pad`` or ``anyres``. Default: the checkpoint's.
        template (str, optional): The name of a built-in template. Default: the checkpoint's.
        lazy (bool): Reads each weight when it is first used instead of now.

    Returns:
        tuple[Llava, Processor]: The model and what prepares its inputs.

    Raises:
        FileNotFoundError: The folder or a file in it is missing.
        ValueError: The checkpoint is broken or not supported.
    """
    folder = find_folder(path_or_repo, revision, offline)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json.")
    config = LlavaConfig.from_dict(read_json(folder / "config.json"))
    processor = load_processor(folder, config, image_mode, template)
    model = load_model(folder, config)
    cast(model.vision_tower, vision_dtype or dtype)
    cast(model.multi_modal_projector, projector_dtype or dtype)
    cast(model.language_model, dtype)
    model.vision_device = _device(vision_device)
    if not lazy:
        mx.eval(model.used_parameters())
    return model, processor


def find_folder(path_or_repo: str | Path, revision: str | None, offline: bool) -> Path:
    """The local folder of a checkpoint; a repository is downloaded, a folder never is."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if path.exists() or not _is_repository(name):
        raise FileNotFoundError(f"There is no folder {name}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=_HUB_FILES, local_files_only=offline
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        where = "among the downloaded repositories" if offline else "on the Hugging Face hub"
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"There is no folder {name}, and it is not {where}: {reason}"
        ) from error
    return Path(folder)


def _is_repository(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def load_processor(
    folder: Path, config: LlavaConfig, image_mode: str | None = None, template: str | None = None
) -> Processor:
    """Reads the tokenizer, the image processor and the ends of answer of a folder."""
    tokenizer = Tokenizer.from_folder(folder, config.image_token_index)
    nested = read_json(folder / "processor_config.json").get("image_processor")
    settings = read_json(folder / "preprocessor_config.json") or nested
    ends = read_json(folder / "generation_config.json").get("eos_token_id", ())
    return Processor(
        config,
        tokenizer,
        ImageProcessor.from_config(settings, config, image_mode),
        template=get_template(template) if template else None,
        eos_ids=(ends,) if isinstance(ends, int) else tuple(ends or ()),
    )


def load_model(folder: Path, config: LlavaConfig) -> Llava:
    """Reads the weights of a folder into a model, lazily.

    Raises:
        ValueError: A tensor is missing, unknown, double, or of another size than config.json
            says.
    """
    tensors, is_mlx = read_weights(folder)
    weights = canonical_weights(tensors, is_mlx, config.tie_word_embeddings)
    model = Llava(config)
    if config.quantization is not None:
        quantize_like(model, weights, config.quantization)
    _check_weights(dict(tree_flatten(model.parameters())), weights)
    model.load_weights(list(weights.items()))
    model.eval()
    return model


def quantize_like(
    model: Llava, weights: Mapping[str, mx.array], quantization: Mapping[str, Any]
) -> None:
    """Quantises the layers of a fresh model that are quantised in a file.

    Args:
        model (Llava): Is changed.
        weights (dict): Canonical weights; a layer with ``scales`` is quantised.
        quantization (dict): ``bits``, ``group_size``, ``mode``, and settings of single layers
            by path, as mlx-lm and mlx-vlm write them.
    """
    names = ("group_size", "bits", "mode")
    default = {name: quantization[name] for name in names if name in quantization}
    single = {canonical_name(key): value for key, value in quantization.items()}

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in weights or not hasattr(module, "to_quantized"):
            return False
        own = single.get(path)
        return {**default, **own} if isinstance(own, dict) else default

    nn.quantize(model, class_predicate=settings)


def _check_weights(expected: Mapping[str, mx.array], found: Mapping[str, mx.array]) -> None:
    """Raises ValueError unless names and shapes agree."""
    problems = []
    for problem, names in (
        ("missing", expected.keys() - found.keys()),
        ("unexpected", found.keys() - expected.keys()),
    ):
        if names:
            problems.append(f"{len(names)} tensors are {problem}: {_some(sorted(names))}")
    sizes = [
        f"{name} {found[name].shape} where config.json says {expected[name].shape}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    if sizes:
        problems.append(f"{len(sizes)} tensors have another shape: {_some(sizes)}")
    if problems:
        raise ValueError(f"The checkpoint does not fit its config.json. {'; '.join(problems)}.")


def _some(items: list[str], limit: int = 4) -> str:
    more = f", ... ({len(items) - limit} more)" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def cast(module: nn.Module, dtype: str | None) -> None:
    """Casts the floating-point weights of a module; None leaves them as they are."""
    if dtype is None:
        return
    if dtype not in _DTYPES:
        raise ValueError(f"There is no dtype {dtype!r}; known: {', '.join(_DTYPES)}.")
    module.set_dtype(getattr(mx, dtype))


def _device(name: str | None) -> mx.DeviceType | None:
    if name is None:
        return None
    if name not in ("cpu", "gpu"):
        raise ValueError(f"There is no device {name!r}; known: cpu, gpu.")
    if name == "gpu" and not mx.is_available(mx.gpu):
        raise ValueError("This MLX has no GPU; leave --vision-device away or use cpu.")
    return mx.cpu if name == "cpu" else mx.gpu


def save(model: Llava, processor: Processor, folder: str | Path) -> None:
    """Writes a checkpoint that `load` and, unless it is quantised, transformers read.

    The folder appears complete or not at all.

    Raises:
        FileExistsError: There is something at `folder` already.
    """
    target = Path(folder)
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it or choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(model, processor, beside)
        beside.chmod(0o755)
        beside.rename(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _write(model: Llava, processor: Processor, folder: Path) -> None:
    config, tokenizer = model.config, processor.tokenizer
    write_json(folder / "config.json", config.to_dict())
    write_json(folder / "generation_config.json", {"eos_token_id": sorted(processor.eos_ids)})
    write_json(folder / "tokenizer.json", tokenizer.spec)
    write_json(folder / "tokenizer_config.json", tokenizer.config)
    write_json(folder / "preprocessor_config.json", processor.image_processor.to_dict())
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaNextProcessor" if config.is_anyres else "LlavaProcessor",
            "patch_size": config.vision_config.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        },
    )
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    # transformers reads PyTorch's layout; only MLX reads MLX's quantised weights anyway.
    to_mlx = config.quantization is not None
    weights = dict(tree_flatten(model.parameters()))
    write_weights(folder, weights if to_mlx else to_torch_layout(weights), is_mlx=to_mlx)
