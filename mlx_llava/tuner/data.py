"""Conversations to learn -> batches of token ids, labels and pixels.

B rows, L tokens (the longest row, rounded up; shorter ones are padded on the right, where the
causal mask lets no token look), N tiles.
The rules are those of the original LLaVA (llava/train/train.py).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from PIL import Image

from mlx_llava.inputs.image import load_image
from mlx_llava.inputs.messages import Message
from mlx_llava.inputs.processor import Learnable, Processor
from mlx_llava.inputs.video import Video
from mlx_llava.model.anyres import ImageSizes
from mlx_llava.tuner.samples import Film, LeftOut, Sample, UnusableError, fingerprint

#: What a token that is not learned has for a label, as in PyTorch.
IGNORED = -100
#: Rows are padded to multiples of this, so that few shapes are compiled.
LENGTH_STEP = 32
#: Batches that are sorted by length together (train.py, get_length_grouped_indices).
GROUPED_BATCHES = 50


@dataclass(frozen=True)
class Batch:
    """What a training step reads.

    Attributes:
        input_ids: int32 (B, L), one placeholder for each image feature.
        labels: int32 (B, L), the ids to be learned, else -100.
        pixel_values: float32 (N, S, S, 3), or None without images.
        image_sizes: the (height, width) of each image that is cut into tiles, `Frames` of a video
            that is read as one, None for another.
    """

    input_ids: mx.array
    labels: mx.array
    pixel_values: mx.array | None
    image_sizes: ImageSizes


class Examples:
    """Samples, tokenised and with their images and videos, when a batch is asked for.

    Attributes:
        left_out: the samples that were left out of their batches, by index.
        on_left_out: is told of each, once.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Processor,
        max_length: int,
        frames: int | None = None,
    ) -> None:
        """Prepares nothing yet.

        Args:
            samples (list of Sample): What to learn.
            processor (Processor): The model's processor; its template writes the text.
            max_length (int): Longer rows lose their end.
            frames (int, optional): How many are taken of a video; see `Processor`.
        """
        self.samples = samples
        self.processor = processor
        self.max_length = min(max_length, processor.context_length)
        self.frames = frames
        self.left_out: dict[int, LeftOut] = {}
        self.on_left_out: Callable[[LeftOut], None] = lambda _left_out: None

    @property
    def problems(self) -> Counter[str]:
        """How many samples were left out for each reason."""
        return Counter(left_out.error.reason for left_out in self.left_out.values())

    @cached_property
    def settings(self) -> dict[str, Any]:
        """By option, what tells that the same is learned: what is said and shown, and how."""
        return {
            "samples_sha256": fingerprint(self.samples),
            "template": self.processor.template.name,
            "image_mode": self.processor.image_processor.mode,
            "frames": self.frames,
        }

    def row(self, sample: Sample) -> tuple[list[int], list[int], list[Image.Image | Video]]:
        """The ids, the labels, and the images and videos of a sample.

        Raises:
            UnusableError: An image is broken or does not fit into the length, the template cannot
                write the sample, or there is nothing to learn in it.
        """
        ids, learned, images = self._learnable(sample)
        if self.processor.config.are_placeholders(np.array(ids[self.max_length :])).any():
            raise UnusableError("image beyond the longest length", self._excess(ids))
        if True not in learned[: self.max_length]:
            raise UnusableError("no answer within the longest length", self._excess(ids))
        labels = [i if is_answer else IGNORED for i, is_answer in zip(ids, learned, strict=True)]
        # Nothing is learned from what comes after the last answer.
        length = min(self.max_length, len(ids) - learned[::-1].index(True))
        return ids[:length], labels[:length], images

    def _learnable(self, sample: Sample) -> Learnable:
        shown = [*map(self._load, sample.images)]
        try:
            return self.processor.learnable(self._messages(sample), shown)
        except ValueError as error:
            raise UnusableError("the template cannot write it", str(error)) from error

    def _load(self, source: Path | Film) -> Image.Image | Video:
        kind = "video" if isinstance(source, Film) else "image"
        try:
            if isinstance(source, Film):
                return self.processor.load_video(source.path, self.frames)
            return load_image(source)
        except (ValueError, OSError) as error:
            raise UnusableError(f"{kind} is broken", str(error)) from error

    def _excess(self, ids: Sequence[int]) -> str:
        return f"{len(ids)} tokens, of which {self.max_length} are read"

    def _messages(self, sample: Sample) -> Sequence[Message]:
        """The turns; of the template ``plain`` the original learns nothing but the answers."""
        if self.processor.template.name != "plain":
            return sample.messages
        spoken = [message for message in sample.messages if message.role != "system"]
        return [Message(m.role, "", m.images) if m.role == "user" else m for m in spoken]

    def batch(self, indices: Sequence[int]) -> Batch | None:
        """The rows of some samples; None if none of them can be used."""
        rows: list[tuple[list[int], list[int]]] = []
        images: list[list[Image.Image | Video]] = []
        for index in indices:
            try:
                ids, labels, row_images = self.row(self.samples[index])
            except UnusableError as error:
                self._leave_out(index, error)
                continue
            rows.append((ids, labels))
            images.append(row_images)
        if not rows:
            return None
        longest = max(len(ids) for ids, _ in rows)
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        tiles = self.processor.image_processor.batch(images)
        return Batch(
            input_ids=mx.array(_padded([ids for ids, _ in rows], length, 0)),
            labels=mx.array(_padded([labels for _, labels in rows], length, IGNORED)),
            pixel_values=None if tiles.pixel_values is None else mx.array(tiles.pixel_values),
            image_sizes=tiles.image_sizes,
        )

    def _leave_out(self, index: int, error: UnusableError) -> None:
        if index not in self.left_out:
            self.left_out[index] = LeftOut(self.samples[index].place, error)
            self.on_left_out(self.left_out[index])


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
