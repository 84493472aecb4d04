"""What a training run is told, with the defaults of LLaVA 1.5's own scripts."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("projector", "full", "lora")
#: scripts/v1_5/pretrain.sh, finetune.sh and finetune_lora.sh.
LEARNING_RATES = {"projector": 1e-3, "full": 2e-5, "lora": 2e-4}
LORA_PROJECTOR_LEARNING_RATE = 2e-5
_COUNTS = (
    "steps",
    "epochs",
    "batch_size",
    "accumulation",
    "max_length",
    "report_every",
    "validate_every",
    "save_every",
)


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        stage: what learns: ``projector`` alone, ``full`` (projector and decoder) or ``lora``
            (LoRA layers in the decoder, and the projector).
        steps: how often weights change; None is `epochs` over the data.
        epochs: how often everything is seen.
        batch_size: rows of a step, over all processes and `accumulation`.
        accumulation: in how many parts a process computes its rows of a step.
        learning_rate: the highest; None is LLaVA's for the stage.
        projector_learning_rate: the projector's; None is LLaVA's for the stage.
        vision_learning_rate: the vision tower's; None leaves the tower as it is.
        warmup_ratio: the part of the steps in which learning rates rise; then they fall as a
            cosine.
        weight_decay: of matrices, not of biases and norms.
        max_grad_norm: gradients are scaled down to it.
        gradient_checkpointing: less memory for more time.
        max_length: the longest row in tokens.
        report_every: steps from report to report.
        validate_every: steps from validation to validation.
        save_every: steps from checkpoint to checkpoint.
        seed: the same gives the same run.
    """

    stage: str
    steps: int | None = None
    epochs: int = 1
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float | None = None
    projector_learning_rate: float | None = None
    vision_learning_rate: float | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    max_length: int = 2048
    report_every: int = 10
    validate_every: int = 200
    save_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"There is no stage {self.stage!r}; known: {', '.join(STAGES)}.")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; it must be in [0, 1).")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must lie in 0..2^32 - 1.")

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
