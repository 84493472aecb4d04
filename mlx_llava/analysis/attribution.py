"""What a model looked at while it answered, what it thought on the way, and what it depends on.

L tokens of the prompt and the answer, G of them the answer's, F features of a picture, H heads,
D decoder width. Logit lens: nostalgebraist 2020; masking: Zeiler and Fergus 2014 (arXiv:1311.2901).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from PIL import Image

from mlx_llava.analysis.boxes import LONGEST, heat_map
from mlx_llava.analysis.pictures import Picture, pictures_of
from mlx_llava.analysis.trace import Array, Trace, as_numpy, trace, with_answer
from mlx_llava.generation.stream import stream_generate
from mlx_llava.inputs.image import load_image
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.messages import Conversation, as_list
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.llava import Llava
from mlx_llava.model.quantized import plain_weight

#: How many masked pictures are looked at together.
MASKED_AT_ONCE = 8


@dataclass(frozen=True)
class Explanation:
    """An answer, and all that was computed for it.

    Attributes:
        pictures: what was shown, in reading order: images, and videos as sheets of their frames.
        inputs: the prompt.
        tokens: the answer's ids, (G,), without the one that ends it unless that is all.
        words: their texts.
        trace: what was computed. The observed position of a word is the one before it, where it
            was chosen.
        positions: where in the prompt each picture's features stand, (F,).
        tile_patches: how many patches a tile is cut into.
    """

    pictures: tuple[Picture, ...]
    inputs: Inputs
    tokens: tuple[int, ...]
    words: tuple[str, ...]
    trace: Trace
    positions: tuple[npt.NDArray[np.int64], ...]
    tile_patches: int

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures as they were read."""
        return tuple(picture.image for picture in self.pictures)

    @property
    def boxes(self) -> tuple[Array, ...]:
        """Which part of each picture its features show; see `boxes.feature_boxes`."""
        return tuple(picture.boxes for picture in self.pictures)

    @property
    def answer(self) -> str:
        """The answer's text."""
        return "".join(self.words).strip()

    def attention(self, picture: int = 0) -> Array:
        """What each head's attention gave a picture's features for each word, (layers, H, G, F)."""
        return self.trace.attention[..., self.positions[picture]]

    def rollout(self, picture: int = 0) -> Array:
        """How much of each feature came to each word through all layers, (G, F)."""
        return self.trace.rollout[..., self.positions[picture]]

    def on_picture(self, values: Array, picture: int = 0, longest: int = LONGEST) -> Array:
        """A map (height, width) over a picture of what each of its features (F,) got."""
        image = self.images[picture]
        return heat_map(values, self.boxes[picture], (image.height, image.width), longest)


def folded(words: Sequence[str]) -> dict[int, str]:
    """The first of each run of the same word, by position, with how often it comes."""
    runs: dict[int, str] = {}
    for _, run in groupby(range(len(words)), words.__getitem__):
        first, *others = run
        times = f" ({len(others) + 1} times)" if others else ""
        runs[first] = words[first] + times
    return runs


def explain(
    model: Llava,
    processor: Processor,
    prompt: Conversation,
    image: Any = None,
    *,
    video: Any = None,
    frames: int | None = None,
    max_tokens: int = 32,
    **prompt_options: Any,
) -> Explanation:
    """Answers a prompt with the likeliest words, then looks at how.

    Args:
        model (Llava): The model.
        processor (Processor): Its processor.
        prompt (str or list of dict): What `Processor` takes, its pictures given as `image`.
        image (image or list of images, optional): What `load_image` takes.
        video (video or list of videos, optional): What `Processor` takes.
        frames (int, optional): How many are taken of each.
        max_tokens (int): The longest answer.
        **prompt_options: ``raw``, ``system``, ``image_position`` of `Processor`.

    Raises:
        ValueError: `Processor` refuses the prompt, or it brings pictures of its own.
    """
    images = [*map(load_image, as_list(image))]
    videos = [processor.load_video(source, frames) for source in as_list(video)]
    inputs = processor(prompt, images, video=videos, **prompt_options)
    of_videos = sum(len(taken.images) for taken in inputs.videos)
    for what, option, found, given in (
        ("pictures", "image", len(inputs.image_tokens) - of_videos, len(images)),
        ("videos", "video", len(inputs.videos), len(videos)),
    ):
        if found != given:
            raise ValueError(
                f"The prompt has {found} {what} and {given} were given as {option}; give all of "
                "them so."
            )
    parts = stream_generate(model, processor, inputs, max_tokens=max_tokens)
    tokens = [part.token for part in parts]
    if len(tokens) > 1 and tokens[-1] in processor.eos_ids:
        tokens.pop()
    length = inputs.input_ids.shape[1]
    positions = np.flatnonzero(model.config.are_placeholders(inputs.input_ids[0]))
    pictures = pictures_of(inputs, images, videos, processor)
    features = [sum(inputs.image_tokens[i] for i in one.entries) for one in pictures]
    return Explanation(
        pictures=tuple(pictures),
        inputs=inputs,
        tokens=tuple(tokens),
        words=tuple(processor.tokenizer.text_of(token) for token in tokens),
        trace=trace(model, inputs, tokens, range(length - 1, length - 1 + len(tokens))),
        positions=tuple(np.split(positions, np.cumsum(features))[:-1]),
        tile_patches=model.config.vision_config.patches_per_side**2,
    )


def nearest_words(
    model: Llava, processor: Processor, features: Array, count: int = 3
) -> list[list[tuple[str, float]]]:
    """The words whose embeddings point most nearly where projected features, (F, D), do.

    Returns:
        For each feature so many words, each with the cosine of the angle between.
    """
    table = as_numpy(plain_weight(model.language_model.model.embed_tokens))
    cosines = _directions(features) @ _directions(table).T
    nearest = np.argsort(-cosines, axis=1)[:, :count]
    return [
        [(processor.tokenizer.text_of(int(i)), float(row[i])) for i in best]
        for row, best in zip(cosines, nearest, strict=True)
    ]


def _directions(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def logit_lens(
    model: Llava, hidden_states: Array, count: int = 1
) -> tuple[npt.NDArray[np.int64], Array]:
    """What the model would say if it ended after each layer.

    Args:
        model (Llava): The model.
        hidden_states: Those of a `Trace` at some positions, (layers + 1, Q, D).
        count (int): How many of the likeliest tokens.

    Returns:
        The tokens (layers + 1, Q, count), the likeliest first, and their probabilities.
    """
    decoder = model.language_model
    tokens, probabilities = [], []
    for layer, states in enumerate(hidden_states):
        x = mx.array(states).astype(decoder.dtype)
        is_last = layer == len(hidden_states) - 1  # which the norm has seen already
        logits = as_numpy(decoder.unembed(x) if is_last else decoder.logits(x))
        tokens.append(np.argsort(-logits, axis=-1)[:, :count])
        shares = np.exp(_log_softmax(logits))
        probabilities.append(np.take_along_axis(shares, tokens[-1], axis=-1))
    return np.stack(tokens), np.stack(probabilities)


def _log_softmax(logits: Array) -> Array:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class MaskEffect:
    """What each part of a picture is worth to each word of an answer.

    Attributes:
        drops: by how much a word's log-probability falls (in nats) when a part is masked and the
            words before it stay, (R, G).
        boxes: the parts, (R, 4), in pixels of the picture.
    """

    drops: Array
    boxes: Array


def mask_effect(
    model: Llava,
    processor: Processor,  # noqa: ARG001 - as all of these functions have it
    explanation: Explanation,
    picture: int = 0,
    window: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> MaskEffect:
    """Masks one part of a picture after the other, and asks what that does to the answer.

    A part is masked in the picture's median colour, which in a drawing is its background; of a
    video it is one of a frame.

    Args:
        model (Llava): The model.
        processor (Processor): Its processor.
        explanation (Explanation): What `explain` gave.
        picture (int): Which of the pictures.
        window (int, optional): How many patches of the first tile, in each direction, make a
            part; default: so many that there are at most 6 x 6 parts, or one for each frame.
        progress (callable): Is told how many parts are done, of how many.

    Raises:
        ValueError: `window` is below 1.
    """
    shown = explanation.pictures[picture]
    parts, drops = shown.parts(window), []
    at_once = max(1, MASKED_AT_ONCE // len(shown.frames))
    for start in range(0, len(parts), at_once):
        some = parts[start : start + at_once]
        drops.append(_drops(model, explanation, shown, [*shown.masked(some)]))
        progress(start + len(some), len(parts))
    boxes = np.array([shown.place(*part) for part in parts])
    return MaskEffect(np.concatenate(drops), boxes)


def _drops(
    model: Llava, explanation: Explanation, picture: Picture, pixels: Sequence[Array]
) -> Array:
    """`MaskEffect.drops` of a picture that is masked in some ways, each as its tiles, (B, G)."""
    inputs, tokens = explanation.inputs, np.array(explanation.tokens)
    own = slice(picture.entries.start, picture.entries.stop)
    sizes = inputs.image_sizes and [*inputs.image_sizes[own]] * len(pixels)
    masked = iter(model.encode_images(np.concatenate(pixels), sizes))
    others = [mx.array(features) for features in explanation.trace.image_features]
    features = list[mx.array]()
    for _ in pixels:
        others[own] = [next(masked) for _ in picture.entries]
        features += others
    ids = np.repeat(with_answer(inputs, explanation.tokens).input_ids, len(pixels), axis=0)
    decoder = model.language_model
    (x,) = deque(decoder.hidden_states(model.embed(ids, image_features=features)), maxlen=1)
    after = _log_softmax(as_numpy(decoder.logits(x[:, -len(tokens) - 1 : -1])))
    before = _log_softmax(explanation.trace.logits[explanation.trace.queries])
    return (before - after)[:, np.arange(len(tokens)), tokens]
