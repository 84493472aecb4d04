"""Any LLaVA checkpoint -> one MLX folder, a tensor at a time.

python -m mlx_llava.convert --model liuhaotian/llava-v1.5-7b --mlx-path llava-1.5-7b -q
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.checkpoint.safetensors import write_weights
from mlx_llava.command import add_source_arguments, command, progress_bar, source_options
from mlx_llava.folders import MANIFEST, check_target, new_folder
from mlx_llava.json_files import sensible_values
from mlx_llava.load import (
    find_and_open,
    load,
    make_processor,
    write_settings,
)
from mlx_llava.plan import MODES, RECIPES, Plan, Quantization, make_plan
from mlx_llava.precision import DTYPES
from mlx_llava.processor import Processor
from mlx_llava.quantized import layer_settings
from mlx_llava.verify import QUESTION, example_picture, verify
from mlx_llava.version import __version__

DEFAULT_PATH = "mlx_model"


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
        **source: ``base``, ``vision_tower``, ``mmproj``, ``revision``, ``offline`` of `load`.

    Returns:
        Plan: What was written.

    Raises:
        FileExistsError: `mlx_path` exists and is not replaced.
        ValueError: The checkpoint cannot be converted, or the disk is too full.
    """
    target = Path(mlx_path)
    keep = [path_or_repo, *(source.get(part) for part in ("base", "vision_tower", "mmproj"))]
    check_target(target, "model", force, keep)
    with sensible_values(path_or_repo):
        checkpoint = find_and_open(path_or_repo, **source)
        keep += checkpoint.read_from
        check_target(target, "model", force, keep)
        plan = make_plan(checkpoint, quantization=quantization, dtype=dtype, dequantize=dequantize)
        processor = make_processor(plan.checkpoint)
    _check_disk(target, plan.nbytes)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, plan.nbytes)

    with new_folder(target, "model", force, keep) as beside:
        write_weights(beside, plan.outputs, is_mlx=plan.is_mlx, progress=advance)
        card = _model_card(str(path_or_repo), plan)
        (beside / "README.md").write_text(card, encoding="utf-8")
        write_settings(beside, plan.checkpoint.config, processor)
    return plan


def _check_disk(target: Path, nbytes: int) -> None:
    """Raises ValueError unless the weights fit, with a little room for the rest."""
    parent = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes * 1.01 + 50_000_000:
        raise ValueError(
            f"{parent} has {free / 1e9:.1f} GB free; the result takes {nbytes / 1e9:.1f} GB."
        )


def _model_card(source: str, plan: Plan) -> str:
    """The README.md of the result."""
    config = plan.checkpoint.config
    settings = layer_settings(config.quantization or {})
    common = ", ".join(f"{key} {value}" for key, value in settings.items())
    return (
        f"---\nlibrary_name: mlx\ntags:\n- mlx\n- llava\n---\n\n"
        f"# {Path(source).name}\n\n"
        f"Converted from `{source}` ({plan.checkpoint.layout}) by mlx_llava {__version__}.\n\n"
        f"- size: {plan.nbytes / 1e9:.2f} GB\n"
        f"- quantisation: {common or 'none'}\n"
        f"- template: {config.conv_mode or 'in chat_template.jinja, or chosen by shape'}\n\n"
        "```sh\npython -m mlx_llava.generate --model . --image photo.jpg "
        '--prompt "What is in this picture?"\n```\n'
    )


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mlx_llava.convert",
        description="Convert any LLaVA checkpoint to MLX. Original LLaVA, llava-hf, GPTQ, AWQ, "
        "GGUF, deltas and LoRA are recognised by what is in them.",
    )
    add = parser.add_argument
    add("--model", "--hf-path", required=True, help="a folder, a GGUF file, or a hub repository")
    add("--mlx-path", help=f"the folder to make (default: {DEFAULT_PATH})")
    add_source_arguments(parser)
    add("--quantize", "-q", action="store_true", help="quantise the language model")
    add("--q-bits", type=int, help="bits of a weight (default: the mode's, 4 for affine)")
    add("--q-group-size", type=int, help="weights of a group (default: the mode's, 64)")
    add("--q-mode", choices=MODES, default="affine", help="(default: %(default)s)")
    add("--q-recipe", choices=RECIPES, help="more bits for some layers, as in mlx-lm")
    add("--q-vision", action="store_true", help="quantise vision tower and projector too")
    add("--dequantize", "-d", action="store_true", help="make plain weights of quantised ones")
    add("--dtype", choices=DTYPES, help="of all weights (default: as they are)")
    add("--force", action="store_true", help="replace the folder if it is a model's")
    add("--dry-run", action="store_true", help="print what would be written, and write nothing")
    add(
        "--verify",
        action="store_true",
        help="check that the result is read right, and compare it with the source on a picture; "
        "with nothing to convert to or by, check --model and write nothing",
    )
    add("--upload-repo", help="then upload the result to this hub repository")
    return parser


def compare(
    source: tuple[nn.Module, Processor], result: tuple[nn.Module, Processor]
) -> dict[str, float]:
    """Runs two models on one drawn picture and question.

    Returns:
        dict: ``max_difference`` of the logits, ``top_1`` the fraction of positions with the same
        likeliest token, ``kl`` the mean divergence of the result from the source in nats.
    """
    picture = example_picture()
    (model, processor), (other, other_processor) = source, result
    logits = model(**processor(QUESTION, picture)).astype(mx.float32)
    others = other(**other_processor(QUESTION, picture)).astype(mx.float32)
    rows = min(logits.shape[-1], others.shape[-1])
    logits, others = logits[..., :rows], others[..., :rows]
    log_p, log_q = nn.log_softmax(logits), nn.log_softmax(others)
    return {
        "max_difference": float(mx.abs(logits - others).max()),
        "top_1": float((logits.argmax(-1) == others.argmax(-1)).mean()),
        "kl": float((mx.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
    }


def _print_checks(path_or_repo: str | Path, **source: Any) -> None:
    """Prints the checks of a checkpoint as they come.

    Raises:
        ValueError: One does not hold.
    """
    for finding in verify(path_or_repo, **source):
        print(f"{finding.name + ':':14}{finding.found}", flush=True)


def _upload(folder: Path, repo: str) -> None:
    """Uploads a folder; whatever goes wrong on the way is the network's or the account's."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=[MANIFEST])
    except Exception as error:  # the hub's own errors, and those of its HTTP library
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{folder} is complete, but its upload failed: {reason}") from error


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    wants = Quantization(args.q_bits, args.q_group_size, args.q_mode, args.q_recipe, args.q_vision)
    quantization = wants if args.quantize else None
    if quantization is None and wants != Quantization():
        raise ValueError("--q-bits, --q-group-size, --q-mode, --q-recipe and --q-vision need -q.")
    source = source_options(args)
    wanted = {"quantization": quantization, "dtype": args.dtype, "dequantize": args.dequantize}
    if args.dry_run:
        with sensible_values(args.model):
            print(make_plan(find_and_open(args.model, **source), **wanted))
        return
    to_convert = (args.mlx_path, args.quantize, args.dequantize, args.dtype, args.upload_repo)
    if args.verify and not any((*to_convert, args.force)):
        _print_checks(args.model, **source)
        return
    target = args.mlx_path or DEFAULT_PATH
    with progress_bar("converting", unit="B", unit_scale=True) as show:
        plan = convert(
            args.model,
            target,
            force=args.force,
            progress=show,
            **wanted,
            **source,
        )
    for warning in plan.checkpoint.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{plan.checkpoint.layout} -> {target}, {plan.nbytes / 1e9:.2f} GB", file=sys.stderr)
    if args.verify:
        _print_checks(target)
        measured = compare(load(args.model, **source), load(target))
        print("  ".join(f"{key} {value:.6g}" for key, value in measured.items()), file=sys.stderr)
    if args.upload_repo:
        _upload(Path(target), args.upload_repo)


if __name__ == "__main__":
    sys.exit(main())
