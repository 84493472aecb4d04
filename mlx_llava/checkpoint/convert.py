"""Any LLaVA checkpoint -> one MLX folder, a tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_llava.checkpoint.hub import Source
from mlx_llava.checkpoint.load import make_processor
from mlx_llava.checkpoint.open import open_checkpoint
from mlx_llava.checkpoint.quantize import Plan, Quantization, make_plan
from mlx_llava.checkpoint.save import write_model
from mlx_llava.folders import check_target, new_folder
from mlx_llava.json_files import sensible_values
from mlx_llava.model.quantized import layer_settings
from mlx_llava.signatures import takes
from mlx_llava.version import __version__

DEFAULT_PATH = "mlx_model"


@takes(Source, "model")
def convert(
    path_or_repo: str | Path,
    mlx_path: str | Path = DEFAULT_PATH,
    *,
    quantization: Quantization | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    force: bool = False,
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
        card = _model_card(str(path_or_repo), plan)
        (beside / "README.md").write_text(card, encoding="utf-8")
        write_model(beside, plan.outputs, plan.config, processor, advance)
    return plan


def _check_disk(target: Path, nbytes: int) -> None:
    parent = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes * 1.01 + 50_000_000:
        raise ValueError(
            f"{parent} has {free / 1e9:.1f} GB free; the result takes {nbytes / 1e9:.1f} GB."
        )


def _model_card(source: str, plan: Plan) -> str:
    settings = layer_settings(plan.config.quantization or {})
    common = ", ".join(f"{key} {value}" for key, value in settings.items())
    return (
        f"---\nlibrary_name: mlx\ntags:\n- mlx\n- llava\n---\n\n"
        f"# {Path(source).name}\n\n"
        f"Converted from `{source}` ({plan.contents.layout}) by mlx_llava {__version__}.\n\n"
        f"- size: {plan.nbytes / 1e9:.2f} GB\n"
        f"- quantisation: {common or 'none'}\n"
        f"- template: {plan.config.conv_mode or 'in chat_template.jinja, or chosen by shape'}\n\n"
        "```sh\npython -m mlx_llava.generate --model . --image photo.jpg "
        '--prompt "What is in this picture?"\n```\n'
    )
