"""What training adds to a model: LoRA layers and a trained projector, in a small folder.

LoRA: Hu et al. 2021 (arXiv:2106.09685); on a quantised model it is QLoRA
(Dettmers et al. 2023, arXiv:2305.14314). LLaVA's recipe puts it on all linear layers of the
decoder's blocks and trains the projector beside it (scripts/v1_5/finetune_lora.sh).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_llava.checkpoint.adapters import CONFIG, MLX_WEIGHTS
from mlx_llava.checkpoint.safetensors import write_arrays
from mlx_llava.json_files import write_json
from mlx_llava.model.llava import Llava
from mlx_llava.model.lora import LoRALinear
from mlx_llava.signatures import check_bounds, documented, option

#: The linear layers of a decoder block.
TARGETS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@documented
@dataclass(frozen=True)
class Adapter:
    """What an adapter folder of ours says about itself."""

    base_model: str = option(MISSING, str, "the checkpoint that it was trained on")
    stage: str = option(MISSING, str, "projector (no LoRA layers) or lora")
    rank: int = option(128, int, "of the LoRA matrices", ge=1, le=1 << 16)
    alpha: float = option(256.0, float, "their strength is alpha / rank", gt=0, lt=math.inf)
    dropout: float = option(0.05, float, "of their inputs, in training", ge=0, lt=1)
    targets: tuple[str, ...] = option(
        TARGETS, tuple, "the layers of each decoder block that have them"
    )

    def __post_init__(self) -> None:
        check_bounds(self, "lora_")
        unknown = set(self.targets) - set(TARGETS)
        if unknown or not self.targets:
            raise ValueError(
                f"There is no layer {', '.join(sorted(unknown))!r} in a block; "
                f"known: {', '.join(TARGETS)}."
            )

    @property
    def scale(self) -> float:
        """What the product of the LoRA matrices is multiplied by."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        data = {**asdict(self), "scale": self.scale}
        keys = data.keys() if self.stage == "lora" else ("base_model", "stage")
        return {key: data[key] for key in keys}


def add_lora(model: Llava, adapter: Adapter) -> None:
    """Puts LoRA layers, which change nothing yet, around the targets of every decoder block."""
    for block in model.language_model.layers:
        adapted = [
            (name, LoRALinear(layer, adapter.rank, adapter.scale, adapter.dropout))
            for name, layer in block.named_modules()
            if name in adapter.targets
        ]
        block.update_modules(tree_unflatten(adapted))


def save_adapter(folder: Path, adapter: Adapter, weights: Mapping[str, mx.array]) -> None:
    """Writes adapters.safetensors and adapter_config.json to a folder that is there."""
    write_arrays(folder / MLX_WEIGHTS, weights)
    write_json(folder / CONFIG, adapter.to_dict())
