"""What a reader finds in the files of a LLaVA: plain data, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llava.checkpoint import fused
from mlx_llava.checkpoint.adapters import Lora, merge_lora
from mlx_llava.checkpoint.tensors import EMBEDDINGS, LM_HEAD, LazyTensor
from mlx_llava.inputs.image_processor import HALF
from mlx_llava.inputs.tokenizer import Tokenizer
from mlx_llava.model.text_config import TextConfig

#: Whose images are made tiles in another way than the tower's own.
_PROCESSORS = {"pad": "Llava", "anyres": "LlavaNext"}


@dataclass
class Contents:
    """A whole LLaVA, still on disk, of which nothing is built yet."""

    layout: str  # what it was found to be, in words
    settings: dict[str, Any]  # the llava-hf config.json that says what its own files say
    tensors: dict[str, LazyTensor]  # by canonical name
    tokenizer: Callable[[int], Tokenizer]  # makes it, once the placeholder's id is known
    image_processor: dict[str, Any] | None  # its preprocessor_config.json
    eos_ids: object  # what generation_config.json says of them
    names: str | None = None  # all that it is known by, where they choose its template
    video_processor: dict[str, Any] | None = None  # its video_preprocessor_config.json
    has_placeholder: bool = True  # the vocabulary has a row for it, or can have none
    dropped: dict[str, str] = field(default_factory=dict)  # tensors: source -> reason
    warnings: list[str] = field(default_factory=list)
    read_from: list[Path] = field(default_factory=list)  # folders and files of it and its parts

    def tie_head(self) -> None:
        """Ties the output layer to the embedding where config.json says so and no tensor says no.

        transformers 4 asks ``text_config`` and 5 asks the top level too, whose ``true`` versions
        4.36 to 4.57 wrote unasked; so a stored head that is not the embedding is kept, as 5 does.
        """
        key, text = "tie_word_embeddings", self.settings.get("text_config") or {}
        if True not in (self.settings.get(key), text.get(key)):
            return
        head, embedding = (
            {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
            for prefix in (LM_HEAD, EMBEDDINGS)
        )
        tied = not head or not embedding or _same(head, embedding)
        if not tied:
            self.warnings.append(
                "config.json says tie_word_embeddings, but the stored lm_head is not the "
                "embedding; the stored one is used."
            )
        elif not embedding:  # the one that is stored is both
            self.tensors |= {EMBEDDINGS + part: head[part] for part in head}
        for part in head if tied else ():
            source = self.tensors.pop(LM_HEAD + part).source
            self.dropped[source] = "is the embedding (tie_word_embeddings)"
        self.settings |= {key: tied, "text_config": {**text, key: tied}}

    def split_fused(self) -> None:
        """Splits what is stored of several layers together, as Phi-3's are."""
        if not any(map(fused.is_fused, self.tensors)):
            return
        text = TextConfig.from_dict(self.settings.get("text_config"))
        self.tensors = fused.split(self.tensors, text)
        for key in ("quantization", "quantization_config"):
            if isinstance(layers := self.settings.get(key), dict):
                self.settings[key] = fused.split_settings(layers, text)

    def merge(self, lora: Lora, beside: Container[str] = ()) -> list[str]:
        """Adds an adapter, see `merge_lora`; gives the quantised layers that became plain."""
        lora.check_tied(self.settings.get("tie_word_embeddings", False))
        quantization = self.settings.get("quantization") or self.settings.get("quantization_config")
        before, self.tensors = self.tensors, merge_lora(self.tensors, lora, quantization, beside)
        gone = before.keys() - self.tensors.keys()
        plain = sorted(name.removesuffix(".scales") for name in gone if name.endswith(".scales"))
        wrong = [
            f"{name} {tensor.shape}"
            for name, tensor in lora.trained.items()
            if name.removesuffix(".weight") not in plain
            and (name not in before or before[name].shape != tensor.shape)
        ]
        if wrong:
            raise ValueError(
                f"The adapter was trained on a model of another shape: {len(wrong)} of "
                f"{len(lora.trained)} tensors do not fit, the first is {wrong[0]}."
            )
        self.warnings += lora.warnings
        return plain

    def add_placeholder(self) -> int:
        """Gives the vocabulary a row for the placeholder, and more up to a multiple of 64.

        llava-hf's own conversions do the same. transformers needs the row, although no one reads
        it; the new rows are the mean of the old ones, whose logit is never the largest.
        """
        rows = self.tensors[f"{EMBEDDINGS}weight"].shape[0]
        padded = -(-(rows + 2) // 64) * 64

        def pad(weight: mx.array) -> mx.array:
            # Not all at once: in float32, a 7B model's takes half a GB.
            parts = mx.split(weight, [*range(4096, rows, 4096)])
            sums = [part.astype(mx.float32).sum(axis=0, keepdims=True) for part in parts]
            mean = (reduce(mx.add, sums) / rows).astype(weight.dtype)
            new = mx.broadcast_to(mean, (padded - rows, weight.shape[1]))
            return mx.concatenate([weight, new])

        for name in (f"{EMBEDDINGS}weight", f"{LM_HEAD}weight"):
            if name in self.tensors:
                self.tensors[name] = self.tensors[name].then(pad)
        return padded


def preprocessing(mode: str, side: int, is_siglip: bool = False) -> dict[str, Any]:
    """The preprocessor_config.json of a tower with tiles of `side` pixels, for ``crop`` and so on.

    SigLIP's images are squashed, and its colours others.
    """
    crop, square = "Siglip" if is_siglip else "CLIP", {"height": side, "width": side}
    settings = {
        "image_processor_type": f"{_PROCESSORS.get(mode, crop)}ImageProcessor",
        "do_pad": mode != "crop",
        "size": square if is_siglip else {"shortest_edge": side},
        "crop_size": square,
    }
    return {**settings, "image_mean": HALF, "image_std": HALF} if is_siglip else settings


def _same(one: Mapping[str, LazyTensor], other: Mapping[str, LazyTensor]) -> bool:
    return one.keys() == other.keys() and all(
        mx.array_equal(one[key].read(), other[key].read()).item() for key in one
    )
