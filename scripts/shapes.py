"""Pictures of coloured shapes on a 3 x 3 grid, with questions and answers in LLaVA's formats.

python scripts/shapes.py --out DIR --split pairs --pictures 1000 --seed 7

writes DIR/images, DIR/question.jsonl for `python -m mlx_llava.evaluate` and DIR/train.json for
`python -m mlx_llava.train`. What the embedded model's training never shows - whole pairs of
colour and shape, single pairs at one place, a new colour - is in the splits ``pairs``, ``places``
and ``new``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 35, 35),
    "green": (40, 155, 65),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 40),
    "orange": (245, 130, 25),
    "purple": (135, 55, 175),
    "cyan": (60, 205, 215),
    "black": (25, 25, 25),
}
#: A colour that only the example of fine-tuning draws.
NEW_COLOURS = {"pink": (250, 150, 200)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = {"large": 13.0, "small": 8.0}  # radius in pixels of a picture of 96
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four")
BACKGROUNDS = ((250, 250, 250), (215, 218, 222), (250, 238, 208))
SIDE, CELL, OVERSAMPLING = 96, 32, 4

#: Never in a training picture, nor spoken of: one colour for every shape.
HELD_OUT_PAIRS = frozenset(
    zip(("orange", "purple", "blue", "red", "green", "yellow"), SHAPES, strict=True)
)
SPLITS = ("train", "seen", "pairs", "places", "new")


def held_out_place(colour: str, shape: str) -> int:
    """The one cell where training never shows this pair."""
    return (5 * list({**COLOURS, **NEW_COLOURS}).index(colour) + 2 * SHAPES.index(shape)) % 9


@dataclass(frozen=True)
class Thing:
    """One shape: what, where (cell 0 to 8, row by row), and how far off its centre."""

    colour: str
    shape: str
    size: str
    cell: int
    offset: tuple[float, float] = (0.0, 0.0)

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape."""
        return self.colour, self.shape

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return PLACES[self.cell]

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One to four things in cells of their own, in reading order."""

    things: tuple[Thing, ...]
    background: int
    seed: int

    def draw(self, side: int = SIDE) -> Image.Image:
        """The picture, with a little noise in its colours."""
        random_ = random.Random(self.seed)

        def noisy(colour: tuple[int, int, int]) -> tuple[int, ...]:
            return tuple(min(255, max(0, c + random_.randint(-9, 9))) for c in colour)

        scale = OVERSAMPLING
        picture = Image.new("RGB", (SIDE * scale,) * 2, noisy(BACKGROUNDS[self.background]))
        pen = ImageDraw.Draw(picture)
        for thing in self.things:
            row, column = divmod(thing.cell, 3)
            x = (column + 0.5) * CELL + thing.offset[0]
            y = (row + 0.5) * CELL + thing.offset[1]
            outline = [
                ((x + u) * scale, (y + v) * scale)
                for u, v in _outline(thing.shape, SIZES[thing.size])
            ]
            pen.polygon(outline, fill=noisy({**COLOURS, **NEW_COLOURS}[thing.colour]))
        return picture.resize((side, side), Image.Resampling.BICUBIC)


def _outline(shape: str, r: float) -> list[tuple[float, float]]:
    """The corners of a shape of radius r around (0, 0)."""
    if shape == "square":
        a = 0.82 * r
        return [(-a, -a), (a, -a), (a, a), (-a, a)]
    if shape == "diamond":
        return [(0, -r), (0.75 * r, 0), (0, r), (-0.75 * r, 0)]
    if shape == "cross":
        a = 0.3 * r
        corner = [(a, -r), (a, -a), (r, -a)]
        turns = [corner]
        for _ in range(3):
            turns.append([(-v, u) for u, v in turns[-1]])
        return [point for turn in turns for point in turn]
    corners = {"circle": 60, "triangle": 3, "star": 10}[shape]
    points = []
    for i in range(corners):
        length = 0.4 * r if shape == "star" and i % 2 else r
        angle = 2 * math.pi * i / corners
        points.append((length * math.sin(angle), -length * math.cos(angle)))
    return points


def make_scene(random_: random.Random, split: str) -> Scene:
    """A random scene.

    Args:
        random_ (random.Random): Where chance comes from.
        split (str): ``train`` and ``seen`` hold nothing that is held out; in ``pairs`` the first
            thing is a held-out pair, in ``places`` a pair at its held-out place, in ``new`` it
            has a new colour.
    """
    first_colours = list(NEW_COLOURS if split == "new" else COLOURS)

    def trained(colour: str, shape: str, cell: int) -> bool:
        return (colour, shape) not in HELD_OUT_PAIRS and cell != held_out_place(colour, shape)

    def wanted(colour: str, shape: str, cell: int) -> bool:
        if split == "new":
            return True
        if split == "pairs":
            return (colour, shape) in HELD_OUT_PAIRS
        held = cell == held_out_place(colour, shape)
        return (colour, shape) not in HELD_OUT_PAIRS and held == (split == "places")

    def choose(colours: list[str], fits: Callable[[str, str, int], bool]) -> Thing:
        while True:
            colour, shape = random_.choice(colours), random_.choice(SHAPES)
            cell = random_.choice(cells)
            if fits(colour, shape, cell):
                break
        size = random_.choice(list(SIZES))
        room = min(CELL / 2 - SIZES[size] - 1, 4)
        offset = (random_.uniform(-room, room), random_.uniform(-room, room))
        return Thing(colour, shape, size, cell, offset)

    cells = list(range(9))
    things: list[Thing] = []
    for n in range(random_.choice((1, 2, 2, 3, 3, 4))):
        thing = choose(list(COLOURS), trained) if n else choose(first_colours, wanted)
        if n and random_.random() < 0.35:  # alike things make counting worth asking
            twin = Thing(things[0].colour, things[0].shape, thing.size, thing.cell, thing.offset)
            if trained(*twin.pair, twin.cell):
                thing = twin
        cells.remove(thing.cell)
        things.append(thing)
    background = random_.randrange(len(BACKGROUNDS))
    return Scene(tuple(things), background, random_.randrange(2**31))


@dataclass(frozen=True)
class Question:
    """A question of one type, and its one right answer."""

    type: str
    text: str
    answer: str


TYPES = ("colour", "shape", "count", "position", "size", "yes/no", "description")
#: What takes longest to learn.
HARD = ("count", "count", "size")


def ask(random_: random.Random, scene: Scene, type_: str) -> Question | None:
    """A question of a type, about the first thing where it is about one; None if none fits."""
    things, first = scene.things, scene.things[0]
    count = _counter(things)
    say = random_.choice
    hue = say(("colour", "color"))
    by_shape = count(shape=first.shape) == 1
    by_colour = count(colour=first.colour) == 1
    by_both = count(colour=first.colour, shape=first.shape) == 1
    both, there = f"{first.colour} {first.shape}", first.place
    if type_ == "colour":
        texts = [f"What {hue} is the object at the {there}?"]
        if by_shape:
            texts += [
                f"What {hue} is the {first.shape}?",
                f"Which {hue} does the {first.shape} have?",
            ]
        return Question(type_, say(texts), first.colour)
    if type_ == "shape":
        texts = [f"What shape is at the {there}?", f"What is at the {there}?"]
        if by_colour:
            texts += [
                f"What shape is the {first.colour} object?",
                f"Which shape is {first.colour}?",
            ]
        return Question(type_, say(texts), first.shape)
    if type_ == "position":
        texts = [f"Where is the {both}?"] if by_both else []
        if by_shape:
            texts.append(f"Where is the {first.shape}?")
        if by_colour:
            texts.append(f"Where is the {first.colour} object?")
        return Question(type_, say(texts), there) if texts else None
    if type_ == "size":
        texts = [f"Is the object at the {there} large or small?"]
        if by_both:
            texts += [f"What size is the {both}?", f"Is the {both} large or small?"]
        if by_shape:
            texts += [f"What size is the {first.shape}?", f"Is the {first.shape} large or small?"]
        return Question(type_, say(texts), first.size)
    if type_ == "count":
        text, number = _count(random_, things, count)
        return Question(type_, text, NUMBERS[number])
    if type_ == "yes/no":
        text, truth = _yes_or_no(random_, things, count)
        return Question(type_, text, "yes" if truth else "no")
    texts = ["Describe the picture.", "What is in this picture?", "What do you see?"]
    return Question(type_, say(texts), describe(scene))


def _counter(things: Sequence[Thing]) -> Callable[..., int]:
    def count(**wanted: str) -> int:
        return sum(all(getattr(t, k) == v for k, v in wanted.items()) for t in things)

    return count


def _count(
    random_: random.Random, things: Sequence[Thing], count: Callable[..., int]
) -> tuple[str, int]:
    first = things[0]
    kind = random_.choice(("all", "shape", "colour", "pair"))
    if kind == "all":
        text = random_.choice(("How many objects are there?", "How many shapes do you see?"))
        return text, len(things)
    if kind == "pair":
        text = f"How many {first.colour} {_plural(first.shape)} are there?"
        return text, count(colour=first.colour, shape=first.shape)
    present = random_.random() < 0.75
    if kind == "shape":
        shape = first.shape if present else random_.choice(SHAPES)
        return f"How many {_plural(shape)} are there?", count(shape=shape)
    colour = first.colour if present else random_.choice(list(COLOURS))
    return f"How many {colour} objects are there?", count(colour=colour)


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _yes_or_no(
    random_: random.Random, things: Sequence[Thing], count: Callable[..., int]
) -> tuple[str, bool]:
    """A true or a false statement about the first thing, each half of the time."""
    first, truth = things[0], random_.random() < 0.5
    for _ in range(100):
        colour, shape = first.pair
        place = first.place
        kind = random_.choice(("pair", "colour", "place", "thing there"))
        if not truth:
            if kind == "place":
                place = random_.choice(PLACES)
            elif random_.random() < 0.5:
                colour = random_.choice(list(COLOURS))
            else:
                shape = random_.choice(SHAPES)
        if (colour, shape) != first.pair and (colour, shape) in HELD_OUT_PAIRS:
            continue
        here = [thing for thing in things if thing.place == place]
        if kind == "pair":
            text, holds = (
                f"Is there {_article(colour)} {colour} {shape}?",
                count(colour=colour, shape=shape) > 0,
            )
        elif kind == "colour" and count(shape=first.shape) == 1:
            if (colour, first.shape) != first.pair and (colour, first.shape) in HELD_OUT_PAIRS:
                continue
            text, holds = f"Is the {first.shape} {colour}?", colour == first.colour
        elif kind == "place":
            text, holds = f"Is there anything at the {place}?", bool(here)
        else:
            text = f"Is the object at the {first.place} a {shape}?"
            holds = shape == first.shape
        if holds == truth:
            return text, truth
    raise AssertionError("no question fits")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def describe(scene: Scene, places: bool = False) -> str:
    """One sentence about everything, in reading order."""
    items = [
        f"a {thing} at the {thing.place}" if places else f"a {thing}"
        for thing in sorted(scene.things, key=lambda thing: thing.cell)
    ]
    *most, last = items
    text = f"{', '.join(most)} and {last}" if most else last
    return text[0].upper() + text[1:] + "."


def facts(random_: random.Random, scene: Scene) -> str:
    """Everything that can be asked, as short entries of a key and what is known of it.

    A caption that is read in one order only teaches to go through a picture; entries in any
    order, by any key, with whatever first, teach to look anything up in it.
    """
    things, say = scene.things, random_.choice
    count = _counter(things)
    entries = []

    def look_up(key: str, *values: str) -> str:
        return f"{key}: {', '.join(random_.sample(values, k=len(values)))}."

    for thing in things:
        ways = [f"{thing.place}: {thing}."]
        if count(shape=thing.shape) == 1:
            ways.append(look_up(thing.shape, thing.colour, thing.size, thing.place))
        if count(colour=thing.colour) == 1:
            ways.append(look_up(thing.colour, thing.shape, thing.size, thing.place))
        entries.append(say(ways))
    thing = say(things)
    if count(colour=thing.colour, shape=thing.shape) == 1:
        entries.append(look_up(f"{thing.colour} {thing.shape}", thing.size, thing.place))
    shuffled = random_.sample(things, k=len(things))
    text, number = _count(random_, shuffled, count)
    entries.append(f"{text} {NUMBERS[number]}.")
    text, truth = _yes_or_no(random_, shuffled, count)
    entries.append(f"{text} {'yes' if truth else 'no'}.")
    if random_.random() < 0.3:
        entries.append(describe(scene))
    random_.shuffle(entries)
    return " ".join(entries)


def conversation(
    random_: random.Random,
    scene: Scene,
    descriptions: float = 1.0,
    more: Sequence[str] = (),
) -> list[Question]:
    """A question of every type about one scene, each about any of its things.

    Args:
        random_ (random.Random): Where chance comes from.
        scene (Scene): What is asked about.
        descriptions (float): How often a description, the longest answer, is among them.
        more (sequence): Types that are asked once more, each as often as it is here.
    """
    questions = []
    types = (*TYPES, *more)
    for type_ in random_.sample(types, k=len(types)):
        if type_ == "description" and random_.random() < 1 - descriptions:
            continue
        things = tuple(random_.sample(scene.things, k=len(scene.things)))
        question = ask(random_, replace(scene, things=things), type_)
        questions += [question] if question else []
    return questions


def make_scenes(split: str, count: int, seed: int) -> list[Scene]:
    """Random scenes; the same arguments give the same."""
    return [make_scene(random.Random(f"{split} {seed} {i}"), split) for i in range(count)]


def image_name(number: int) -> str:
    """The file of a scene's picture."""
    return f"images/{number:06d}.png"


def write_pictures(folder: Path, scenes: Sequence[Scene]) -> None:
    """Draws every scene, with all cores."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    paths = [folder / image_name(number) for number in range(len(scenes))]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write_picture, scenes, paths, chunksize=64))


def _write_picture(scene: Scene, path: Path) -> None:
    scene.draw().save(path)


def training_sample(number: int, questions: Sequence[Question]) -> dict[str, Any]:
    """A conversation about a scene in LLaVA's training format."""
    turns = [
        {"from": speaker, "value": text}
        for question in questions
        for speaker, text in (("human", question.text), ("gpt", question.answer))
    ]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": number, "image": image_name(number), "conversations": turns}


def question_line(number: int, question: Question) -> dict[str, Any]:
    """A question about a scene in LLaVA's evaluation format, with its answer."""
    return {
        "question_id": number,
        "image": image_name(number),
        "text": question.text,
        "category": question.type,
        "answer": question.answer,
    }


def write_split(folder: Path, split: str, pictures: int, seed: int) -> None:
    """Pictures of a split, a question about the first thing of each, and a conversation."""
    scenes = make_scenes(split, pictures, seed)
    write_pictures(folder, scenes)
    lines, samples = [], []
    for number, scene in enumerate(scenes):
        chance = random.Random(f"question {split} {seed} {number}")
        types = TYPES[number % len(TYPES) :] + TYPES[: number % len(TYPES)]
        asked = (ask(chance, scene, type_) for type_ in types)
        lines.append(question_line(number, next(question for question in asked if question)))
        samples.append(training_sample(number, conversation(chance, scene)))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "question.jsonl").write_text(text, encoding="utf-8")
    (folder / "train.json").write_text(json.dumps(samples, indent=1), encoding="utf-8")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to fill")
    parser.add_argument("--split", choices=SPLITS, default="seen", help="(default: seen)")
    parser.add_argument("--pictures", type=int, default=1050, help="(default: 1050)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args()
    write_split(args.out, args.split, args.pictures, args.seed)


if __name__ == "__main__":
    main()
