"""What training adds to a model: LoRA layers and a trained projector, in a small folder.

LoRA: Hu et al. 2021 (arXiv:2106.09685), with mlx-lm's layers; on a quantised model it is QLoRA
(Dettmers et al. 2023, arXiv:2305.14314). LLaVA's recipe puts it on all linear layers of the
decoder's blocks and trains the projector beside it (scripts/v1_5/finetune_lora.sh).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_llava.checkpoint.safetensors import read_file
from mlx_llava.json_files import read_json, write_json
from mlx_llava.llava import Llava
from mlx_llava.quantized import plain_weight

WEIGHTS = "adapters.safetensors"

#: The linear layers of a decoder block.
TARGETS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder says about itself.

    Attributes:
        base_model: the checkpoint that it was trained on.
        stage: ``projector`` (no LoRA layers) or ``lora``.
        rank: of the LoRA matrices.
        alpha: their strength is ``alpha / rank``.
        dropout: of their inputs, in training.
        targets: the layers of each decoder block that have them.
    """

    base_model: str
    stage: str
    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    targets: tuple[str, ...] = TARGETS

    @property
    def scale(self) -> float:
        """What the product of the LoRA matrices is multiplied by."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        data = {**asdict(self), "scale": self.scale}
        keys = data.keys() if self.stage == "lora" else ("base_model", "stage")
        return {key: data[key] for key in keys}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Adapter:
        """Reads adapter_config.json; raises ValueError where it is not one of ours."""
        known = {field.name for field in fields(cls)}
        if not {"base_model", "stage"} <= data.keys() or data["stage"] not in ("projector", "lora"):
            raise ValueError(
                "adapter_config.json names no base_model and stage (projector or lora); this "
                "is no adapter of mlx_llava. Give a PEFT adapter as --model with --base."
            )
        values = {key: value for key, value in data.items() if key in known}
        return cls(**{**values, "targets": tuple(values.get("targets", TARGETS))})


def add_lora(model: Llava, adapter: Adapter) -> None:
    """Puts LoRA layers, which change nothing yet, around the targets of every decoder block.

    Raises:
        ValueError: A target is no linear layer of a block.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    unknown = set(adapter.targets) - set(TARGETS)
    if unknown or not adapter.targets:
        raise ValueError(
            f"There is no layer {', '.join(sorted(unknown))!r} in a block; "
            f"known: {', '.join(TARGETS)}."
        )
    if adapter.rank < 1:
        raise ValueError(f"The LoRA rank is {adapter.rank}; it must be at least 1.")
    decoder = model.language_model
    settings = {
        "rank": adapter.rank,
        "scale": adapter.scale,
        "dropout": adapter.dropout,
        "keys": set(adapter.targets),
    }
    linear_to_lora_layers(decoder, len(decoder.layers), settings)


def save_adapter(folder: Path, adapter: Adapter, weights: Mapping[str, mx.array]) -> None:
    """Writes adapters.safetensors and adapter_config.json to a folder that is there."""
    mx.save_safetensors(str(folder / WEIGHTS), dict(weights))
    write_json(folder / "adapter_config.json", adapter.to_dict())


def load_adapter(model: Llava, folder: str | Path) -> Adapter:
    """Puts a trained adapter on a model.

    Args:
        model (Llava): The model that it was trained on; is changed.
        folder (str or Path): What `mlx_llava.train` wrote.

    Raises:
        FileNotFoundError: There is no adapter in the folder.
        ValueError: It was trained on a model of another shape.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).exists() or not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS} with adapter_config.json; give the folder that "
            "mlx_llava.train wrote."
        )
    adapter = Adapter.from_dict(read_json(folder / "adapter_config.json"))
    if adapter.stage == "lora":
        add_lora(model, adapter)
    weights, _ = read_file(folder / WEIGHTS)
    expected = dict(tree_flatten(model.parameters()))
    wrong = [
        f"{name} {tensor.shape}"
        for name, tensor in weights.items()
        if name not in expected or expected[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(
            f"{folder} was trained on {adapter.base_model}, which has another shape: "
            f"{len(wrong)} of {len(weights)} tensors do not fit, the first is {wrong[0]}."
        )
    model.load_weights([(name, tensor.read()) for name, tensor in weights.items()], strict=False)
    model.eval()
    return adapter


def merge_adapter(model: Llava) -> list[str]:
    """Adds LoRA layers to the weights that they are on, and takes them away.

    Quantised weights become plain ones, since a sum has no codes.

    Returns:
        list of str: The layers that were quantised.
    """
    from mlx_lm.tuner.lora import LoRALinear

    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear)]
    model.update_modules(tree_unflatten([(path, _merged(layer)) for path, layer in layers]))
    return [path for path, layer in layers if isinstance(layer.linear, nn.QuantizedLinear)]


def _merged(layer: Any) -> nn.Linear:
    """A LoRA layer as one linear layer, summed in float32."""
    base = layer.linear
    weight = plain_weight(base)
    delta = layer.scale * (layer.lora_a.astype(mx.float32) @ layer.lora_b.astype(mx.float32)).T
    merged = nn.Linear(1, 1, bias=False)
    merged.weight = (weight.astype(mx.float32) + delta).astype(weight.dtype)
    if "bias" in base:
        merged.bias = base.bias
    return merged
