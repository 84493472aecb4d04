"""How a LLaVA learns: the options, which weights, the optimiser and the loss.

Defaults are those of LLaVA 1.5's own scripts (scripts/v1_5/pretrain.sh, finetune.sh and
finetune_lora.sh); the optimiser is MLX's, put together as transformers' Trainer does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_llava.model.llava import Llava
from mlx_llava.signatures import check_bounds, documented, option
from mlx_llava.tuner.data import IGNORED, Batch
from mlx_llava.tuner.lora import Adapter, add_lora

Schedule = Callable[[mx.array], mx.array]

STAGES = ("projector", "full", "lora")
LEARNING_RATES = {"projector": 1e-3, "full": 2e-5, "lora": 2e-4}
LORA_PROJECTOR_LEARNING_RATE = 2e-5
#: So many steps a schedule can count, of as many epochs.
MOST = 2**31 - 1


@documented
@dataclass(frozen=True)
class TrainingOptions:
    """How to train; the command has a flag for each."""

    stage: str = option(
        MISSING,
        str,
        "what learns: projector, full (projector and decoder), or lora (LoRA layers and projector)",
        {"choices": STAGES, "required": True, "help": "the projector, all, or LoRA layers"},
    )
    steps: int | None = option(
        None, int, "how often weights change (default: epochs over the data)", ge=1, le=MOST
    )
    epochs: int = option(1, int, "how often everything is seen", ge=1, le=MOST)
    batch_size: int = option(16, int, "rows of a step, of all processes together", ge=1)
    accumulation: int = option(
        1, int, "in how many parts a process computes its rows of a step", ge=1
    )
    learning_rate: float | None = option(
        None, float, "the highest (default: 1e-3, 2e-5 or 2e-4 by stage)", ge=0, lt=math.inf
    )
    projector_learning_rate: float | None = option(
        None, float, "the projector's (default: as the others; 2e-5 with LoRA)", ge=0, lt=math.inf
    )
    vision_learning_rate: float | None = option(
        None, float, "trains the vision tower too (LLaVA 1.6: 2e-6)", ge=0, lt=math.inf
    )
    warmup_ratio: float = option(
        0.03,
        float,
        "the part of the steps in which rates rise; then they fall as a cosine",
        ge=0,
        lt=1,
    )
    weight_decay: float = option(
        0.0, float, "of matrices, not of biases and norms", ge=0, lt=math.inf
    )
    max_grad_norm: float = option(
        1.0, float, "gradients are scaled down to it; 0 leaves them as they are", ge=0, lt=math.inf
    )
    gradient_checkpointing: bool = option(False, bool, "less memory for more time")
    max_length: int = option(2048, int, "the longest row in tokens", ge=1)
    report_every: int = option(10, int, "steps from report to report", ge=1)
    validate_every: int = option(200, int, "steps from validation to validation", ge=1)
    save_every: int = option(200, int, "steps from checkpoint to checkpoint", ge=1)
    seed: int = option(0, int, "the same gives the same run", ge=0, le=2**32 - 1)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"There is no stage {self.stage!r}; known: {', '.join(STAGES)}.")
        check_bounds(self)

    @property
    def rates(self) -> dict[str, float]:
        """The highest learning rate below each module; the first that fits counts."""
        rate = LEARNING_RATES[self.stage] if self.learning_rate is None else self.learning_rate
        usual = LORA_PROJECTOR_LEARNING_RATE if self.stage == "lora" else rate
        projector = self.projector_learning_rate
        return {
            "multi_modal_projector": usual if projector is None else projector,
            "vision_tower": self.vision_learning_rate or 0.0,
            "": rate,
        }


def prepare(model: Llava, options: TrainingOptions, adapter: Adapter) -> None:
    """Freezes what a stage leaves alone, and adds the adapter's LoRA layers in the stage ``lora``.

    Raises:
        ValueError: What the stage trains is quantised.
    """
    _check_quantized(model, options.stage)
    model.freeze()
    if options.rates["multi_modal_projector"]:
        model.multi_modal_projector.unfreeze()
    if options.stage == "full":
        model.language_model.unfreeze()
        if model.config.has_newline:
            model.unfreeze(recurse=False, keys="image_newline")
    if options.stage == "lora":
        add_lora(model, adapter)
        model.language_model.freeze()
        model.language_model.unfreeze(keys=["lora_a", "lora_b"])
    if options.rates["vision_tower"]:
        unfreeze_tower(model)
    if not tree_flatten(model.trainable_parameters()):
        raise ValueError("Nothing is left to train: every learning rate is 0.")


def _check_quantized(model: Llava, stage: str) -> None:
    quantised = [name for name, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)]
    if stage == "full" and quantised:
        raise ValueError(
            f"{len(quantised)} layers are quantised and cannot be trained; use --stage lora, or "
            "dequantise with mlx_llava.convert -d."
        )
    if stage == "projector" and any("projector" in name for name in quantised):
        raise ValueError("The projector is quantised; dequantise with mlx_llava.convert -d.")


def unfreeze_tower(model: Llava) -> None:
    """Unfreezes what is read of the vision tower: nothing above the last feature layer."""
    tower = model.vision_tower.vision_model
    tower.unfreeze()
    for module in (tower.post_layernorm, *tower.encoder.layers[max(model.config.feature_layers) :]):
        module.freeze()


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
