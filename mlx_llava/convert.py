"""Any LLaVA checkpoint -> one MLX folder, a tensor at a time.

python -m mlx_llava.convert --model liuhaotian/llava-v1.5-7b --mlx-path llava-1.5-7b -q
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_llava.arguments import Parser, add_source_arguments, command, named, source_options
from mlx_llava.bars import progress_bar
from mlx_llava.checkpoint.convert import (
    DEFAULT_PATH,
    MODES,
    RECIPES,
    Quantization,
    convert,
    make_plan,
)
from mlx_llava.checkpoint.hub import Source
from mlx_llava.checkpoint.load import load
from mlx_llava.checkpoint.open import open_checkpoint
from mlx_llava.checkpoint.verify import compare, verify
from mlx_llava.files import size_said
from mlx_llava.folders import MANIFEST
from mlx_llava.json_files import sensible_values
from mlx_llava.model.device import DTYPES


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.convert",
        description="Convert any LLaVA checkpoint to MLX. Original LLaVA, llava-hf, GPTQ, AWQ, "
        "GGUF, deltas and LoRA are recognised by what is in them.",
    )
    add = parser.add_argument
    add(
        "--model",
        "--hf-path",
        type=named,
        required=True,
        help="a folder, a GGUF file, or a hub repository",
    )
    add("--mlx-path", type=named, help=f"the folder to make (default: {DEFAULT_PATH})")
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
    add("--upload-repo", type=named, help="then upload the result to this hub repository")
    return parser


def _print_checks(path_or_repo: str | Path, **source: Any) -> None:
    for name, found in verify(path_or_repo, **source):
        print(f"{name + ':':14}{found}", flush=True)


def _upload(folder: Path, repo: str) -> None:
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
    given = Quantization(args.q_bits, args.q_group_size, args.q_mode, args.q_recipe, args.q_vision)
    quantization = given if args.quantize else None
    if quantization is None and given != Quantization():
        raise ValueError("--q-bits, --q-group-size, --q-mode, --q-recipe and --q-vision need -q.")
    source = source_options(args)
    requested = {"quantization": quantization, "dtype": args.dtype, "dequantize": args.dequantize}
    if args.dry_run:
        with sensible_values(args.model):
            print(make_plan(open_checkpoint(Source(args.model, **source)), **requested))
        return
    to_convert = (args.mlx_path, args.quantize, args.dequantize, args.dtype, args.upload_repo)
    if args.verify and not any((*to_convert, args.force)):
        _print_checks(args.model, **source)
        return
    target = args.mlx_path or DEFAULT_PATH
    with progress_bar("converting", "opening", unit="B", unit_scale=True) as show:
        plan = convert(
            args.model,
            target,
            force=args.force,
            name=args.upload_repo,
            progress=show,
            **requested,
            **source,
        )
    for warning in plan.contents.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{plan.contents.layout} -> {target}, {size_said(plan.nbytes)}", file=sys.stderr)
    if args.verify:
        _print_checks(target)
        measured = compare(load(args.model, **source), load(target))
        print("  ".join(f"{key} {value:.6g}" for key, value in measured.items()), file=sys.stderr)
    if args.upload_repo:
        _upload(Path(target), args.upload_repo)


if __name__ == "__main__":
    sys.exit(main())
