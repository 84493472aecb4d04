"""The optimiser and its schedule: MLX's own, put together as transformers' Trainer does."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from mlx_llava.tuner.options import TrainingOptions

Schedule = Callable[[mx.array], mx.array]


def make_schedule(rate: float, steps: int, warmup_ratio: float) -> Schedule:
    """A linear rise, then a cosine to zero (transformers, get_cosine_schedule_with_warmup)."""
    warmup = math.ceil(steps * warmup_ratio)
    decay: Schedule = optim.cosine_decay(rate, max(1, steps - warmup))
    if not warmup:
        return decay
    rise = optim.linear_schedule(0.0, rate, warmup)
    joined: Schedule = optim.join_schedules([rise, decay], [warmup])
    return joined


def make_optimizer(options: TrainingOptions, steps: int) -> optim.MultiOptimizer:
    """One optimiser for each learning rate, with and without weight decay.

    Vectors - biases and norms - do not decay (transformers, Trainer.create_optimizer).
    """

    def belongs(prefix: str, is_matrix: bool) -> Callable[[str, mx.array], bool]:
        return lambda name, array: name.startswith(prefix) and (array.ndim > 1) == is_matrix

    optimizers, filters = [], []
    for prefix, rate in options.rates.items():
        schedule = make_schedule(rate, steps, options.warmup_ratio)
        for is_matrix in (True, False):
            decay = options.weight_decay if is_matrix else 0.0
            optimizers.append(optim.AdamW(schedule, weight_decay=decay, bias_correction=True))
            filters.append(belongs(prefix, is_matrix))
    return optim.MultiOptimizer(optimizers, filters[:-1])
