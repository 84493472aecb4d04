"""Runs this package and other systems in turn, on the same checkpoint and the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlx_llava.analysis import peers
from mlx_llava.analysis.measure import Figures, Workload, rows_of, spread, tell
from mlx_llava.analysis.peers import Row
from mlx_llava.model.blas import BLAS


class Peer:
    """A system in its process; stays idle between calls, so that several can take turns."""

    def __init__(
        self, system: str, folder: str | Path, dtype: str, python: str | None = None
    ) -> None:
        """Starts one of `peers.SYSTEMS` with the interpreter of its environment.

        Raises:
            ValueError: It cannot load the checkpoint.
        """
        self.system = system
        environment = dict(os.environ)
        if system == "mlx-vlm" and BLAS:
            environment["LD_PRELOAD"] = BLAS
        program = ["-m", peers.__name__] if system == "mlx_llava" else [peers.__file__]
        self._process = subprocess.Popen(
            [python or sys.executable, *program, system, str(folder), dtype],
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


def compare(
    folder: Path,
    pictures: list[str],
    work: Workload,
    names: Sequence[str],
    pythons: Mapping[str, str],
) -> list[Figures]:
    """Runs this package and others in turn, A B A B: medians and ratios for each batch.

    Args:
        folder (Path): The checkpoint.
        pictures (list of str): Paths, as many as the largest batch has.
        work (Workload): What to measure.
        names (list of str): The other systems.
        pythons (dict): The interpreter of a system's environment, if it is another.
    """
    with ExitStack() as stack:
        systems = []
        for name in ["mlx_llava", *names]:
            systems.append(Peer(name, folder, work.dtype, pythons.get(name)))
            stack.callback(systems[-1].close)
        return [
            _compare(systems, rows_of(pictures, batch, images), work, images)
            for images in work.images
            for batch in work.batch
        ]


def _compare(systems: list[Peer], rows: list[Row], work: Workload, images: int) -> Figures:
    tell(f"{len(rows)} rows of {images} pictures")
    able = systems if len(rows) == 1 else [s for s in systems if s.system != "mlx-vlm"]
    runs = _take_turns(able, rows, work)
    ours = runs["mlx_llava"]
    return {
        "batch": len(rows),
        "images": images,
        "versions": {peer.system: peer.versions for peer in able},
        "systems": {name: _medians(turns) for name, turns in runs.items()},
        "ratios": {name: _ratios(ours, runs[name]) for name in runs if name != "mlx_llava"},
    }


def _take_turns(
    systems: Sequence[Peer], rows: Sequence[Row], work: Workload
) -> dict[str, list[Figures]]:
    """Each system's answers, turn by turn, without those that warm up."""
    runs: dict[str, list[Figures]] = {peer.system: [] for peer in systems}
    for turn in range(work.repeats + 1):
        for peer in systems:
            answer = peer.answer(rows, work.max_tokens)
            if turn or work.repeats == 1:
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
