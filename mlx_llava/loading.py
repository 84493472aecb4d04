"""What the commands that ask a model have in common: which one, and how it is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_llava.command import add_source_arguments, source_options
from mlx_llava.llava import Llava
from mlx_llava.load import load
from mlx_llava.precision import DTYPES
from mlx_llava.preprocess import MODES
from mlx_llava.processor import Processor


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds which model to load, and how."""
    add = parser.add_argument
    add("--model", help="a folder, a GGUF file, or a hub repository (default: embedded)")
    add("--adapter-path", metavar="DIR", help="what mlx_llava.train made of the model")
    add("--template", help="a built-in template instead of the checkpoint's own")
    add("--image-mode", choices=MODES, help="how pictures are cut (default: the checkpoint's)")
    add("--dtype", choices=DTYPES, help="of all weights (default: what the device is fast at)")
    add_source_arguments(parser)


def load_model(args: argparse.Namespace, **options: Any) -> tuple[Llava, Processor]:
    """Loads what was asked for by `add_model_arguments`; `options` are others of `load`."""
    return load(
        args.model,
        adapter_path=args.adapter_path,
        template=args.template,
        image_mode=args.image_mode,
        dtype=args.dtype,
        **source_options(args),
        **options,
    )
