"""A model and its processor -> a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_llava.checkpoint.safetensors import Output, output, write_weights
from mlx_llava.checkpoint.tensors import from_array, to_torch_layout
from mlx_llava.folders import new_folder
from mlx_llava.inputs.processor import Processor
from mlx_llava.json_files import write_json
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llava import Llava


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
    if model.config.quantization is None:
        tensors = to_torch_layout(tensors)
    outputs = [output(name, tensor) for name, tensor in tensors.items()]
    with new_folder(Path(folder), "model", force, keep) as beside:
        write_model(beside, outputs, model.config, processor)


def write_model(
    folder: Path,
    outputs: Sequence[Output],
    config: LlavaConfig,
    processor: Processor,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Fills a model's folder: config.json last, without which nothing is loaded.

    Weights are in PyTorch's layout, unless the config has them quantised.
    """
    write_weights(folder, outputs, is_mlx=config.quantization is not None, progress=progress)
    tokenizer = processor.tokenizer
    write_json(folder / "generation_config.json", {"eos_token_id": sorted(processor.eos_ids)})
    write_json(folder / "tokenizer.json", tokenizer.to_spec())
    write_json(folder / "tokenizer_config.json", tokenizer.config)
    images = processor.image_processor
    write_json(folder / "preprocessor_config.json", images.to_dict())
    if images.frames:
        kind = {"video_processor_type": f"{config.class_name}VideoProcessor"}
        write_json(folder / "video_preprocessor_config.json", {**images.frames.to_dict(), **kind})
    write_json(
        folder / "processor_config.json",
        {
            # ViP-LLaVA has no processor of its own.
            "processor_class": f"{config.class_name.removeprefix('Vip')}Processor",
            "patch_size": config.vision_config.patch_size,
            "num_additional_image_tokens": int(config.vision_config.has_class_token),
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            **_of_onevision(config),
        },
    )
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    write_json(folder / "config.json", config.to_dict())


def _of_onevision(config: LlavaConfig) -> dict[str, Any]:
    """What its processor counts placeholders by."""
    if config.vision_aspect_ratio is None:
        return {}
    tokens = config.vision_config.num_positions
    return {"num_image_tokens": tokens, "vision_aspect_ratio": config.vision_aspect_ratio}
