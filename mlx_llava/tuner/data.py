"""LLaVA's training files -> batches of token ids, labels and pixels.

B rows, L tokens (the longest row, rounded up; shorter ones are padded on the right, where the
causal mask lets no token look), N tiles.
The rules are those of the original LLaVA (llava/train/train.py).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_llava.anyres import Size
from mlx_llava.image import load_image
from mlx_llava.processor import Processor
from mlx_llava.prompt import Message
from mlx_llava.tokenizer import IMAGE_TOKEN

#: What a token that is not learned has for a label, as in PyTorch.
IGNORED = -100
#: Rows are padded to multiples of this, so that few shapes are compiled.
LENGTH_STEP = 32
#: Batches that are sorted by length together (train.py, get_length_grouped_indices).
GROUPED_BATCHES = 50
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        messages: its turns; pictures stand first in theirs.
        images: its pictures' files in reading order.
    """

    messages: tuple[Message, ...]
    images: tuple[Path, ...]

    @property
    def length(self) -> int:
        """The number of characters, to group by."""
        return sum(len(message.text) for message in self.messages)


@dataclass(frozen=True)
class Batch:
    """What a training step reads.

    Attributes:
        input_ids: int32 (B, L), one placeholder for each image feature.
        labels: int32 (B, L), the ids to be learned, else -100.
        pixel_values: float32 (N, S, S, 3), or None without pictures.
        image_sizes: the (height, width) of each picture, where the model cuts into tiles.
    """

    input_ids: mx.array
    labels: mx.array
    pixel_values: mx.array | None
    image_sizes: tuple[Size, ...] | None


def read_samples(
    path: str | Path, image_folder: str | Path, protect: Callable[[str], str]
) -> tuple[list[Sample], Counter[str]]:
    """Reads LLaVA's training JSON: a list, or one object a line, of ``conversations``.

    As in the original, a conversation begins with its first human turn, and the pictures of a
    turn are moved to its front. A sample that cannot be used is left out.

    Args:
        path (str or Path): The file.
        image_folder (str or Path): What its image paths are relative to.
        protect (callable): `Tokenizer.protect`.

    Returns:
        The samples, and how many were left out for each reason.

    Raises:
        ValueError: The file is no JSON, or nothing in it can be used.
    """
    entries = _read_entries(Path(path))
    samples, problems = [], Counter[str]()
    for entry in entries:
        try:
            samples.append(_read_sample(entry, Path(image_folder), protect))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems[str(error) if isinstance(error, ValueError) else "not LLaVA's format"] += 1
    if not samples:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in problems.items())
        raise ValueError(f"{path} has no sample that can be used: {reasons or 'it is empty'}.")
    return samples, problems


def _read_entries(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            entries: list[Any] = json.loads(text)
            return entries
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}.") from error


def _read_sample(
    entry: Mapping[str, Any], image_folder: Path, protect: Callable[[str], str]
) -> Sample:
    names = entry.get("image") or []
    images = [image_folder / name for name in ([names] if isinstance(names, str) else names)]
    turns = list(entry["conversations"])
    while turns and _ROLES.get(turns[0]["from"]) != "user":
        turns.pop(0)
    messages = [_read_turn(turn, protect) for turn in turns]
    expected = ["user", "assistant"] * (len(messages) // 2)
    if not messages or [message.role for message in messages] != expected:
        raise ValueError("turns do not alternate")
    marks = sum(message.images for message in messages)
    if marks != len(images):
        raise ValueError("marks and images differ in number")
    if not all(image.is_file() for image in images):
        raise ValueError("image is missing")
    return Sample(tuple(messages), tuple(images))


def _read_turn(turn: Mapping[str, Any], protect: Callable[[str], str]) -> Message:
    role, text = _ROLES[turn["from"]], turn["value"]
    if role == "assistant":
        return Message(role, protect(text))
    count = text.count(IMAGE_TOKEN)
    return Message(role, protect(text.replace(IMAGE_TOKEN, "").strip()), images=count)


class Examples:
    """Samples, tokenised and with their pictures, when a batch is asked for.

    Attributes:
        problems: how often a sample was left out of its batch, for each reason.
    """

    def __init__(self, samples: Sequence[Sample], processor: Processor, max_length: int) -> None:
        """Prepares nothing yet.

        Args:
            samples (list of Sample): What to learn.
            processor (Processor): The model's processor; its template writes the text.
            max_length (int): Longer rows lose their end.
        """
        self.samples = samples
        self.processor = processor
        self.max_length = min(max_length, processor.context_length)
        self.problems: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.samples)

    def row(self, sample: Sample) -> tuple[list[int], list[int], list[Any]]:
        """The ids, the labels and the pictures of a sample.

        Raises:
            ValueError: A picture is broken or does not fit into the length.
        """
        processor = self.processor
        pictures = [load_image(path) for path in sample.images]
        sizes = [(picture.height, picture.width) for picture in pictures]
        counts = [processor.image_processor.num_tokens(size) for size in sizes]
        messages = sample.messages
        if processor.template.name == "plain":  # the original drops the question
            messages = tuple(
                Message(m.role, "", m.images) if m.role == "user" else m for m in messages
            )
        ids, learned = processor.learnable(processor.template.pieces(messages), counts)
        labels = [i if is_answer else IGNORED for i, is_answer in zip(ids, learned, strict=True)]
        if processor.config.image_token_index in ids[self.max_length :]:
            raise ValueError("image beyond the longest length")
        # Nothing is learned from what comes after the last answer.
        length = min(self.max_length, len(ids) - learned[::-1].index(True))
        return ids[:length], labels[:length], pictures

    def batch(self, indices: Sequence[int]) -> Batch | None:
        """The rows of some samples; None if none of them can be used."""
        rows: list[tuple[list[int], list[int]]] = []
        pictures: list[Any] = []
        for index in indices:
            try:
                ids, labels, own = self.row(self.samples[index])
            except (ValueError, OSError) as error:
                beyond = "beyond" in str(error)
                self.problems[str(error) if beyond else "image is broken"] += 1
                continue
            rows.append((ids, labels))
            pictures += own
        if not rows:
            return None
        longest = max(len(ids) for ids, _ in rows)
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        image_processor = self.processor.image_processor
        sizes = tuple((picture.height, picture.width) for picture in pictures)
        return Batch(
            input_ids=mx.array(_padded([ids for ids, _ in rows], length, 0)),
            labels=mx.array(_padded([labels for _, labels in rows], length, IGNORED)),
            pixel_values=mx.array(image_processor(pictures)) if pictures else None,
            image_sizes=sizes if pictures and image_processor.mode == "anyres" else None,
        )


def _padded(rows: Sequence[Sequence[int]], length: int, filling: int) -> npt.NDArray[np.int32]:
    table = np.full((len(rows), length), filling, np.int32)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def order(samples: Sequence[Sample], batch_size: int, seed: int) -> list[list[int]]:
    """The batches of an epoch: rows of one length and kind together, else by chance.

    Text-only samples have batches of their own. The last batch of each kind may be short.

    Args:
        samples (list of Sample): What to put in order.
        batch_size (int): Rows of a batch.
        seed (int): The same gives the same order.
    """
    chance = random.Random(seed)
    batches: list[list[int]] = []
    for has_images in (True, False):
        indices = [i for i, sample in enumerate(samples) if bool(sample.images) == has_images]
        chance.shuffle(indices)
        step = batch_size * GROUPED_BATCHES
        for start in range(0, len(indices), step):
            group = sorted(indices[start : start + step], key=lambda i: samples[i].length)
            batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    chance.shuffle(batches)
    return batches
