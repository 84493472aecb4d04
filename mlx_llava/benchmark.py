"""How fast, how large: seconds, tokens and bytes, as medians and as parts of what is possible.

python -m mlx_llava.benchmark --shape 1b --out measured.json --plot measured.png
python -m mlx_llava.benchmark --shape 1b --against transformers
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mlx_llava.analysis import compare, measure
from mlx_llava.analysis.machine import describe
from mlx_llava.analysis.measure import Alone, Figures, Workload, draw_pictures, tell
from mlx_llava.analysis.peers import SYSTEMS
from mlx_llava.analysis.random_model import SHAPES, write_random_model
from mlx_llava.arguments import command
from mlx_llava.checkpoint.hub import find_checkpoint
from mlx_llava.checkpoint.precision import DTYPES
from mlx_llava.files import check_output, own_file
from mlx_llava.json_files import write_json
from mlx_llava.model.device import fast_dtype

#: What its files say of themselves, so that only they are written over.
COMMAND = "mlx_llava.benchmark"


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mlx_llava.benchmark",
        description="Measure a model here, alone or in turn with other systems. Times are seconds.",
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="a folder or a hub repository (default: embedded)")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    add("--dtype", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")
    add("--against", metavar="SYSTEMS", help="transformers, mlx-vlm, or both with a comma")
    add(
        "--peer-python",
        action="append",
        default=[],
        metavar="SYSTEM=PYTHON",
        help="the interpreter of the environment that has the system; repeatable",
    )
    add("--batch", type=_numbers, default=[1, 2, 4, 8], help="rows at once (default: 1,2,4,8)")
    add("--images", type=_numbers, default=[1, 4], help="pictures a row (default: 1,4)")
    add("--max-tokens", "-m", type=int, default=32, help="of an answer (default: %(default)s)")
    add("--repeats", type=int, default=5, help="of every measurement (default: %(default)s)")
    add("--requests", type=int, default=0, help="short prompts, to see how memory grows")
    add("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    add("--plot", type=Path, metavar="FILE", help="draw them (a PNG); needs mlx-llava[plot]")
    return parser


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text} has a number below 1")
    return numbers


@contextmanager
def checkpoint(args: argparse.Namespace, dtype: str) -> Iterator[Path]:
    """The folder to measure, made and removed again where it is a random one."""
    if args.shape is None:
        yield find_checkpoint(args.model, None, offline=False)
        return
    with tempfile.TemporaryDirectory() as folder:
        tell(f"nothing yet: writing a random {args.shape}")
        write_random_model(args.shape, Path(folder) / "model", dtype)
        yield Path(folder) / "model"


def table(found: Figures) -> str:
    """The figures for people."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    lines = [
        f"{found['model']} in {found['dtype']}, {found['max_tokens']} tokens, medians of "
        f"{found['repeats']}; {machine['device']}, {machine['cores']} cores; {versions}",
    ]
    if "alone" in found:
        lines += measure.lines(found["alone"])
    for row in found.get("against", []):
        lines += compare.lines(row)
    return "\n".join(lines)


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
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{found['model']}, {found['dtype']}, {found['machine']['device']}")
    with own_file(path, COMMAND) as beside:
        figure.savefig(beside, format="png", dpi=120, metadata={"Software": COMMAND})


def _check(args: argparse.Namespace) -> None:
    if args.max_tokens < 2 or args.repeats < 1:
        raise ValueError("--max-tokens must be at least 2 and --repeats at least 1.")
    unknown = set((args.against or "mlx-vlm").split(",")) - (SYSTEMS.keys() - {"mlx_llava"})
    if unknown:
        raise ValueError(f"There is no system {sorted(unknown)}; known: transformers, mlx-vlm.")
    if any("=" not in pair for pair in args.peer_python):
        raise ValueError("--peer-python is SYSTEM=PYTHON, as mlx-vlm=venv/bin/python.")
    if args.plot and args.against:
        raise ValueError("--plot draws this package alone; leave --against away.")
    for path in (args.out, args.plot):
        if path is not None:
            check_output(path, COMMAND)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    _check(args)
    dtype = args.dtype or fast_dtype()
    work = Workload(dtype, args.batch, args.images, args.max_tokens, args.repeats, args.requests)
    found: Figures = {
        "command": COMMAND,
        "model": args.shape or args.model or "embedded",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe(),
        **asdict(work),
    }
    with checkpoint(args, dtype) as folder, tempfile.TemporaryDirectory() as drawn:
        pictures = draw_pictures(Path(drawn), max(2, max(args.batch) * max(args.images)))
        if args.against:
            pythons = dict(pair.split("=", 1) for pair in args.peer_python)
            names = args.against.split(",")
            found["against"] = compare.compare(folder, pictures, work, names, pythons)
        else:
            found["alone"] = Alone(folder, pictures, work).measure()
    print(table(found))
    if args.out:
        with own_file(args.out, COMMAND) as beside:
            write_json(beside, found)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    sys.exit(main())
