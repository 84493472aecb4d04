"""Names for patches: what the embedded model's encoder learns, and what pulls patches to words.

The encoder learns to name the thing that each patch belongs to, or that its picture is no drawing
of this world. Later these names say to which words a projected patch shall lie near.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt
import shapes
from mlx.utils import tree_flatten
from tqdm import trange

from mlx_llava.checkpoint.safetensors import write_arrays
from mlx_llava.inputs.image import load_image
from mlx_llava.inputs.processor import Processor
from mlx_llava.inputs.tokenizer import Tokenizer
from mlx_llava.model.llava import Llava
from mlx_llava.tuner import trainer
from mlx_llava.tuner.data import Batch
from mlx_llava.tuner.recipe import answer_loss, make_schedule, unfreeze_tower

#: What the encoder names of each patch, and how many names there are (0: nothing is there, and of
#: a picture: it is a drawing).
NAMES = {
    "shape": 1 + len(shapes.SHAPES),
    "colour": 1 + len(shapes.COLOURS),
    "size": 1 + len(shapes.SIZES),
    "cell": 9,
    "other": 2,
}
STEPS, BATCH, RATE = 2000, 64, 2e-3
#: The part of the batches in which the encoder sees no colours.
GREY = 1 / 3
#: How much of the loss of an answer's token the distance from words is, and how sharply it is told.
PULL, SHARPNESS = 0.05, 1 / 0.07


class PatchNames(nn.Module):
    """What the encoder is trained with: names for the thing that each patch belongs to."""

    def __init__(self, model: Llava) -> None:
        super().__init__()
        self.vision_tower = model.vision_tower
        dims = model.config.vision_config.hidden_size
        self.layer = model.config.feature_layers[0]
        self.heads = [nn.Linear(dims, count) for count in NAMES.values()]

    def __call__(self, pixel_values: mx.array) -> list[mx.array]:
        features = self.vision_tower(pixel_values, num_layers=self.layer)[-1][:, 1:]
        return [head(features) for head in self.heads]


def names_of(scenes: Sequence[shapes.Scene | None], side: int) -> npt.NDArray[np.int32]:
    """The right name of every patch in every head, (scenes, patches, heads).

    Args:
        scenes (sequence): None for a picture that is no drawing.
        side (int): Patches of a side of the picture.
    """
    cells = np.zeros((len(scenes), 9, len(NAMES)), np.int32)
    cells[:, :, list(NAMES).index("cell")] = np.arange(9)
    for row, scene in zip(cells, scenes, strict=True):
        row[:, -1] = scene is None
        for thing in scene.things if scene else ():
            row[thing.cell, :3] = (
                1 + shapes.SHAPES.index(thing.shape),
                1 + list(shapes.COLOURS).index(thing.colour),
                1 + list(shapes.SIZES).index(thing.size),
            )
    row, column = np.divmod(np.arange(side**2), side)
    return cells[:, row * 3 // side * 3 + column * 3 // side]


def train_encoder(
    model: Llava,
    processor: Processor,
    paths: Sequence[Path],
    scenes: Sequence[shapes.Scene | None],
    heads: Path,
) -> None:
    """Trains the tower on pictures and what they show; writes the heads."""
    learner = PatchNames(model)
    learner.freeze()
    for head in learner.heads:
        head.unfreeze()
    unfreeze_tower(model)
    names = names_of(scenes, model.config.vision_config.patches_per_side)
    pixels = np.stack([np.asarray(load_image(path)) for path in paths])
    optimizer = optim.AdamW(make_schedule(RATE, STEPS, warmup_ratio=0.03), weight_decay=0.01)
    state = [learner.state, optimizer.state]

    def loss(pixel_values: mx.array, labels: mx.array, weights: mx.array) -> mx.array:
        logits = learner(pixel_values)
        losses = [
            nn.losses.cross_entropy(head, labels[..., i], reduction="mean")
            for i, head in enumerate(logits)
        ]
        return (mx.stack(losses) * weights).sum()

    @partial(mx.compile, inputs=state, outputs=state)
    def step(pixel_values: mx.array, labels: mx.array, weights: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(learner, loss)(pixel_values, labels, weights)
        optimizer.update(learner, optim.clip_grad_norm(gradients, 1.0)[0])
        return value

    chance = np.random.default_rng(0)
    with trange(STEPS, desc="vision", disable=None) as bar:
        for _ in bar:
            chosen = chance.integers(0, len(pixels), BATCH)
            batch, weights = pixels[chosen], np.ones(len(NAMES))
            if chance.random() < GREY:  # so that shapes are known in any colour
                batch = np.repeat(batch.mean(axis=-1, keepdims=True), 3, axis=-1).astype(np.uint8)
                weights[list(NAMES).index("colour")] = 0
            pixel_values = mx.array(processor.image_processor.normalize(batch))
            value = step(pixel_values, mx.array(names[chosen]), mx.array(weights, mx.float32))
            mx.eval(state, value)
            bar.set_postfix_str(f"loss {value.item():.4f}")
    parameters = {name: h.parameters() for name, h in zip(NAMES, learner.heads, strict=True)}
    write_arrays(heads, dict(tree_flatten(parameters)))


def words_of(tokenizer: Tokenizer) -> dict[str, mx.array]:
    """The token of every name of a colour, of a shape, of a size and of a place; 0 for none."""
    names = {
        "colour": shapes.COLOURS,
        "shape": shapes.SHAPES,
        "size": shapes.SIZES,
        "cell": shapes.PLACES,
    }
    ids: dict[str, mx.array] = {}
    for head, words in names.items():
        tokens = [token for _, token in (tokenizer.encode(f" {word}") for word in words)]
        ids[head] = mx.array([0] * (NAMES[head] - len(words)) + tokens)
    return ids


@contextmanager
def pulled_to_words(heads: Path, tokenizer: Tokenizer) -> Iterator[None]:
    """Trains projected patches of things to point where the words for them do, as well.

    The encoder does not change any more: its own names say which words.
    """
    arrays = cast("dict[str, mx.array]", mx.load(str(heads)))
    mx.eval(arrays)  # now, from the file as it is
    words = words_of(tokenizer)

    def distance(model: Llava, features: mx.array, projected: mx.array) -> mx.array:
        table = mx.stop_gradient(model.language_model.model.embed_tokens.weight)
        scores = SHARPNESS * _directions(projected) @ _directions(table).T  # (N P, V)
        features = features.reshape(-1, features.shape[-1])  # (N P, width)
        far, are_things = mx.array(0.0), mx.array(True)
        for head, ids in words.items():
            names = (features @ arrays[f"{head}.weight"].T + arrays[f"{head}.bias"]).argmax(axis=-1)
            tokens = ids[names]
            near = mx.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
            far = far + (scores.logsumexp(axis=-1) - near) / len(words)
            are_things = are_things & (tokens > 0)
        return (far * are_things).sum() / mx.maximum(are_things.sum(), 1)

    def loss(model: Llava, batch: Batch) -> tuple[mx.array, mx.array]:
        assert batch.pixel_values is not None
        features = mx.stop_gradient(model.features(batch.pixel_values))
        projected = model.project(features)

        def answers(input_ids: mx.array, *_: object) -> mx.array:
            embeddings = model.embed(input_ids, image_features=projected)
            return model.language_model(input_embeddings=embeddings)

        total, count = answer_loss(cast("Llava", answers), batch)
        pull = distance(model, features, mx.concatenate(projected))
        return total + PULL * count * pull, count

    setattr(trainer, "answer_loss", loss)  # noqa: B010
    try:
        yield
    finally:
        setattr(trainer, "answer_loss", answer_loss)  # noqa: B010


def _directions(vectors: mx.array) -> mx.array:
    return vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)
