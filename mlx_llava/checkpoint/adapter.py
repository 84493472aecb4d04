"""What training adds to a model: LoRA layers and a trained projector, in a small folder.

LoRA: Hu et al. 2021 (arXiv:2106.09685), with mlx-lm's layers; on a quantised model it is QLoRA
(Dettmers et al. 2023, arXiv:2305.14314). LLaVA's recipe puts it on all linear layers of the
decoder's blocks and trains the projector beside it (scripts/v1_5/finetune_lora.sh).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_llava.checkpoint.lora import LowRank, add_low_rank
from mlx_llava.checkpoint.parts import read_adapter
from mlx_llava.checkpoint.safetensors import write_arrays
from mlx_llava.json_files import write_json
from mlx_llava.model.llava import Llava
from mlx_llava.model.quantized import is_quantized, plain_weight, with_weight

WEIGHTS = "adapters.safetensors"

_BLOCKS = "language_model.model.layers."
#: The linear layers of a decoder block.
TARGETS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder of ours says about itself.

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
    write_arrays(folder / WEIGHTS, weights)
    write_json(folder / "adapter_config.json", adapter.to_dict())


def load_adapter(model: Llava, folder: str | Path) -> list[str]:
    """Puts a trained adapter on a model.

    LoRA stays beside the linear layers of the decoder's blocks. What else it changes (DoRA's
    layers, embeddings, the tower) becomes new weights, plain ones in the place of quantised ones.

    Args:
        model (Llava): The model that it was trained on; is changed.
        folder (str or Path): What `mlx_llava.train`, PEFT, mlx-lm or mlx-vlm wrote.

    Returns:
        list of str: The quantised layers that became plain.

    Raises:
        FileNotFoundError: There is no adapter in the folder.
        ValueError: It was trained on a model of another shape, or it is of another kind.
    """
    lora = read_adapter(Path(folder))
    for warning in lora.warnings:
        warnings.warn(warning, stacklevel=2)
    lora.check_tied(model.config.tie_word_embeddings)
    quantized = _quantized(model)
    _set_weights(model, {name: tensor.read() for name, tensor in lora.trained.items()}, folder)
    modules = dict(model.named_modules())
    merged, beside = {}, {}
    for name, change in lora.changes.items():
        path = name.removesuffix(".weight")
        layer = modules.get(path, nn.Module())
        weights = [plain_weight(layer)] if "weight" in layer else []
        lora.check_place(name, weights[0].shape if weights else None)
        if change.magnitude is None and path.startswith(_BLOCKS):
            beside[path] = _lora_layer(layer, change)
        else:
            weights += [part.read() for part in change.parts()]
            merged[name] = add_low_rank(weights, change.scale)
    _set_weights(model, merged, folder)
    model.update_modules(tree_unflatten(list(beside.items())))
    model.eval()
    return sorted(quantized - _quantized(model) - {f"{path}.linear" for path in beside})


def _quantized(model: nn.Module) -> set[str]:
    return {path for path, layer in model.named_modules() if is_quantized(layer)}


def _lora_layer(layer: nn.Module, change: LowRank) -> nn.Module:
    from mlx_lm.tuner.lora import LoRALinear

    adapted = LoRALinear.from_base(layer, r=change.rank, scale=change.scale)
    adapted.lora_a, adapted.lora_b = change.down.read().T, change.up.read().T
    return adapted


def _set_weights(model: Llava, weights: Mapping[str, mx.array], folder: str | Path) -> None:
    """Puts weights into a model, plain ones in the place of quantised ones.

    Raises:
        ValueError: The model has no such weight, or one of another shape.
    """
    modules, expected = dict(model.named_modules()), dict(tree_flatten(model.parameters()))
    wrong, plain = [], {}
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        layer = modules.get(path)
        stored = expected.get(name)
        if layer is not None and is_quantized(layer) and leaf == "weight":
            plain[path] = with_weight(layer, weight)
            stored = plain_weight(layer)
        if stored is None or weight.shape != stored.shape:
            wrong.append(f"{name} {weight.shape}")
    if wrong:
        raise ValueError(
            f"{folder} was trained on a model of another shape: {len(wrong)} of {len(weights)} "
            f"tensors do not fit, the first is {wrong[0]}."
        )
    model.update_modules(tree_unflatten(list(plain.items())))
    model.load_weights(list(weights.items()), strict=False)


def merge_adapter(model: Llava) -> list[str]:
    """Adds LoRA layers to the weights that they are on, and takes them away.

    Quantised weights become plain ones, since a sum has no codes.

    Returns:
        list of str: The layers that were quantised.
    """
    from mlx_lm.tuner.lora import LoRALinear

    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear)]
    merged = []
    for path, layer in layers:
        parts = [plain_weight(layer.linear), layer.lora_b.T, layer.lora_a.T]
        merged.append((path, with_weight(layer.linear, add_low_rank(parts, layer.scale))))
    model.update_modules(tree_unflatten(merged))
    return [path for path, layer in layers if isinstance(layer.linear, nn.QuantizedLinear)]
