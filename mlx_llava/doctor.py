"""Is this machine set up well, and how fast should a model be on it, and on a Mac?

python -m mlx_llava doctor
python -m mlx_llava doctor --model mlx-community/llava-1.5-7b-4bit
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_llava.analysis.machine import advice, describe, matmul_rate, read_rate
from mlx_llava.analysis.predict import predict
from mlx_llava.analysis.several import foresee, measure, report
from mlx_llava.arguments import (
    Parser,
    add_ranks_arguments,
    add_source_arguments,
    command,
    source_options,
)
from mlx_llava.checkpoint.hub import Source
from mlx_llava.model.device import on_cpu
from mlx_llava.model.ranks import Ranks, met


def examine() -> dict[str, Any]:
    """Describes the machine and measures it, which takes some seconds."""
    dtypes = [mx.float32] if on_cpu() else [mx.float32, mx.float16, mx.bfloat16]
    rates = {str(dtype).removeprefix("mlx.core."): round(matmul_rate(dtype)) for dtype in dtypes}
    return {
        **describe(),
        "matmul_gflops": rates,
        "read_gb_per_second": round(read_rate(), 1),
        "advice": advice(),
    }


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.doctor",
        description="Show what MLX runs on here and how fast it is, and what to expect of a model.",
    )
    parser.add_argument("--model", help="calculate how fast this one should be, here and on Macs")
    add_source_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_ranks_arguments(parser)
    return parser


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What `examine` found, for people."""
    for name, value in found.items():
        if name != "advice":
            shown = (
                ", ".join(f"{k} {v}" for k, v in value.items())
                if isinstance(value, dict)
                else value
            )
            yield f"{name.replace('_', ' '):<20} {shown}"
    yield from found["advice"] or ["All is well."]


def expected_lines(expected: Mapping[str, Any]) -> Iterator[str]:
    """What `predict` calculated, for people."""
    yield ""
    yield (
        f"{expected['model']}, one picture, {expected['prompt_tokens']} tokens of prompt: "
        "calculated from shapes and rates, not measured"
    )
    yield (
        f"{expected['encode_tflop']:.2f} TFLOP to encode, {expected['prefill_tflop']:.2f} to read "
        f"the prompt; {expected['weights_gb']:.2f} GB of weights, {expected['token_gb']:.2f} GB "
        "read for a token"
    )
    yield "          first token   tokens/s"
    for name, speed in {"here": expected["here"], **expected["macs"]}.items():
        if "refused" in speed:
            yield f"{name:<10}{speed['refused']}"
        else:
            yield f"{name:<10}{speed['first_token']:9.2f} s {speed['tokens_per_second']:10.1f}"


@command(is_shared=True)
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    source = Source(args.model, **source_options(args)) if args.model else None
    ranks, wire = met(), None
    if isinstance(ranks, Ranks):
        ranks.agree({})
        wire = measure(ranks)
        if not ranks.speaks:
            return
    expected = predict(source) if source else None
    several = foresee(source, wire, ranks.size) if source and wire else []
    found = examine()
    if args.json:
        more = {"expected": expected} if expected else {}
        more |= {"ranks": {**vars(wire), "expected": several}} if wire else {}
        print(json.dumps({**found, **more}, indent=2))
        return
    print(*lines(found), sep="\n")
    if expected:
        print(*expected_lines(expected), sep="\n")
    if wire:
        print("", *report(wire, several), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
