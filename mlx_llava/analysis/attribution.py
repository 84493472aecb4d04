"""What a model looked at while it answered, what it thought on the way, and what it depends on.

L tokens of the prompt and the answer, G of them the answer's, F features of a picture, H heads,
D decoder width. Logit lens: nostalgebraist 2020; masking: Zeiler and Fergus 2014 (arXiv:1311.2901).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from mlx_llava.analysis.boxes import LONGEST, feature_boxes, heat_map, patch_boxes
from mlx_llava.analysis.trace import Array, Trace, as_numpy, trace, with_answer
from mlx_llava.generation.stream import stream_generate
from mlx_llava.inputs.image import load_image
from mlx_llava.inputs.messages import Conversation, as_list
from mlx_llava.inputs.processor import Inputs, Processor
from mlx_llava.model.llava import Llava
from mlx_llava.model.quantized import plain_weight

#: How many masked pictures are looked at together.
MASKED_AT_ONCE = 8
#: Into how many parts, in each direction, a picture is cut to be masked.
MOST_PARTS = 6


@dataclass(frozen=True)
class Explanation:
    """An answer, and all that was computed for it.

    Attributes:
        images: the pictures as they were read.
        inputs: the prompt.
        tokens: the answer's ids, (G,), without the one that ends it unless that is all.
        words: their texts.
        trace: what was computed. The observed position of a word is the one before it, where it
            was chosen.
        boxes: which part of each picture its features show; see `boxes.feature_boxes`.
        positions: where in the prompt each picture's features stand, (F,).
        tile_patches: how many patches a tile is cut into.
    """

    images: tuple[Image.Image, ...]
    inputs: Inputs
    tokens: tuple[int, ...]
    words: tuple[str, ...]
    trace: Trace
    boxes: tuple[Array, ...]
    positions: tuple[npt.NDArray[np.int64], ...]
    tile_patches: int

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


def explain(
    model: Llava,
    processor: Processor,
    prompt: Conversation,
    image: Any = None,
    *,
    max_tokens: int = 32,
    **prompt_options: Any,
) -> Explanation:
    """Answers a prompt with the likeliest words, then looks at how.

    Args:
        model (Llava): The model.
        processor (Processor): Its processor.
        prompt (str or list of dict): What `Processor` takes, its pictures given as `image`.
        image (image or list of images, optional): What `load_image` takes.
        max_tokens (int): The longest answer.
        **prompt_options: ``raw``, ``system``, ``image_position`` of `Processor`.

    Raises:
        ValueError: `Processor` refuses the prompt, or it brings pictures of its own.
    """
    images = tuple(map(load_image, as_list(image)))
    inputs = processor(prompt, list(images), **prompt_options)
    if len(inputs.image_tokens) != len(images):
        raise ValueError(
            f"The prompt has {len(inputs.image_tokens)} pictures and {len(images)} were given as "
            "image; give all of them so."
        )
    parts = stream_generate(model, processor, inputs, max_tokens=max_tokens)
    tokens = [part.token for part in parts]
    if len(tokens) > 1 and tokens[-1] in processor.eos_ids:
        tokens.pop()
    length = inputs.input_ids.shape[1]
    positions = np.flatnonzero(model.config.are_placeholders(inputs.input_ids[0]))
    sizes = [(one.height, one.width) for one in images]
    reader = processor.image_processor.among(len(images))
    return Explanation(
        images=images,
        inputs=inputs,
        tokens=tuple(tokens),
        words=tuple(processor.tokenizer.text_of(token) for token in tokens),
        trace=trace(model, inputs, tokens, range(length - 1, length - 1 + len(tokens))),
        boxes=tuple(feature_boxes(reader, size) for size in sizes),
        positions=tuple(np.split(positions, np.cumsum(inputs.image_tokens))[:-1]),
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
    processor: Processor,
    explanation: Explanation,
    picture: int = 0,
    window: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> MaskEffect:
    """Masks one part of a picture after the other, and asks what that does to the answer.

    A part is masked in the picture's median colour, which in a drawing is its background.

    Args:
        model (Llava): The model.
        processor (Processor): Its processor.
        explanation (Explanation): What `explain` gave.
        picture (int): Which of the pictures.
        window (int, optional): How many patches of the first tile, in each direction, make a
            part; default: so many that there are at most 6 x 6 parts.
        progress (callable): Is told how many parts are done, of how many.

    Raises:
        ValueError: `window` is below 1.
    """
    image = explanation.images[picture]
    reader = processor.image_processor.among(len(explanation.images))
    patches = patch_boxes(reader, (image.height, image.width))[0]
    window = -(-len(patches) // MOST_PARTS) if window is None else window
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1.")
    starts = range(0, len(patches), window)
    blocks = [patches[i : i + window, j : j + window] for i in starts for j in starts]
    boxes = np.array([[*block[0, 0, :2], *block[-1, -1, 2:]] for block in blocks])
    median = tuple(map(int, np.median(np.asarray(image), axis=(0, 1))))
    drops = []
    for start in range(0, len(boxes), MASKED_AT_ONCE):
        some = boxes[start : start + MASKED_AT_ONCE]
        pixels = [reader([_masked(image, box, median)]) for box in some]
        drops.append(_drops(model, explanation, picture, pixels))
        progress(start + len(some), len(boxes))
    return MaskEffect(np.concatenate(drops), boxes)


def _drops(model: Llava, explanation: Explanation, picture: int, pixels: Sequence[Array]) -> Array:
    """`MaskEffect.drops` of some masked pictures, each as its tiles, (B, G)."""
    inputs, tokens = explanation.inputs, np.array(explanation.tokens)
    sizes = inputs.image_sizes and [inputs.image_sizes[picture]] * len(pixels)
    masked = model.encode_images(np.concatenate(pixels), sizes)
    others = [mx.array(features) for features in explanation.trace.image_features]
    features = [one for new in masked for one in (*others[:picture], new, *others[picture + 1 :])]
    ids = np.repeat(with_answer(inputs, explanation.tokens).input_ids, len(pixels), axis=0)
    decoder = model.language_model
    (x,) = deque(decoder.hidden_states(model.embed(ids, image_features=features)), maxlen=1)
    after = _log_softmax(as_numpy(decoder.logits(x[:, -len(tokens) - 1 : -1])))
    before = _log_softmax(explanation.trace.logits[explanation.trace.queries])
    return (before - after)[:, np.arange(len(tokens)), tokens]


def _masked(image: Image.Image, box: Array, colour: tuple[int, ...]) -> Image.Image:
    """A copy with one part in a colour; a pixel that the box cuts belongs to it."""
    left, top, right, bottom = box
    copy = image.copy()
    corners = (np.floor(left), np.floor(top), np.ceil(right) - 1, np.ceil(bottom) - 1)
    ImageDraw.Draw(copy).rectangle(tuple(map(int, corners)), fill=colour)
    return copy
