"""Merges a trained adapter into its model: one folder that needs no adapter.

python -m mlx_llava.fuse --model BASE --adapter-path trained/adapter --output fused
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_llava.arguments import Parser, add_source_arguments, command, named, source_options
from mlx_llava.checkpoint.adapters import read_adapter
from mlx_llava.checkpoint.convert import make_plan
from mlx_llava.checkpoint.fused import split_lora
from mlx_llava.checkpoint.hub import Source
from mlx_llava.checkpoint.load import make_processor
from mlx_llava.checkpoint.open import open_checkpoint
from mlx_llava.checkpoint.save import write_model
from mlx_llava.folders import check_target, new_folder
from mlx_llava.json_files import sensible_values


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.fuse",
        description="Add what mlx_llava.train learned to the weights of its model. Quantised "
        "layers that it changed become plain, so that the result answers as before.",
    )
    add = parser.add_argument
    add("--model", help="what was trained (default: the embedded model)")
    add(
        "--adapter-path",
        required=True,
        metavar="DIR",
        help="what mlx_llava.train, PEFT, mlx-lm or mlx-vlm wrote",
    )
    add("--output", type=named, default="fused", help="the folder to make (default: %(default)s)")
    add("--requantize", action="store_true", help="quantise again what was quantised")
    add("--force", action="store_true", help="replace the folder if it is a model's")
    add_source_arguments(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    target = Path(args.output)
    keep = [args.adapter_path, args.base, args.vision_tower, args.mmproj]
    check_target(target, "model", args.force, keep)
    with sensible_values(args.model or "the embedded model"):
        checkpoint = open_checkpoint(Source(args.model, **source_options(args)))
        keep += checkpoint.contents.read_from
        check_target(target, "model", args.force, keep)
        lora = split_lora(read_adapter(Path(args.adapter_path)), checkpoint.config.text_config)
        changed = checkpoint.contents.merge(lora)
        if args.requantize and not changed:
            raise ValueError("--requantize: the adapter changed no quantised layer.")
        plan = make_plan(checkpoint, again=changed if args.requantize else ())
        processor = make_processor(checkpoint)
    for warning in checkpoint.contents.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if changed:
        fate = "were rounded to their bits again" if args.requantize else "became plain"
        print(f"{len(changed)} quantised layers {fate}", file=sys.stderr)
    with new_folder(target, "model", args.force, keep) as beside:
        write_model(beside, plan.outputs, plan.config, processor)
    print(args.output)


if __name__ == "__main__":
    sys.exit(main())
