"""Merges a trained adapter into its model: one folder that needs no adapter.

python -m mlx_llava.fuse --model BASE --adapter-path trained/adapter --output fused
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.arguments import add_source_arguments, command, source_options
from mlx_llava.checkpoint.adapter import load_adapter, merge_adapter
from mlx_llava.checkpoint.hub import Source
from mlx_llava.checkpoint.load import load
from mlx_llava.checkpoint.open import open_checkpoint
from mlx_llava.checkpoint.save import save
from mlx_llava.folders import check_target
from mlx_llava.json_files import sensible_values
from mlx_llava.model.quantized import is_quantized, layer_settings


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
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
    add("--output", default="fused", help="the folder to make (default: %(default)s)")
    add("--requantize", action="store_true", help="quantise again what was quantised")
    add("--force", action="store_true", help="replace the folder if it is a model's")
    add_source_arguments(parser)
    return parser


def requantize(model: nn.Module, paths: Sequence[str], quantization: Mapping[str, Any]) -> None:
    """Quantises layers as they were."""
    nn.quantize(
        model,
        class_predicate=lambda path, _: path in paths and layer_settings(quantization, path),
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    keep = [args.adapter_path, args.base, args.vision_tower, args.mmproj]
    if args.force:
        with sensible_values(args.model or "the embedded model"):
            source = Source(args.model, **source_options(args))
            keep += open_checkpoint(source).contents.read_from
    check_target(Path(args.output), "model", args.force, keep)
    model, processor = load(args.model, as_stored=True, **source_options(args))
    changed = load_adapter(model, args.adapter_path)
    changed += merge_adapter(model)
    if args.requantize and not changed:
        raise ValueError("--requantize: the adapter changed no quantised layer.")
    if args.requantize:
        requantize(model, changed, model.config.quantization or {})
        print(f"{len(changed)} layers were rounded to their bits again", file=sys.stderr)
    elif changed:
        print(f"{len(changed)} quantised layers became plain", file=sys.stderr)
    if not any(is_quantized(module) for module in model.modules()):
        model.config = replace(model.config, quantization=None)
    mx.eval(model.parameters())
    save(model, processor, args.output, force=args.force, keep=keep)
    print(args.output)


if __name__ == "__main__":
    sys.exit(main())
