"""A folder or a hub repository <-> a model and its processor."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_llava.adapter import load_adapter
from mlx_llava.checkpoint.layout import to_torch_layout
from mlx_llava.checkpoint.open import Checkpoint, Parts, open_checkpoint
from mlx_llava.checkpoint.safetensors import write_weights
from mlx_llava.checkpoint.tensors import LazyTensor, from_array, output
from mlx_llava.config import LlavaConfig
from mlx_llava.folders import new_folder
from mlx_llava.hub import find_checkpoint
from mlx_llava.json_files import sensible_values, write_json
from mlx_llava.llava import Llava
from mlx_llava.machine import configure_device
from mlx_llava.memory import check_weights
from mlx_llava.precision import cast, suit_device
from mlx_llava.preprocess import ImageProcessor
from mlx_llava.processor import Processor
from mlx_llava.quantized import PermutedQuantizedLinear, layer_settings
from mlx_llava.template_choice import guess_template
from mlx_llava.templates import get_template

logger = logging.getLogger("mlx_llava")
_ENCODER = "vision_tower.vision_model.encoder.layers."


def load(
    path_or_repo: str | Path | None = None,
    *,
    adapter_path: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    dtype: str | None = None,
    vision_dtype: str | None = None,
    projector_dtype: str | None = None,
    vision_device: str | None = None,
    image_mode: str | None = None,
    template: str | None = None,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    mmproj: str | Path | None = None,
    as_stored: bool = False,
    lazy: bool = False,
) -> tuple[Llava, Processor]:
    """Loads a LLaVA checkpoint of any layout.

    Args:
        path_or_repo (str or Path, optional): A folder, a GGUF file, or a repository on the
            Hugging Face hub. Default: the embedded model, which knows coloured shapes.
        adapter_path (str or Path, optional): What `mlx_llava.train`, PEFT, mlx-lm or mlx-vlm made
            of it: a folder, or a repository.
        revision (str, optional): A branch, tag or commit of the repository.
        offline (bool): Uses only what was downloaded before.
        dtype (str, optional): ``float32``, ``float16`` or ``bfloat16`` for all weights.
            Default: what the device is fast at, `precision.suit_device`.
        vision_dtype (str, optional): The same for the vision tower alone.
        projector_dtype (str, optional): The same for the projector alone.
        vision_device (str, optional): ``cpu`` or ``gpu``: where pictures are encoded.
        image_mode (str, optional): ``crop``, ``pad`` or ``anyres``. Default: the checkpoint's.
        template (str, optional): The name of a built-in template. Default: the checkpoint's.
        base (str or Path, optional): The model that a delta, a LoRA or a projector belongs to.
        vision_tower (str or Path, optional): CLIP, for original checkpoints without a tower.
        mmproj (str or Path, optional): The second file of a GGUF pair.
        as_stored (bool): Keeps the checkpoint's numbers, also where others are faster.
        lazy (bool): Reads each weight when it is first used instead of now.

    Returns:
        tuple[Llava, Processor]: The model and what prepares its inputs.

    Raises:
        FileNotFoundError: The folder or a file in it is missing.
        ValueError: The checkpoint is broken, not supported, or larger than memory.
    """
    with sensible_values(path_or_repo or "the embedded model"):
        checkpoint = find_and_open(
            path_or_repo,
            revision=revision,
            offline=offline,
            base=base,
            vision_tower=vision_tower,
            mmproj=mmproj,
        )
        model, processor = load_opened(checkpoint, image_mode, template)
    for warning in checkpoint.warnings:
        warnings.warn(warning, stacklevel=2)
    if adapter_path is not None:
        load_adapter(model, find_checkpoint(adapter_path, None, offline))
    configure_device()
    if dtype is None and not as_stored:
        suit_device(model)
    cast(model.vision_tower, vision_dtype or dtype)
    cast(model.multi_modal_projector, projector_dtype or dtype)
    cast(model.language_model, dtype)
    model.vision_device = _device(vision_device)
    if not lazy:
        mx.eval(model.state)  # all of it: what is lazy cannot be used in another thread
    return model, processor


def find_and_open(
    path_or_repo: str | Path | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    **parts: Any,
) -> Checkpoint:
    """Opens a checkpoint wherever it is; arguments as in `load`."""
    found = [find_checkpoint(path_or_repo, revision, offline)]

    def find(part: str | Path) -> Path:
        found.append(find_checkpoint(part, None, offline))
        return found[-1]

    checkpoint = open_checkpoint(found[0], Parts(find, **parts))
    checkpoint.read_from = found
    return checkpoint


def load_opened(
    checkpoint: Checkpoint, image_mode: str | None = None, template: str | None = None
) -> tuple[Llava, Processor]:
    """The model of a checkpoint, if memory holds it, and its processor."""
    processor = make_processor(checkpoint, image_mode, template)
    sizes = [math.prod(t.shape) * t.dtype.size for t in checkpoint.tensors.values()]
    check_weights(sum(sizes))
    return make_model(checkpoint), processor


def make_processor(
    checkpoint: Checkpoint, image_mode: str | None = None, template: str | None = None
) -> Processor:
    """The processor of a checkpoint; says in the log where its template is a guess."""
    settings, config = checkpoint.image_processor, checkpoint.config
    processor = Processor(
        config,
        checkpoint.tokenizer,
        ImageProcessor.from_config(settings, config, image_mode),
        template=get_template(template) if template else None,
        eos_ids=checkpoint.eos_ids,
    )
    if (doubt := template_doubt(checkpoint)) and not template:
        logger.warning(
            f"No file says which template the model was trained with. {processor.template.name} is "
            f"taken ({doubt}); --template NAME takes another."
        )
    return processor


def template_doubt(checkpoint: Checkpoint) -> str:
    """Why another template may be right than the one that is chosen; empty where none can."""
    config = checkpoint.config
    if config.conv_mode or checkpoint.tokenizer.chat_template:
        return checkpoint.template_doubt
    return guess_template(config).doubt


def make_model(checkpoint: Checkpoint) -> Llava:
    """A model with the weights of a checkpoint; safetensors are read when they are used.

    Raises:
        ValueError: A tensor is missing, unknown, or of another size than the config says.
    """
    model = empty_model(checkpoint.config, checkpoint.tensors)
    check_tensors(model, checkpoint.tensors)
    model.load_weights([(name, tensor.read()) for name, tensor in checkpoint.tensors.items()])
    model.eval()
    return model


def empty_model(config: LlavaConfig, names: Iterable[str]) -> Llava:
    """A model without weights, quantised where the names of its tensors say so.

    Raises:
        ValueError: The config's depth is not that of the tensors.
    """
    names = set(names)
    _check_depth(config, names)
    model = Llava(config)
    if config.quantization is not None:
        quantize_like(model, names, config.quantization)
    return model


def _check_depth(config: LlavaConfig, names: set[str]) -> None:
    """Raises ValueError where a file has more or fewer layers than its config says.

    Before a model of that many layers is built, which could take forever.
    """
    for part, prefix, expected in (
        ("text_config", "language_model.model.layers.", config.text_config.num_hidden_layers),
        ("vision_config", _ENCODER, config.vision_config.num_hidden_layers),
    ):
        indices = {n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)}
        if len(indices) != expected:
            found = len(indices) or f"0; its first tensor is {min(names, default='missing')}"
            raise ValueError(
                f"{part} has num_hidden_layers={expected}, but the checkpoint has {found}."
            )


def quantize_like(model: Llava, names: set[str], quantization: Mapping[str, Any]) -> None:
    """Quantises the layers of a fresh model that are quantised in a file.

    Args:
        model (Llava): Is changed.
        names (set of str): Canonical names of tensors; a layer with ``scales`` is quantised,
            one with ``input_permutation`` too, with its inputs in another order.
        quantization (dict): ``bits``, ``group_size``, ``mode``, and settings of single layers
            by path, as mlx-lm and mlx-vlm write them.
    """

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in names or not hasattr(module, "to_quantized"):
            return False
        return layer_settings(quantization, path)

    nn.quantize(model, class_predicate=settings)
    permuted = {
        path: PermutedQuantizedLinear.from_layer(module)
        for path, module in model.named_modules()
        if f"{path}.input_permutation" in names
    }
    model.update_modules(tree_unflatten(list(permuted.items())))


def check_tensors(model: Llava, found: Mapping[str, LazyTensor]) -> None:
    """Raises ValueError unless a checkpoint has exactly the model's tensors."""
    expected = dict(tree_flatten(model.parameters()))
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


def _device(name: str | None) -> mx.DeviceType | None:
    if name is None:
        return None
    if name not in ("cpu", "gpu"):
        raise ValueError(f"There is no device {name!r}; known: cpu, gpu.")
    if name == "gpu" and not mx.is_available(mx.gpu):
        raise ValueError("This MLX has no GPU; leave --vision-device away or use cpu.")
    return mx.cpu if name == "cpu" else mx.gpu


def save(
    model: Llava,
    processor: Processor,
    folder: str | Path,
    *,
    force: bool = False,
    keep: Iterable[str | Path | None] = (),
) -> None:
    """Writes a checkpoint that `load` and, unless it is quantised, transformers read.

    The folder appears complete or not at all.

    Args:
        model (Llava): Its weights are written as they are.
        processor (Processor): Its processor.
        folder (str or Path): Where to write.
        force (bool): Replaces a model's folder that is there; see `folders.check_target`.
        keep (iterable of str or Path): What the model was read from, which is never replaced.

    Raises:
        FileExistsError: There is something at `folder` that is not replaced.
    """
    arrays = dict(tree_flatten(model.parameters()))
    tensors = {name: from_array("the model", array) for name, array in arrays.items()}
    with new_folder(Path(folder), "model", force, keep) as beside:
        is_mlx = model.config.quantization is not None
        layout = tensors if is_mlx else to_torch_layout(tensors)
        outputs = [output(name, tensor) for name, tensor in layout.items()]
        write_weights(beside, outputs, is_mlx=is_mlx)
        write_settings(beside, model.config, processor)


def write_settings(folder: Path, config: LlavaConfig, processor: Processor) -> None:
    """Writes everything but the weights; config.json last, without which nothing is loaded."""
    tokenizer = processor.tokenizer
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
    write_json(folder / "config.json", config.to_dict())
