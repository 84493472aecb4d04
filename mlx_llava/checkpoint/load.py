"""A folder or a hub repository <-> a model and its processor."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_llava.checkpoint.adapters import LowRank, low_rank_layers, put_beside, read_adapter
from mlx_llava.checkpoint.download import fitting_model
from mlx_llava.checkpoint.fused import split_lora
from mlx_llava.checkpoint.hub import Source
from mlx_llava.checkpoint.open import Checkpoint, open_checkpoint
from mlx_llava.checkpoint.precision import cast, suit_device
from mlx_llava.checkpoint.share import Connect, take_layers, take_shard
from mlx_llava.checkpoint.tensors import TOWER, LazyTensor
from mlx_llava.inputs.image_processor import ImageProcessor
from mlx_llava.inputs.processor import Processor
from mlx_llava.inputs.templates import get_template
from mlx_llava.json_files import sensible_values
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.device import check_weights, configure_device, total_memory
from mlx_llava.model.linux.adopt import adopt
from mlx_llava.model.llava import Llava
from mlx_llava.model.quantized import PermutedQuantizedLinear, layer_settings
from mlx_llava.signatures import takes

logger = logging.getLogger("mlx_llava")

#: So many bytes of weights are read together.
_AT_ONCE = 1 << 26


@takes(Source, "model")
def load(
    path_or_repo: str | Path | None = None,
    *,
    adapter_path: str | Path | None = None,
    dtype: str | None = None,
    vision_dtype: str | None = None,
    projector_dtype: str | None = None,
    vision_device: str | None = None,
    image_mode: str | None = None,
    template: str | None = None,
    as_stored: bool = False,
    lazy: bool = False,
    group: mx.distributed.Group | None = None,
    pipeline: bool = False,
    split: Sequence[int] | None = None,
    progress: Callable[[int, int], object] = lambda _done, _total: None,
    **source: Any,
) -> tuple[Llava, Processor]:
    """Loads a LLaVA checkpoint of any layout.

    Args:
        path_or_repo (str or Path, optional): A folder, a GGUF file, or a repository on the
            Hugging Face hub. Default: the embedded model, which knows coloured shapes.
        adapter_path (str or Path, optional): What `mlx_llava.train`, PEFT, mlx-lm or mlx-vlm made
            of it: a folder, or a repository.
        dtype (str, optional): ``float32``, ``float16`` or ``bfloat16`` for all weights.
            Default: what the device is fast at, `precision.suit_device`.
        vision_dtype (str, optional): The same for the vision tower alone.
        projector_dtype (str, optional): The same for the projector alone.
        vision_device (str, optional): ``cpu`` or ``gpu``: where pictures are encoded.
        image_mode (str, optional): ``crop``, ``pad`` or ``anyres``. Default: the checkpoint's.
        template (str, optional): The name of a built-in template. Default: the checkpoint's.
        as_stored (bool): Keeps the checkpoint's numbers, also where others are faster.
        lazy (bool): Reads each weight when it is first used instead of now.
        group (mx.distributed.Group, optional): All ranks that call this at the same time, of which
            each loads and computes a part.
        pipeline (bool): That part is some of the layers, not some of each layer.
        split (sequence of int, optional): How many layers each rank gets. Default: as its memory
            allows.
        progress (callable): Is told the bytes that are read, and how many there will be.
        **source: Fields of `Source`.

    Returns:
        tuple[Llava, Processor]: The model and what prepares its inputs.

    Raises:
        FileNotFoundError: The folder or a file in it is missing.
        ValueError: The checkpoint is broken, not supported, or larger than memory.
    """
    where = Source(path_or_repo, **source)
    with sensible_values(path_or_repo or "the embedded model"):
        checkpoint = open_checkpoint(where, total_memory())
        beside: dict[str, LowRank] = {}
        if adapter_path is not None:
            lora = read_adapter(where.find(adapter_path))
            lora = split_lora(lora, checkpoint.config.text_config)
            beside = low_rank_layers(lora)
            checkpoint.contents.merge(lora, beside)
        connect = None
        if group is not None and group.size() > 1:
            connect = _take_share(checkpoint, group, pipeline, split, beside)
        model, processor = load_opened(checkpoint, image_mode, template)
    if beside:
        put_beside(model, beside)
    for warning in checkpoint.contents.warnings:
        warnings.warn(warning, stacklevel=2)
    configure_device()
    if dtype is None and not as_stored:
        suit_device(model)
    cast(model.vision_tower, vision_dtype or dtype)
    cast(model.multi_modal_projector, projector_dtype or dtype)
    cast(model.language_model, dtype)
    model.vision_device = _device(vision_device)
    adopt(model)
    if connect is not None:
        connect(model)
    if not lazy:
        # All of it: what is lazy cannot be used in another thread, and holds what was before.
        mx.eval(mx.random.state)
        _read(model, progress)
    return model, processor


def _read(model: Llava, progress: Callable[[int, int], object]) -> None:
    """Reads all weights, some at a time, so that one sees how it goes on."""
    leaves = dict(tree_flatten(model.state)).values()
    arrays = [leaf for leaf in leaves if isinstance(leaf, mx.array)]
    total, done, waiting = sum(array.nbytes for array in arrays), 0, list[mx.array]()
    for array in arrays:
        waiting.append(array)
        done += array.nbytes
        if done == total or sum(one.nbytes for one in waiting) > _AT_ONCE:
            mx.eval(waiting)
            waiting.clear()
            progress(done, total)


def _take_share(
    checkpoint: Checkpoint,
    group: mx.distributed.Group,
    pipeline: bool,
    split: Sequence[int] | None,
    beside: Mapping[str, LowRank],
) -> Connect:
    """Leaves this rank's part of a checkpoint; what is wrong with it, every rank finds."""
    if beside:
        raise ValueError(
            "An adapter beside the layers cannot be shared by several ranks; make one model of "
            "both with mlx_llava.fuse."
        )
    empty_model(checkpoint)
    if pipeline or split:
        return take_layers(checkpoint, group, split)
    return take_shard(checkpoint, group)


def load_opened(
    checkpoint: Checkpoint, image_mode: str | None = None, template: str | None = None
) -> tuple[Llava, Processor]:
    """The model of a checkpoint, if memory holds it and it fits its config, and its processor."""
    processor = make_processor(checkpoint, image_mode, template)
    tensors = checkpoint.contents.tensors
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    check_weights(nbytes, checkpoint.config.quantization is not None, fitting_model())
    model = empty_model(checkpoint)
    model.load_weights([(name, tensor.read()) for name, tensor in tensors.items()])
    model.eval()
    return model, processor


def make_processor(
    checkpoint: Checkpoint, image_mode: str | None = None, template: str | None = None
) -> Processor:
    """The processor of a checkpoint; says in the log where its template is a guess."""
    contents, config = checkpoint.contents, checkpoint.config
    images = ImageProcessor.from_config(contents.image_processor, config, image_mode)
    processor = Processor(
        config,
        checkpoint.tokenizer,
        images.with_frames(contents.video_processor),
        template=get_template(template) if template else None,
        eos_ids=checkpoint.eos_ids,
    )
    if checkpoint.template_doubt and not template:
        logger.warning(
            f"No file says which template the model was trained with. {processor.template.name} is "
            f"taken ({checkpoint.template_doubt}); --template NAME takes another."
        )
    return processor


def count_parameters(config: LlavaConfig) -> int:
    """How many numbers a model has, also where they are stored as codes."""
    arrays: dict[str, mx.array] = dict(tree_flatten(Llava(config).parameters()))  # not computed
    mx.eval(mx.random.state)
    return sum(array.size for array in arrays.values())


def empty_model(checkpoint: Checkpoint) -> Llava:
    """A model that has yet to get a checkpoint's tensors, and would take them all."""
    config, tensors = checkpoint.config, checkpoint.contents.tensors
    _check_depth(config, tensors)
    model = Llava(config)
    if config.quantization is not None:
        _quantize_like(model, tensors, config.quantization)
    _check_tensors(model, tensors)
    return model


def _check_depth(config: LlavaConfig, names: Iterable[str]) -> None:
    """Before a model of as many layers is built as a config says, which could take forever."""
    for part, prefix, expected in (
        ("text_config", "language_model.model.layers.", config.text_config.num_hidden_layers),
        ("vision_config", f"{TOWER}encoder.layers.", config.vision_config.num_hidden_layers),
    ):
        indices = {n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)}
        if len(indices) != expected:
            found = len(indices) or f"0; its first tensor is {min(names, default='missing')}"
            raise ValueError(
                f"{part} has num_hidden_layers={expected}, but the checkpoint has {found}."
            )


def _quantize_like(model: Llava, names: Container[str], quantization: Mapping[str, Any]) -> None:
    """Quantises the layers whose tensors have ``scales``; see `quantized.layer_settings`.

    Those with an ``input_permutation`` have their inputs in another order.
    """

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in names or not hasattr(module, "to_quantized"):
            return False
        return layer_settings(quantization, path)

    nn.quantize(model, class_predicate=settings)
    for path, module in model.named_modules():
        if f"{path}.input_permutation" in names:
            PermutedQuantizedLinear.adopt(module)


def _check_tensors(model: Llava, found: Mapping[str, LazyTensor]) -> None:
    expected = dict(tree_flatten(model.parameters()))
    problems = {
        "are missing": expected.keys() - found.keys(),
        "are unexpected": found.keys() - expected.keys(),
        "have another shape": {
            f"{name} {found[name].shape} where config.json says {array.shape}"
            for name, array in expected.items()
            if name in found and found[name].shape != array.shape
        },
    }
    said = [
        f"{len(names)} tensors {problem}: {_some(sorted(names))}"
        for problem, names in problems.items()
        if names
    ]
    if said:
        raise ValueError(f"The checkpoint does not fit its config.json. {'; '.join(said)}.")


def _some(items: list[str], limit: int = 4) -> str:
    more = f", ... ({len(items) - limit} more)" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _device(name: str | None) -> mx.DeviceType | None:
    if name not in (None, "cpu", "gpu"):
        raise ValueError(f"There is no device {name!r}; known: cpu, gpu.")
    if name == "gpu" and not mx.is_available(mx.gpu):
        raise ValueError("This MLX has no GPU; leave --vision-device away or use cpu.")
    return {None: None, "cpu": mx.cpu, "gpu": mx.gpu}[name]
