"""Any LLaVA checkpoint -> one MLX folder, a tensor at a time.

What will be written is decided before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.checkpoint.card import model_card
from mlx_llava.checkpoint.contents import Contents
from mlx_llava.checkpoint.hub import Source, checkpoint_name
from mlx_llava.checkpoint.load import empty_model, make_processor
from mlx_llava.checkpoint.open import Checkpoint, open_checkpoint
from mlx_llava.checkpoint.precision import read_dtype
from mlx_llava.checkpoint.safetensors import Output, output
from mlx_llava.checkpoint.save import write_model
from mlx_llava.checkpoint.tensors import LazyTensor, plain_layer, to_torch_layout
from mlx_llava.files import disk_room, size_said
from mlx_llava.folders import check_target, new_folder
from mlx_llava.json_files import sensible_values
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llava import Llava
from mlx_llava.model.quantized import layer_settings
from mlx_llava.signatures import check_bounds, documented, option, takes

DEFAULT_PATH = "mlx_model"
#: mlx-lm's defaults: group size and bits of each mode (mlx_lm/utils.py, quantize_model).
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")


@documented
@dataclass(frozen=True)
class Quantization:
    """How to quantise; see mlx-lm's convert."""

    bits: int | None = option(None, int, "of each weight; None is the mode's own", ge=1, le=8)
    group_size: int | None = option(
        None, int, "weights that share a scale; None is the mode's own", ge=1
    )
    mode: str = option("affine", str, "a key of MODES")
    recipe: str | None = option(None, str, "one of RECIPES, which gives some layers more bits")
    vision: bool = option(False, bool, "quantises vision tower and projector too")

    def __post_init__(self) -> None:
        check_bounds(self, "q_")

    def settings(self) -> dict[str, Any]:
        """What MLX calls this."""
        if self.mode not in MODES:
            raise ValueError(f"There is no mode {self.mode!r}; known: {', '.join(MODES)}.")
        group_size, bits = MODES[self.mode]
        return {
            "group_size": group_size if self.group_size is None else self.group_size,
            "bits": bits if self.bits is None else self.bits,
            "mode": self.mode,
        }


@dataclass
class Plan:
    """What a conversion writes."""

    contents: Contents  # what is read
    config: LlavaConfig  # as it will be written
    outputs: list[Output]  # what is computed and written, in order

    @property
    def nbytes(self) -> int:
        """The size of the weights to be written."""
        return sum(item.nbytes for item in self.outputs)

    def __str__(self) -> str:
        lines = [f"layout: {self.contents.layout}"]
        for item in self.outputs:
            for name, shape, dtype in item.tensors:
                kind = str(dtype).removeprefix("mlx.core.")
                lines.append(f"{item.source} -> {name} {kind} {list(shape)}")
        dropped = self.contents.dropped.items()
        lines += [f"{source} -> dropped: {reason}" for source, reason in dropped]
        lines.append(f"{len(lines) - 1 - len(dropped)} tensors, {size_said(self.nbytes)}")
        return "\n".join(lines)


@takes(Source, "model")
def convert(
    path_or_repo: str | Path,
    mlx_path: str | Path = DEFAULT_PATH,
    *,
    quantization: Quantization | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    force: bool = False,
    name: str | None = None,
    progress: Callable[[int, int], object] = lambda _done, _total: None,
    **source: Any,
) -> Plan:
    """Converts a checkpoint of any layout to one MLX folder, which appears whole or not at all.

    Args:
        path_or_repo (str or Path): See `load`.
        mlx_path (str or Path): The folder to make. Default: ``mlx_model``.
        quantization (Quantization, optional): Quantises what is plain.
        dtype (str, optional): ``float16``, ``bfloat16`` or ``float32`` for all weights.
        dequantize (bool): Makes plain weights of quantised ones.
        force (bool): Replaces a model's folder that is there and holds nothing else.
        name (str, optional): What README.md calls the result. Default: as the folder.
        progress (callable): Is told the bytes that are written, and how many there will be.
        **source: Fields of `Source`.

    Returns:
        Plan: What was written.

    Raises:
        FileExistsError: `mlx_path` exists and is not replaced.
        ValueError: The checkpoint cannot be converted, or the disk is too full.
    """
    target = Path(mlx_path)
    where = Source(path_or_repo, **source)
    keep = [path_or_repo, where.base, where.vision_tower, where.mmproj]
    check_target(target, "model", force, keep)
    with sensible_values(path_or_repo):
        checkpoint = open_checkpoint(where)
        keep += checkpoint.contents.read_from
        check_target(target, "model", force, keep)
        plan = make_plan(checkpoint, quantization=quantization, dtype=dtype, dequantize=dequantize)
        processor = make_processor(checkpoint)
    _check_disk(target, plan.nbytes)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, plan.nbytes)

    with new_folder(target, "model", force, keep) as beside:
        found = checkpoint.contents.read_from[0]
        card = model_card(
            name or target.absolute().name,
            checkpoint_name(found),
            found,
            layout=plan.contents.layout,
            nbytes=plan.nbytes,
            quantization=plan.config.quantization,
            template=plan.config.conv_mode,
        )
        (beside / "README.md").write_text(card, encoding="utf-8")
        advance(0)
        write_model(beside, plan.outputs, plan.config, processor, advance)
    return plan


def _check_disk(target: Path, nbytes: int) -> None:
    parent, free = disk_room(target)
    if free < nbytes * 1.01 + 50_000_000:
        raise ValueError(
            f"{parent} has {size_said(free)} free; the result takes {size_said(nbytes)}."
        )


def make_plan(
    checkpoint: Checkpoint,
    *,
    quantization: Quantization | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    again: Sequence[str] = (),
) -> Plan:
    """Decides what to write, without reading a weight; for the options, see `convert`.

    Plain layers named in `again` are quantised as the config says of them.

    Raises:
        ValueError: The checkpoint does not fit its config, or the settings make no sense.
    """
    model, config, contents = empty_model(checkpoint), checkpoint.config, checkpoint.contents
    if dequantize and config.quantization is not None:
        contents = replace(contents, tensors=dict(contents.tensors))
        for path in [n.removesuffix(".scales") for n in contents.tensors if n.endswith(".scales")]:
            plain_layer(contents.tensors, path, config.quantization)
        text = config.text_config
        if config.image_token_index >= text.vocab_size:  # as codes have it, which are not padded
            text = replace(text, vocab_size=contents.add_placeholder())
        config = replace(config, quantization=None, text_config=text)
        model = Llava(config)
    tensors = contents.tensors
    if dtype is not None:
        target = read_dtype(dtype)
        tensors = {name: _cast(tensor, target) for name, tensor in tensors.items()}
    layers = {path: layer_settings(config.quantization or {}, path) for path in again}
    if quantization is not None:
        layers = _layers_to_quantize(model, quantization)
        config = replace(config, quantization=_written(config.quantization, quantization, layers))
    if not layers and not any(name.endswith(".scales") for name in tensors):
        config = replace(config, quantization=None)
    if config.quantization is None:
        tensors = to_torch_layout(tensors)
    outputs = []
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        settings = layers.get(path) if leaf == "weight" else None
        outputs.append(_quantized(path, tensor, settings) if settings else output(name, tensor))
    return Plan(checkpoint.contents, config, outputs)


def _cast(tensor: LazyTensor, dtype: mx.Dtype) -> LazyTensor:
    if not mx.issubdtype(tensor.dtype, mx.floating) or tensor.dtype == dtype:
        return tensor
    return tensor.then(lambda array: array.astype(dtype))


def _layers_to_quantize(model: Llava, quantization: Quantization) -> dict[str, dict[str, Any]]:
    settings, recipe = quantization.settings(), quantization.recipe
    choose: Callable[[str, nn.Module], Any] = lambda _path, _module: settings  # noqa: E731
    if recipe is not None:
        if recipe not in RECIPES:
            raise ValueError(f"There is no recipe {recipe!r}; known: {', '.join(RECIPES)}.")
        from mlx_lm.convert import mixed_quant_predicate_builder

        group_size = settings["group_size"]
        choose = mixed_quant_predicate_builder(recipe, model.language_model, group_size)
    layers = {}
    for path, module in model.named_modules():
        part, _, inner = path.partition(".")
        if not hasattr(module, "to_quantized"):
            continue
        if part == "language_model":
            layers[path] = choose(inner, module)
        elif quantization.vision:
            layers[path] = settings
        if path in layers and module.weight.shape[-1] % layers[path]["group_size"]:
            del layers[path]
    if not layers:
        raise ValueError(f"No layer can be quantised in groups of {settings['group_size']}.")
    return layers


def _written(
    already: Mapping[str, Any] | None,
    quantization: Quantization,
    layers: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """config.json's ``quantization``: the common settings, and those of layers that differ."""
    common = dict(already or quantization.settings())
    shared = {key: common.get(key, "affine") for key in ("group_size", "bits", "mode")}
    return {**common, **{path: layer for path, layer in layers.items() if layer != shared}}


def _quantized(path: str, tensor: LazyTensor, settings: Mapping[str, Any]) -> Output:
    def quantize(weight: mx.array) -> Sequence[mx.array]:
        return mx.quantize(weight, **settings)

    shadow = quantize(mx.zeros(tensor.shape, tensor.dtype))
    parts = zip(("weight", "scales", "biases"), shadow, strict=False)
    planned = tuple((f"{path}.{part}", array.shape, array.dtype) for part, array in parts)
    return Output(planned, lambda: quantize(tensor.read()), tensor.source)
