"""This package and other systems in turn, on the same checkpoint, pictures and prompts.

python scripts/compare_systems.py --shape 1b --batch 1 --images 1 --against transformers
python scripts/compare_systems.py --against mlx-vlm --peer-python mlx-vlm=venv/bin/python
python scripts/compare_systems.py --q-bits 4 --against llama.cpp  # pip install xllamacpp gguf
python scripts/compare_systems.py --shape 7b --dtype float16 --against llama.cpp --apart

Each system has a process of its own (scripts/peers.py); the tokens are compared too. llama.cpp has
other random weights in the same shape, so its tokens are others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from mlx_llava import benchmark
from mlx_llava.analysis.measure import Figures, Row, rows_of, spread, tell
from mlx_llava.arguments import command
from mlx_llava.model.blas import BLAS
from mlx_llava.model.device import fast_dtype

PEERS = Path(__file__).with_name("peers.py")
OTHERS = ("transformers", "mlx-vlm", "llama.cpp")
#: Of these, rows together are not measured.
SINGLE = ("mlx-vlm", "llama.cpp")


class Peer:
    """A system in its process; stays idle between calls, so that several can take turns."""

    def __init__(
        self, system: str, folder: str | Path, dtype: str, python: str | None = None
    ) -> None:
        """Starts one of peers.py's SYSTEMS with the interpreter of its environment.

        Raises:
            ValueError: It cannot load the checkpoint.
        """
        self.system = system
        environment = dict(os.environ)
        if system == "mlx-vlm" and BLAS:
            environment["LD_PRELOAD"] = BLAS
        self._process = subprocess.Popen(
            [python or sys.executable, str(PEERS), system, str(folder), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            self.versions: dict[str, str] = self._read()["versions"]
        except ValueError:
            self.close()
            raise

    def answer(self, rows: Sequence[Row], max_tokens: int) -> dict[str, Any]:
        """Answers rows together, each with so many tokens.

        Returns:
            dict: ``first`` (seconds to the first token), ``seconds`` (in all), ``tokens`` (of
            each row) and ``peak_gb`` (the most memory that the process held).

        Raises:
            ValueError: The system cannot do it.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"rows": rows, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"{self.system} ended with code {self._process.wait()}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{self.system} cannot do this: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def compare(systems: list[Peer], rows: list[Row], max_tokens: int, repeats: int) -> Figures:
    """Medians of each system, and ratios of the first to the others, of runs A B A B."""
    able = [peer for peer in systems if _takes(peer.system, rows)]
    runs = _take_turns(able, rows, max_tokens, repeats)
    return _compared(rows, runs, {peer.system: peer.versions for peer in able})


def compare_apart(
    starts: Mapping[str, Callable[[], Peer]], rows: list[Row], max_tokens: int, repeats: int
) -> Figures:
    """As `compare`, of runs A A B B: each system starts when those before it have ended."""
    runs, versions = {}, {}
    for name, start in starts.items():
        if _takes(name, rows):
            with closing(start()) as peer:
                (runs[name],) = _take_turns([peer], rows, max_tokens, repeats).values()
                versions[name] = peer.versions
    return _compared(rows, runs, versions)


def _takes(system: str, rows: list[Row]) -> bool:
    return len(rows) == 1 or system not in SINGLE


def _compared(rows: list[Row], runs: dict[str, list[Figures]], versions: Figures) -> Figures:
    ours, *others = runs
    return {
        "batch": len(rows),
        "images": len(rows[0][1]),
        "versions": versions,
        "systems": {name: _medians(turns) for name, turns in runs.items()},
        "ratios": {name: _ratios(runs[ours], runs[name]) for name in others},
    }


def _take_turns(
    systems: Sequence[Peer], rows: Sequence[Row], max_tokens: int, repeats: int
) -> dict[str, list[Figures]]:
    """Each system's answers, turn by turn, without those that warm up."""
    runs: dict[str, list[Figures]] = {peer.system: [] for peer in systems}
    for turn in range(repeats + 1):
        for peer in systems:
            answer = peer.answer(rows, max_tokens)
            if turn or repeats == 1:
                runs[peer.system].append(answer)
    return runs


def _has_first(turns: Sequence[Figures]) -> bool:
    """Whether the time of the first token was measured, and there were more."""
    (*others, row) = turns[0]["tokens"]
    return not others and len(row) > 1


def _medians(turns: Sequence[Figures]) -> Figures:
    count = sum(map(len, turns[0]["tokens"]))
    found = {
        "seconds": spread([turn["seconds"] for turn in turns]),
        "tokens_per_second": spread([count / turn["seconds"] for turn in turns]),
        "peak_gb": turns[-1]["peak_gb"],
    }
    if _has_first(turns):
        rates = [(count - 1) / (turn["seconds"] - turn["first"]) for turn in turns]
        found["first"] = spread([turn["first"] for turn in turns])
        found["decode_tokens_per_second"] = spread(rates)
    return found


def _ratios(ours: Sequence[Figures], theirs: Sequence[Figures]) -> Figures:
    """Ours by theirs, turn by turn."""
    pairs = list(zip(ours, theirs, strict=True))
    ratios: Figures = {
        "throughput": spread([their["seconds"] / our["seconds"] for our, their in pairs]),
        "peak_memory": ours[-1]["peak_gb"] / theirs[-1]["peak_gb"],
        "same_tokens": all(our["tokens"] == their["tokens"] for our, their in pairs),
    }
    if _has_first(theirs):
        decode = [
            (their["seconds"] - their["first"]) / (our["seconds"] - our["first"])
            for our, their in pairs
        ]
        ratios["first"] = spread([our["first"] / their["first"] for our, their in pairs])
        ratios["decode"] = spread(decode)
    return ratios


def lines(row: Figures) -> list[str]:
    """The figures of one batch and number of pictures, for people."""
    found = [f"{row['batch']} rows of {row['images']} pictures"]
    for name, system in row["systems"].items():
        first = f"first token {system['first']['median']:.3f} s, " if "first" in system else ""
        rate = "decode_tokens_per_second" if "first" in system else "tokens_per_second"
        found.append(
            f"  {name:<13} {first}{system[rate]['median']:.2f} tokens/s, "
            f"{system['seconds']['median']:.2f} s in all, peak {system['peak_gb']:.2f} GB"
        )
    for name, ratio in row["ratios"].items():
        parts = [
            f"{label} {ratio[key]['median']:.2f}x ({ratio[key]['min']:.2f}-{ratio[key]['max']:.2f})"
            for key, label in (
                ("first", "first token takes"),
                ("decode", "decodes at"),
                ("throughput", "throughput"),
            )
            if key in ratio
        ]
        same = "the same tokens" if ratio["same_tokens"] else "OTHER TOKENS"
        memory = f"peak memory {ratio['peak_memory']:.2f}x"
        found.append(f"  against {name}: {', '.join([*parts, memory])}; {same}")
    return found


def build_parser() -> argparse.ArgumentParser:
    """The script's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    benchmark.add_workload(parser)
    add = parser.add_argument
    add("--against", required=True, metavar="SYSTEMS", help=f"of {', '.join(OTHERS)}, by commas")
    add(
        "--peer-python",
        action="append",
        default=[],
        metavar="SYSTEM=PYTHON",
        help="the interpreter of the environment that has the system; repeatable",
    )
    add(
        "--apart",
        action="store_true",
        help="start each system when those before it have ended, where memory holds only one",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script."""
    args = build_parser().parse_args(argv)
    benchmark.check_workload(args)
    names = args.against.split(",")
    if unknown := {*names} - {*OTHERS}:
        raise ValueError(f"There is no system {sorted(unknown)}; known: {', '.join(OTHERS)}.")
    if any("=" not in pair for pair in args.peer_python):
        raise ValueError("--peer-python is SYSTEM=PYTHON, as mlx-vlm=venv/bin/python.")
    args.dtype = args.dtype or fast_dtype()
    pythons = dict(pair.split("=", 1) for pair in args.peer_python)
    found = {**benchmark.about(args), "against": []}
    with benchmark.prepared(args) as (folder, pictures), ExitStack() as stack:
        starts = {
            name: partial(Peer, name, folder, args.dtype, pythons.get(name))
            for name in ("mlx_llava", *names)
        }
        if not args.apart:
            systems = [stack.enter_context(closing(start())) for start in starts.values()]
        for images in args.images:
            for batch in args.batch:
                tell(f"{batch} rows of {images} pictures")
                rows = rows_of(pictures, batch, images)
                how = args.max_tokens, args.repeats
                found["against"].append(
                    compare_apart(starts, rows, *how)
                    if args.apart
                    else compare(systems, rows, *how)
                )
    print(benchmark.heading(found))
    for row in found["against"]:
        print(*lines(row), sep="\n")
    benchmark.write_figures(found, args.out)


if __name__ == "__main__":
    sys.exit(main())
