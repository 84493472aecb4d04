"""Key names: every spelling in the wild -> the canonical one, which is the model's own.

The spellings are those of transformers 4.36-4.51, 4.52+, 5 and of mlx-vlm, the doubled
prefixes of broken round trips between them, the original LLaVA's, and bare CLIP's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mlx_llava.checkpoint.tensors import LazyTensor


def _linear(n: int) -> str:
    return f"multi_modal_projector.linear_{n}."


#: Applied in order, each as often as it matches.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^(language_model|vision_tower|multi_modal_projector)\.\1\.", r"\1."),
    (r"^(language_model\.model)\.(language_model\.)?model\.", r"\1."),
    (r"^language_model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model.model."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^vision_model\.", "vision_tower.vision_model."),
    (r"^(model\.)?mm_projector\.(?=weight$|bias$)", _linear(1)),
    *((rf"^(model\.)?mm_projector\.{2 * n}\.", _linear(n + 1)) for n in range(8)),
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model.model."),
)
#: What is no weight of a LLaVA, and why.
_DROPPED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$"), "follows from the config"),
    (re.compile(r"^(text_model\.|text_projection|visual_projection|logit_scale)"), "CLIP's text"),
)

PATCH_EMBEDDING = "vision_tower.vision_model.embeddings.patch_embedding.weight"


def canonical_name(key: str) -> str:
    """The canonical name of a tensor or module."""
    for pattern, replacement in _RENAMES:
        while (renamed := re.sub(pattern, replacement, key)) != key:
            key = renamed
    return key


@dataclass
class Canonical:
    """Tensors under their canonical names.

    Attributes:
        tensors: by canonical name, MLX's layout.
        dropped: what was left out: source -> reason.
    """

    tensors: dict[str, LazyTensor]
    dropped: dict[str, str]


def canonical_tensors(tensors: Mapping[str, LazyTensor], is_mlx: bool) -> Canonical:
    """Renames tensors, drops what is no weight, and lays out the patch convolution for MLX.

    Args:
        tensors (dict): As found, by key.
        is_mlx (bool): The files are MLX's own; decides between (O, 3, 3, 3) and itself.
    """
    result = Canonical({}, {})
    for key, tensor in tensors.items():
        reason = next((why for pattern, why in _DROPPED if pattern.search(key)), None)
        if reason:
            result.dropped[tensor.source] = reason
            continue
        name = canonical_name(key)
        if name in result.tensors:
            other = result.tensors[name].source
            raise ValueError(f"{other} and {tensor.source} are both {name}; remove one of them.")
        result.tensors[name] = tensor
    patches = result.tensors.get(PATCH_EMBEDDING)
    if patches is not None and _is_channels_first(patches, is_mlx):
        result.tensors[PATCH_EMBEDDING] = patches.then(lambda w: w.transpose(0, 2, 3, 1))
    return result


def to_torch_layout(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Lays the patch convolution out as PyTorch does, (O, 3, p, p)."""
    patches = tensors[PATCH_EMBEDDING].then(lambda w: w.transpose(0, 3, 1, 2))
    return {**tensors, PATCH_EMBEDDING: patches}


def _is_channels_first(patches: LazyTensor, is_mlx: bool) -> bool:
    """Whether a patch convolution is PyTorch's (O, 3, p, p), not MLX's (O, p, p, 3)."""
    first, last = patches.shape[1] == 3, patches.shape[-1] == 3
    return first and not (last and is_mlx)
