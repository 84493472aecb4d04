"""What training minimises."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.model.llava import Llava
from mlx_llava.tuner.data import IGNORED, Batch


def answer_loss(model: Llava, batch: Batch) -> tuple[mx.array, mx.array]:
    """Cross-entropy of the tokens of the answers, each told from all before it.

    The sum and the count are apart, so that the mean over several batches is the mean over
    their tokens, however they are split.

    Args:
        model (Llava): The model.
        batch (Batch): B rows of L tokens, padded on the right, where no token looks.

    Returns:
        tuple[mx.array, mx.array]: The sum in float32, and the number of tokens.
    """
    logits = model(batch.input_ids, batch.pixel_values, batch.image_sizes)[:, :-1]
    labels = batch.labels[:, 1:]
    learned = labels != IGNORED
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), mx.where(learned, labels, 0))
    return (losses * learned).sum(), learned.sum()
