"""Which weights of a model a stage trains."""

from __future__ import annotations

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_llava.checkpoint.adapter import Adapter, add_lora
from mlx_llava.model.llava import Llava
from mlx_llava.tuner.options import TrainingOptions


def prepare(model: Llava, options: TrainingOptions, adapter: Adapter) -> None:
    """Freezes what a stage leaves alone, and adds LoRA layers where it has them.

    Args:
        model (Llava): Is changed.
        options (TrainingOptions): The stage.
        adapter (Adapter): The LoRA layers' settings.

    Raises:
        ValueError: What the stage trains is quantised.
    """
    quantised = [name for name, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)]
    if options.stage == "full" and quantised:
        raise ValueError(
            f"{len(quantised)} layers are quantised and cannot be trained; use --stage lora, or "
            "dequantise with mlx_llava.convert -d."
        )
    if options.stage == "projector" and any("projector" in name for name in quantised):
        raise ValueError("The projector is quantised; dequantise with mlx_llava.convert -d.")
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


def unfreeze_tower(model: Llava) -> None:
    """Unfreezes what is read of the vision tower: nothing above the last feature layer."""
    tower = model.vision_tower.vision_model
    layers = tower.encoder.layers[: max(model.config.feature_layers)]
    for module in (tower.embeddings, tower.pre_layrnorm, *layers):
        module.unfreeze()
