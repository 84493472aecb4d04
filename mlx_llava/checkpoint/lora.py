"""What a LoRA changes, and the sum of that and the weights of a base.

LoRA: Hu et al. 2021 (arXiv:2106.09685); DoRA: Liu et al. 2024 (arXiv:2402.09353). A weight is
(O, I), outputs and inputs, or words and width in an embedding; R is the rank of its change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_llava.checkpoint.plain import plain_layer
from mlx_llava.checkpoint.tensors import LazyTensor, combine

CONFIG = "adapter_config.json"
PROJECTOR = "multi_modal_projector."
_EMBEDDING = "language_model.model.embed_tokens.weight"


@dataclass(frozen=True)
class LowRank:
    """The change of one weight.

    Attributes:
        up: (O, R).
        down: (R, I).
        scale: what their product is multiplied by.
        magnitude: DoRA's length of each row (O, 1) or column (1, I) of the changed weight.
    """

    up: LazyTensor
    down: LazyTensor
    scale: float
    magnitude: LazyTensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    def check(self, name: str, rank: object) -> None:
        """Raises ValueError unless the parts fit each other and have the rank that was said."""
        up, down = self.up.shape, self.down.shape
        if not (len(up) == len(down) == 2 and up[1] == down[0] > 0):
            raise ValueError(
                f"The adapter changes {name} by {up} x {down}, which is no product of two "
                "matrices: a convolution's, or not saved whole."
            )
        if rank != self.rank:
            raise ValueError(
                f"{CONFIG} gives {name} the rank {rank}, but its matrices have {self.rank}."
            )

    def parts(self) -> list[LazyTensor]:
        """Its tensors, in the order of `add_low_rank`."""
        return [self.up, self.down, *([self.magnitude] if self.magnitude else [])]


@dataclass
class Lora:
    """The content of a LoRA folder.

    Attributes:
        changes: of weights, by canonical name.
        trained: tensors that replace the base's, by canonical name.
        warnings: what its user should know.
    """

    changes: dict[str, LowRank]
    trained: dict[str, LazyTensor]
    warnings: list[str] = field(default_factory=list)

    def check_tied(self, is_tied: bool) -> None:
        """Raises ValueError if the embedding is changed, but not the output layer that is tied."""
        if is_tied and self.changes and _EMBEDDING in {*self.changes, *self.trained}:
            raise ValueError(
                f"The adapter changes {_EMBEDDING}, which is the base's output layer too "
                "(tie_word_embeddings); merge it with PEFT (merge_and_unload) and load the result."
            )

    def check_place(self, name: str, shape: tuple[int, ...] | None) -> None:
        """Raises ValueError unless a weight of that shape can be changed as the adapter does."""
        change = self.changes[name]
        if shape is None:
            raise ValueError(f"The adapter changes {name}, which the base does not have.")
        if (change.up.shape[0], change.down.shape[1]) != shape:
            raise ValueError(
                f"The adapter changes {name} by {change.up.shape} x {change.down.shape}, but the "
                f"base's is {shape}; it belongs to another base."
            )


def add_low_rank(arrays: list[mx.array], scale: float) -> mx.array:
    """A weight and the parts of its change -> their sum, computed in float32."""
    weight, up, down, *magnitude = (array.astype(mx.float32) for array in arrays)
    weight = weight + scale * (up @ down)
    for lengths in magnitude:
        axis = 1 if lengths.shape[1] == 1 else 0
        weight = weight * (lengths / mx.linalg.norm(weight, axis=axis, keepdims=True))
    return weight.astype(arrays[0].dtype)


def merge_lora(
    base: Mapping[str, LazyTensor], lora: Lora, quantization: Mapping[str, Any] | None = None
) -> dict[str, LazyTensor]:
    """Adds a LoRA to its base; quantised weights that it changes become plain.

    Args:
        base (dict): Tensors by canonical name.
        lora (Lora): What changes them.
        quantization (dict, optional): MLX's settings of the base's layers.
    """
    result = dict(base)
    if not lora.changes and all(name.startswith(PROJECTOR) for name in lora.trained):
        # Another projector may have fewer layers.
        result = {name: t for name, t in base.items() if not name.startswith(PROJECTOR)}
    for name, tensor in lora.trained.items():
        if name in result:
            plain_layer(result, name.removesuffix(".weight"), quantization)
        result[name] = tensor
    for name, change in lora.changes.items():
        plain_layer(result, name.removesuffix(".weight"), quantization)
        weight = result.get(name)
        lora.check_place(name, weight.shape if weight else None)
        compute = partial(add_low_rank, scale=change.scale)
        result[name] = combine([result[name], *change.parts()], compute)
    return result
