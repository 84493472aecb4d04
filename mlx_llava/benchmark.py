"""How fast, how large: seconds, tokens and bytes, as medians and as parts of what is possible.

python -m mlx_llava.benchmark --shape 1b --out measured.json --plot measured.png
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from mlx_llava.analysis.machine import describe
from mlx_llava.analysis.measure import (
    Alone,
    Figures,
    draw_pictures,
    lines,
    load_endless,
    tell,
)
from mlx_llava.analysis.random_model import SHAPES, write_random_model
from mlx_llava.arguments import Parser, add_share_arguments, command, load_shared
from mlx_llava.checkpoint.hub import find_checkpoint
from mlx_llava.files import check_output, own_file
from mlx_llava.json_files import write_json
from mlx_llava.model.device import DTYPES, fast_dtype

#: What its files say of themselves, so that only they are written over.
COMMAND = "mlx_llava.benchmark"


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.benchmark", description="Measure a model here. Times are seconds."
    )
    add_workload(parser)
    add = parser.add_argument
    add("--requests", type=int, default=0, help="short prompts, to see how memory grows")
    add("--plot", type=Path, metavar="FILE", help="draw the figures; needs mlx-llava[plot]")
    add_share_arguments(parser)
    return parser


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Adds what to measure, which scripts/compare_systems.py takes too."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="a folder or a hub repository (default: embedded)")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    add("--q-bits", type=int, metavar="BITS", help="random codes for the decoder of a --shape")
    add("--dtype", choices=DTYPES, help="(default: what the device is fast at)")
    add("--batch", type=_numbers, default=[1, 2, 4, 8], help="rows at once (default: 1,2,4,8)")
    add("--images", type=_numbers, default=[1, 4], help="pictures a row (default: 1,4)")
    add("--max-tokens", "-m", type=int, default=32, help="of an answer (default: %(default)s)")
    add("--repeats", type=int, default=5, help="of every measurement (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write all figures as JSON")


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text} has a number below 1")
    return numbers


def check_workload(args: argparse.Namespace) -> None:
    """Raises ValueError or FileExistsError for what `add_workload` takes and nothing can do."""
    if args.max_tokens < 2 or args.repeats < 1:
        raise ValueError("--max-tokens must be at least 2 and --repeats at least 1.")
    if args.q_bits and not args.shape:
        raise ValueError("--q-bits belongs to --shape; a --model has the bits that it has.")
    if args.out:
        check_output(args.out, COMMAND)


@contextmanager
def prepared(args: argparse.Namespace) -> Iterator[tuple[Path, list[str]]]:
    """The checkpoint to measure, made and removed again where it is random, and pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if args.shape is None:
            folder = find_checkpoint(args.model, None, offline=False)
        else:
            tell(f"nothing yet: writing a random {args.shape}")
            # Published codes have scales of 16 bits.
            stored = args.dtype or ("float16" if args.q_bits else fast_dtype())
            write_random_model(args.shape, folder, stored, args.q_bits)
        yield folder, draw_pictures(Path(scratch), max(2, max(args.batch) * max(args.images)))


def about(args: argparse.Namespace) -> Figures:
    """What was measured, and where."""
    names = ("dtype", "q_bits", "batch", "images", "max_tokens", "repeats")
    return {
        "command": COMMAND,
        "model": args.shape or args.model or "embedded",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe(),
        **{name: getattr(args, name) for name in names},
    }


def heading(found: Figures) -> str:
    """What was measured, and where, for people."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    bits = f", {found['q_bits']} bits" if found["q_bits"] else ""
    return (
        f"{found['model']} in {found['dtype']}{bits}, {found['max_tokens']} tokens, medians of "
        f"{found['repeats']}; {machine['device']}, {machine['cores']} cores; {versions}"
    )


def write_figures(found: Figures, path: Path | None) -> None:
    """Writes all figures, where a file was asked for."""
    if path:
        with own_file(path, COMMAND) as beside:
            write_json(beside, found)


def plot(found: Figures, path: Path) -> None:
    """Draws how the cost grows with pictures and rows."""
    from matplotlib.figure import Figure

    alone = found["alone"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    images = [str(row["images"]) for row in alone["single"]]
    bottom = np.zeros(len(images))
    for name in ("preprocess", "encode", "prefill"):
        heights = np.array([row[name]["median"] for row in alone["single"]])
        left.bar(images, heights, bottom=bottom, label=name)
        bottom += heights
    left.set(xlabel="pictures", ylabel="seconds to the first token")
    for count in found["images"]:
        rows = [row for row in alone["batches"] if row["images"] == count]
        rates = [row["decode_tokens_per_second"]["median"] for row in rows]
        right.plot(
            [row["batch"] for row in rows], rates, marker="o", label=f"{count} pictures a row"
        )
    right.set(xlabel="rows at once", ylabel="decoded tokens per second", ylim=(0, None))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{found['model']}, {found['dtype']}, {found['machine']['device']}")
    with own_file(path, COMMAND) as beside:
        figure.savefig(beside, format="png", dpi=120, metadata={"Software": COMMAND})


@command(is_shared=True)
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    check_workload(args)
    if args.plot:
        check_output(args.plot, COMMAND)
    found = about(args)
    with prepared(args) as (folder, pictures):
        shares = {name: getattr(args, name) for name in ("dtype", "pipeline", "split")}
        load = partial(load_shared, partial(load_endless, folder), folder, **shares)
        alone = Alone(folder, load, pictures, args.max_tokens, args.repeats)
        found["dtype"] = alone.dtype
        found["alone"] = alone.measure(args.batch, args.images, args.requests)
    if not alone.model.ranks.speaks:
        return
    print(heading(found), *lines(found["alone"]), sep="\n")
    write_figures(found, args.out)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    sys.exit(main())
