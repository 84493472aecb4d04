"""What the commands that ask a model have in common: which one, how loaded, how to answer."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

from mlx_llava.checkpoint.hub import EMBEDDED_NOTE
from mlx_llava.checkpoint.load import load
from mlx_llava.checkpoint.precision import DTYPES
from mlx_llava.command import add_source_arguments, source_options
from mlx_llava.generation.json_schema import read_schema
from mlx_llava.generation.steps import MAX_TOKENS, Options
from mlx_llava.inputs.image_processor import MODES
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.llava import Llava


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds which model to load, and how."""
    add = parser.add_argument
    add("--model", help="a folder, a GGUF file, or a hub repository (default: embedded)")
    add("--adapter-path", metavar="DIR", help="what was trained of the model, here or with PEFT")
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


def say_if_embedded(args: argparse.Namespace) -> None:
    """Says on stderr what answers where no model was named."""
    if args.model is None:
        print(EMBEDDED_NOTE, file=sys.stderr)


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how to answer."""
    add = parser.add_argument
    add("--max-tokens", "-m", type=int, default=MAX_TOKENS, help="(default: %(default)s)")
    add("--temp", type=float, default=0.0, help="temperature (default: 0, the likeliest word)")
    add("--top-p", type=float, default=0.0, help="nucleus sampling (default: off)")
    add("--min-p", type=float, default=0.0, help="minimum relative probability (default: off)")
    add("--top-k", type=int, default=0, help="sample from the k likeliest (default: off)")
    add("--repetition-penalty", type=float, help="above 1 makes repetition less likely")
    add("--seed", type=int, help="makes sampling repeatable")
    add("--stop", action="append", default=[], help="a text that ends the answer; repeatable")
    add("--json-schema", metavar="FILE", help="a JSON schema, or its text, that the answer follows")


def answer_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given for `add_answer_arguments`, as the fields of `Options`."""
    options = {field.name: getattr(args, field.name) for field in fields(Options)}
    if args.json_schema is not None:
        options["json_schema"] = read_schema(args.json_schema)
    return options
