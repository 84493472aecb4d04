"""Pictures that are no drawings of scripts/shapes.py's world, all made by code.

python scripts/others.py --out DIR --pictures 100

writes DIR/KIND-NUMBER.png. About each of them, whatever is asked has one honest answer. `KINDS`
are shown in training; `HELD_OUT_KINDS` are for measuring alone, as photographs are.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeAlias

import kinds
import numpy as np
import shapes
from PIL import Image

ANSWER = "I only know drawings of coloured shapes."
SIDE = shapes.SIDE
#: What people ask first about a picture of their own.
OPEN_QUESTIONS = (
    "What is this?", "What is there?", "What is in this image?", "What is in the picture?",
    "Describe this.", "Describe this picture.", "Describe the image.", "What do you see here?",
    "What can you see?", "Is this a photograph?", "What is the object?", "Who is this?",
    "Where is this?", "What does it say?", "Is there a person?", "How many people are there?",
)  # fmt: skip
#: Of the questions about such pictures, how many are not about shapes.
OPEN = 0.3

Maker: TypeAlias = Callable[[np.random.Generator], Image.Image]
KINDS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        kinds.gradient, kinds.plain, kinds.noise, kinds.fractal, kinds.voronoi, kinds.wood,
        kinds.blobs, kinds.lines, kinds.text, kinds.chart, kinds.boxes, kinds.leaves,
        kinds.landscape, kinds.portrait,
    )
}  # fmt: skip
HELD_OUT_KINDS: dict[str, Maker] = {
    maker.__name__: maker for maker in (kinds.plaid, kinds.scribble, kinds.bokeh)
}


def could_be_drawn(picture: Image.Image) -> bool:
    """Whether something stands out from one of the world's papers, and none of it between cells."""
    pixels = np.asarray(picture).astype(int)
    edges = [i for i in range(SIDE) if i % shapes.CELL in (0, shapes.CELL - 1)]
    for paper in shapes.BACKGROUNDS:
        ink = np.abs(pixels - paper).max(axis=-1)
        if max(ink[edges].max(), ink[:, edges].max()) <= 30 and ink.max() > 60:
            return True
    return False


def make(kind: str, seed: int) -> Image.Image:
    """A picture of a kind, `SIDE` pixels wide and high; the same arguments give the same."""
    chance = np.random.default_rng([seed, *kind.encode()])
    while could_be_drawn(picture := {**KINDS, **HELD_OUT_KINDS}[kind](chance)):
        pass
    return picture


def ask(random_: random.Random) -> str:
    """A question as of somebody who does not know what the model knows."""
    if random_.random() < OPEN:
        return random_.choice(OPEN_QUESTIONS)
    scene = shapes.make_scene(random_, "train")
    while not (question := shapes.ask(random_, scene, random_.choice(shapes.TYPES))):
        pass
    return question.text


def conversation(random_: random.Random, length: int) -> list[shapes.Question]:
    """So many questions, each with the honest answer."""
    return [shapes.Question("other", ask(random_), ANSWER) for _ in range(length)]


def write_pictures(paths: Sequence[Path], names: Sequence[str], seed: int) -> None:
    """Makes a picture for each path, the kinds in turn, with all cores."""
    made = [names[number % len(names)] for number in range(len(paths))]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write, paths, made, range(seed, seed + len(paths)), chunksize=64))


def _write(path: Path, kind: str, seed: int) -> None:
    make(kind, seed).save(path)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to fill")
    parser.add_argument("--pictures", type=int, default=100, help="(default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    every = [*KINDS, *HELD_OUT_KINDS]
    files = [f"{every[n % len(every)]}-{n:06d}.png" for n in range(args.pictures)]
    write_pictures([args.out / file for file in files], every, args.seed)


if __name__ == "__main__":
    main()
