"""What fewer image tokens cost in right answers, and save in time.

python scripts/measure_image_tokens.py                         # the embedded model, by choice
python scripts/measure_image_tokens.py --shape 1b --tokens 192 # seconds to the first token

Questions are of measure_tiny.py's held-out splits, with other pictures than its card's; the
intervals are Wilson's, for 95 %. Times are of runs in turn, whole and in part, of one random model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from mlx_llava import load, stream_generate  # noqa: F401 - load first, for its BLAS
from mlx_llava.analysis.measure import draw_pictures, load_endless, rows_of, spread
from mlx_llava.analysis.random_model import SHAPES, write_random_model
from mlx_llava.model import image_tokens
from mlx_llava.model.device import fast_dtype

import measure_tiny  # isort: skip

SPLITS = ("pairs", "places")
SEED, QUESTIONS, TOKENS = 2027, 600, [18, 9, 4]
Choice = Callable[[npt.NDArray[Any], int], npt.NDArray[np.int32]]


def random_choice(seed: int) -> Choice:
    """Any features, each picture's others."""
    random = np.random.default_rng(seed)
    return lambda distances, count: random.permutation(len(distances))[:count].astype(np.int32)


def uniform_choice(distances: npt.NDArray[Any], count: int) -> npt.NDArray[np.int32]:
    """Of as many equal stretches of the reading order the middle ones."""
    return ((np.arange(count) + 0.5) * len(distances) / count).astype(np.int32)


def accuracy(model: Path, tokens: list[int], questions: int, seed: int) -> str:
    """Right answers by number of tokens and by choice, as Markdown."""
    choices: dict[str, Choice] = {
        "diversity": image_tokens.most_diverse,
        "random": random_choice(seed),
        "uniform": uniform_choice,
    }
    with tempfile.TemporaryDirectory() as work:

        def cell(name: str, count: int | None) -> str:
            more = () if count is None else ("--image-tokens", str(count))
            with mock.patch.object(image_tokens, "most_diverse", choices[name]):
                counts = [
                    measure_tiny.measure(
                        *(model, Path(work) / split, split, questions, seed, *more),
                        name=f"-{name}-{count}",
                    )
                    for split in SPLITS
                ]
            return measure_tiny.cell(*measure_tiny.add(*counts)["all"])

        rows = [["right in % (interval)", *choices], ["---"] * 4]
        rows.append(["all", *[cell("diversity", None)] * 3])
        rows += [[str(count), *(cell(name, count) for name in choices)] for count in tokens]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def first_tokens(shape: str, count: int, repeats: int) -> str:
    """Seconds to the first token, whole and in part in turn, and their ratio."""
    with tempfile.TemporaryDirectory() as work:
        write_random_model(shape, Path(work) / "model", fast_dtype())
        ((prompt, pictures),) = rows_of(draw_pictures(Path(work), 1), 1, 1)
        model, processor = load_endless(Path(work) / "model", None)
        whole: list[float] = []
        shown: list[float] = []
        for _ in range(repeats + 1):
            for tokens, seconds in ((None, whole), (count, shown)):
                how: dict[str, Any] = {"raw": True, "image_tokens": tokens, "max_tokens": 1}
                (part,) = stream_generate(model, processor, prompt, list(pictures), **how)
                parts = part.preprocess_seconds, part.encode_seconds, part.prefill_seconds
                seconds.append(sum(parts))
    del whole[0], shown[0]  # which warmed up
    ratio = spread([after / before for before, after in zip(whole, shown, strict=True)])
    return (
        f"{shape}, {part.whole_image_tokens} -> {part.image_tokens} image tokens: first token in "
        f"{statistics.median(whole):.3f} -> {statistics.median(shown):.3f} s, "
        f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
    )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="time a random model instead")
    add("--tokens", type=int, nargs="+", default=TOKENS)
    add("--model", type=Path, default=measure_tiny.ROOT / "weights" / "tiny-llava")
    add("--questions", type=int, default=QUESTIONS, help="of each split")
    add("--seed", type=int, default=SEED)
    add("--repeats", type=int, default=5, help="of --shape (default: %(default)s)")
    args = parser.parse_args()
    if args.shape is None:
        print(accuracy(args.model, args.tokens, args.questions, args.seed))
        return
    for count in args.tokens:
        print(first_tokens(args.shape, count, args.repeats))


if __name__ == "__main__":
    main()
