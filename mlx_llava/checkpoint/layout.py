"""Key names: every llava-hf spelling -> the canonical one, which is the model's own.

The spellings are those of transformers 4.36-4.51, 4.52+, 5 and of mlx-vlm, and the doubled
prefixes of broken round trips between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import mlx.core as mx

#: Applied in order, each as often as it matches.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^(language_model|vision_tower|multi_modal_projector)\.\1\.", r"\1."),
    (r"^(language_model\.model)\.(language_model\.)?model\.", r"\1."),
    (r"^language_model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model.model."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
#: Buffers that old versions saved; they follow from the config.
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$")

_PATCH_EMBEDDING = "vision_tower.vision_model.embeddings.patch_embedding.weight"
_LM_HEAD = "language_model.lm_head."


def canonical_name(key: str) -> str:
    """The canonical name of a tensor or module."""
    for pattern, replacement in _RENAMES:
        while (renamed := re.sub(pattern, replacement, key)) != key:
            key = renamed
    return key


def canonical_weights(
    weights: Iterable[tuple[str, mx.array]], is_mlx: bool, tied_head: bool
) -> dict[str, mx.array]:
    """Renames tensors, drops buffers, and lays the patch convolution out as MLX wants it.

    Args:
        weights (iterable of (str, mx.array)): Keys and tensors as found.
        is_mlx (bool): The files are MLX's own; decides between (O, 3, 3, 3) and itself.
        tied_head (bool): The output layer is the embedding, so its copy is dropped.

    Raises:
        ValueError: Two tensors have the same canonical name.
    """
    sources: dict[str, str] = {}
    canonical: dict[str, mx.array] = {}
    for key, tensor in weights:
        if _BUFFERS.search(key):
            continue
        name = canonical_name(key)
        if tied_head and name.startswith(_LM_HEAD):
            continue
        if name in canonical:
            raise ValueError(f"{sources[name]} and {key} are both {name}; remove one of them.")
        sources[name], canonical[name] = key, tensor
    patches = canonical.get(_PATCH_EMBEDDING)
    if patches is not None and _is_channels_first(patches, is_mlx):
        canonical[_PATCH_EMBEDDING] = patches.transpose(0, 2, 3, 1)
    return canonical


def to_torch_layout(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Lays the patch convolution out as PyTorch does, (O, 3, p, p)."""
    patches = mx.contiguous(weights[_PATCH_EMBEDDING].transpose(0, 3, 1, 2))
    return {**weights, _PATCH_EMBEDDING: patches}


def _is_channels_first(patches: mx.array, is_mlx: bool) -> bool:
    """Whether a patch convolution is PyTorch's (O, 3, p, p), not MLX's (O, p, p, 3)."""
    first, last = patches.shape[1] == 3, patches.shape[-1] == 3
    return first and not (last and is_mlx)
