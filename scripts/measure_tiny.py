"""How often weights/tiny-llava is right, by split and type of question, on pictures never seen.

python scripts/measure_tiny.py                # the figures of its model card, from their seed
python scripts/measure_tiny.py --seed 5       # on other pictures

Every answer is greedy and right if it is the expected text to the letter. The intervals are
Wilson's, for 95 %. Then: how often it says so about what it does not know - pictures of
scripts/others.py, and crops of photographs where $MLX_LLAVA_TEST_DATA or ../shared/data has some -
and how often projected patches of things lie near the words for them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mlx_llava import evaluate, load  # load first, for its BLAS
from mlx_llava.analysis.trace import as_numpy
from mlx_llava.explain import nearest_words
from mlx_llava.inputs.image import load_image
from mlx_llava.json_files import read_records

import others  # isort: skip
import shapes  # isort: skip

ROOT = Path(__file__).parent.parent
SPLITS = {
    "seen": "what training shows too",
    "pairs": "pairs of colour and shape that training never shows",
    "places": "pairs at a place where training never shows them",
}
SEED, QUESTIONS = 2026, 1050
#: Of each kind of pictures that are no drawings, of photographs, and whose patches are looked at.
OTHERS, CROPS, DRAWINGS = 30, 200, 200
#: As `tests/conftest.py` finds it.
PHOTOGRAPHS = (
    Path(os.environ.get("MLX_LLAVA_TEST_DATA") or ROOT.parent / "shared" / "data") / "images"
)
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
    return count_right(model, folder, shapes.TYPES, *more, name=name)


def count_right(
    model: Path, folder: Path, types: Sequence[str], *more: str, name: str = ""
) -> Counts:
    """Right answers to a folder's questions, and how many they are, by type."""
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
    for type_ in types:
        count = asked.count(type_)
        counts[type_] = (round(rates[f"accuracy, {type_}"] * count), count)
    return counts


def measure_refusals(model: Path, work: Path, seed: int) -> Counts:
    """How often it says what it knows: about each kind of other pictures, and its own drawings.

    Its own are those that `measure` asked about.
    """
    folder = work / "others"
    kinds = [*others.KINDS, *others.HELD_OUT_KINDS]
    pictures = [(kind, others.make(kind, seed + n)) for n in range(OTHERS) for kind in kinds]
    if PHOTOGRAPHS.is_dir():
        pictures += [("photographs", crop) for crop in crops(sorted(PHOTOGRAPHS.iterdir()), seed)]
    write_others(folder, pictures, seed)
    types = list(dict.fromkeys(kind for kind, _ in pictures))
    counts = count_right(model, folder, types)
    said = [
        answer["text"] == others.ANSWER
        for split in SPLITS
        for _, answer in read_records(work / split / f"{model.name}.jsonl")
    ]
    return {**counts, "its own drawings": (sum(said), len(said))}


def crops(paths: Sequence[Path], seed: int) -> list[Image.Image]:
    """Squares of any size from anywhere in photographs, as many from each."""
    random_, cut = random.Random(f"crops {seed}"), []
    photographs = [load_image(path) for path in paths]
    for number in range(CROPS):
        photograph = photographs[number % len(photographs)]
        side = random_.randint(others.SIDE, min(photograph.size))
        left, top = (random_.randint(0, length - side) for length in photograph.size)
        cut.append(photograph.crop((left, top, left + side, top + side)))
    return cut


def write_others(folder: Path, pictures: Sequence[tuple[str, Image.Image]], seed: int) -> None:
    """Pictures that are no drawings, by kind, and a question about each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random_, lines = random.Random(f"others {seed}"), []
    for number, (kind, picture) in enumerate(pictures):
        picture.save(folder / shapes.image_name(number))
        question = shapes.Question(kind, others.ask(random_), others.ANSWER)
        lines.append(json.dumps(shapes.question_line(number, question)) + "\n")
    (folder / "question.jsonl").write_text("".join(lines), encoding="utf-8")


def refusal_table(counts: Counts) -> str:
    """How often it said that it only knows drawings, a row for each kind, as Markdown."""
    rows = [["shown", "said so in % (interval)"], ["---", "---"]]
    names = {"all": "all but its own", **{k: f"{k} (held out)" for k in others.HELD_OUT_KINDS}}
    names["photographs"] = "photographs (held out)"
    rows += [[names.get(kind, kind), cell(*count)] for kind, count in counts.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def near_words(model: Path, seed: int) -> tuple[int, int]:
    """Of how many patches of things the colour or the shape is among the five nearest words."""
    llava, processor = load(model, dtype="float32")
    side = llava.config.vision_config.patches_per_side
    hits = count = 0
    for scene in shapes.make_scenes("seen", DRAWINGS, seed):
        pixels = processor.image_processor([scene.draw()])
        words = nearest_words(llava, processor, as_numpy(llava.encode_images(pixels)[0]), 5)
        things = {thing.cell: thing for thing in scene.things}
        for patch, nearest in enumerate(words):
            row, column = divmod(patch, side)
            if thing := things.get(row * 3 // side * 3 + column * 3 // side):
                hits += any(word.strip() in thing.pair for word, _ in nearest)
                count += 1
    return hits, count


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
        print("", refusal_table(measure_refusals(args.model, Path(work), args.seed)), sep="\n")
    near = cell(*near_words(args.model, args.seed))
    print(f"\npatches of things with their colour or shape among the five nearest words: {near}")


if __name__ == "__main__":
    main()
