"""Is this machine set up well? ``python -m mlx_llava doctor``: device, speed, memory, advice."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_llava.analysis.machine import advice, describe, matmul_rate, read_rate
from mlx_llava.arguments import command
from mlx_llava.model.device import on_cpu


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
    parser = argparse.ArgumentParser(
        prog="mlx_llava.doctor", description="Show what MLX runs on here, and how fast it is."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    found = examine()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        if name != "advice":
            shown = (
                ", ".join(f"{k} {v}" for k, v in value.items())
                if isinstance(value, dict)
                else value
            )
            print(f"{name.replace('_', ' '):<20} {shown}")
    print(*(found["advice"] or ["All is well."]), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
