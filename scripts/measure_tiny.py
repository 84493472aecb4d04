"""How often weights/tiny-llava is right, by split and type of question, on pictures never seen.

python scripts/measure_tiny.py                # the figures of its model card, from their seed
python scripts/measure_tiny.py --seed 5       # on other pictures

Every answer is greedy and right if it is the expected text to the letter. The intervals are
Wilson's, for 95 %.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from mlx_llava import evaluate, load  # noqa: F401 - load first, for its BLAS
from mlx_llava.json_files import read_records

import shapes  # isort: skip

ROOT = Path(__file__).parent.parent
SPLITS = {
    "seen": "what training shows too",
    "pairs": "pairs of colour and shape that training never shows",
    "places": "pairs at a place where training never shows them",
}
SEED, QUESTIONS = 2026, 1050
Counts = dict[str, tuple[int, int]]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927)."""
    z = 1.959964
    centre = (hits + z * z / 2) / (count + z * z)
    spread = z * (hits * (count - hits) / count + z * z / 4) ** 0.5 / (count + z * z)
    return centre - spread, centre + spread


def measure(
    model: Path, folder: Path, split: str, questions: int, seed: int, *more: str, name: str = ""
) -> Counts:
    """Draws pictures, asks about them, and counts right answers and questions by type.

    More arguments of `evaluate` go with a name for their answers.
    """
    if not (folder / "question.jsonl").exists():
        shapes.write_split(folder, split, questions, seed)
    answers = folder / f"{model.name}{name}.jsonl"
    arguments = [
        *("--model", str(model), "--questions", str(folder / "question.jsonl")),
        *("--image-folder", str(folder), "--answers", str(answers)),
        *("--batch-size", "50", "--max-tokens", "64", "--dtype", "float32", "--score", "exact"),
        *more,
    ]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if evaluate.main(arguments):
            raise SystemExit(f"{model} cannot be measured")
    rates = json.loads(out.getvalue())
    asked = [question["category"] for _, question in read_records(folder / "question.jsonl")]
    counts = {"all": (round(rates["accuracy"] * len(asked)), len(asked))}
    for type_ in shapes.TYPES:
        count = asked.count(type_)
        counts[type_] = (round(rates[f"accuracy, {type_}"] * count), count)
    return counts


def add(*parts: Counts) -> Counts:
    """The counts of several splits together."""
    return {
        type_: (sum(p[type_][0] for p in parts), sum(p[type_][1] for p in parts))
        for type_ in parts[0]
    }


def cell(hits: int, count: int) -> str:
    """A rate with its interval, in percent, and what it was counted from."""
    low, high = wilson(hits, count)
    return f"{100 * hits / count:.1f} ({100 * low:.1f}-{100 * high:.1f}), {hits}/{count}"


def table(columns: dict[str, Counts]) -> str:
    """Right answers in percent, a row for each type, as Markdown."""
    rows = [["right in % (interval)", *columns], ["---"] * (1 + len(columns))]
    rows += [
        [type_, *(cell(*counts[type_]) for counts in columns.values())]
        for type_ in ("all", *shapes.TYPES)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def measure_all(model: Path, work: Path, questions: int, seed: int) -> dict[str, Counts]:
    """The counts of every split, and of the two that are held out together."""
    counts = {split: measure(model, work / split, split, questions, seed) for split in SPLITS}
    return {**counts, "held out": add(counts["pairs"], counts["places"])}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "weights" / "tiny-llava")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of each split")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        print(table(measure_all(args.model, Path(work), args.questions, args.seed)))


if __name__ == "__main__":
    main()
