"""One published LLaVA: its config.json with its published sizes, and what must come of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Settings = dict[str, Any]

#: Where settings are known from: files as they are published, which the test data have
#: (tests/conftest.py); or what people who work with the checkpoint know, where keys that no one
#: reads may differ. Others are quoted in public repositories and issues, which rows name.
FILES = "published files"
KNOWLEDGE = "knowledge"


@dataclass(frozen=True, eq=False)
class Published:
    """A named checkpoint.

    Attributes:
        name: its repository.
        source: how its settings are known.
        config: its config.json.
        layout: a way to write it, see `tests.certificate.WRITERS`.
        container: how its tensors are stored: ``safetensors``, ``zip`` for PyTorch's files, or
            the type of a GGUF's matrices.
        vocabulary: whose tokenizer it has: ``llama``, ``yi``, ``llama3``, ``phi3``, ``qwen2``.
            ``LLaMA`` is the real one, where it is at hand; ``small`` has a few hundred pieces.
        chat_template: its own Jinja template, where it has one.
        added_tokens: its added_tokens.json.
        tokenizer_config: what else its tokenizer_config.json says.
        quantization: MLX's bits, or the content of quantize_config.json.
        template: what must be chosen, ``own`` for Jinja.
        ends: the ids that must end an answer.
        mode: how pictures must be cut.
        tokens: how many a picture of 300 x 200 must take.
        layer: which of the tower's hidden states must be read.
        real: the folder of its files in the test data, or the dump of transformers that has it.
    """

    name: str
    source: str
    config: Settings
    layout: str
    container: str = "safetensors"
    vocabulary: str = "llama"
    chat_template: str | None = None
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    tokenizer_config: Settings = field(default_factory=dict)
    quantization: Settings = field(default_factory=dict)
    template: str = "vicuna_v1"
    ends: tuple[int, ...] = (2,)
    mode: str = "pad"
    tokens: int = 576
    layer: int | tuple[int, ...] = -2
    real: str = ""

    def read_published(self, folder: Path) -> Settings:
        """The config.json in the published files below a folder."""
        kind, _, version = self.real.partition("/")
        if kind != "dumps":
            settings: Settings = json.loads((folder / self.real / "config.json").read_text())
            return settings
        dumps = json.loads((folder / "dumps" / f"transformers-{version}.json").read_text())
        return dict(dumps[f"{self.name}|save_pretrained {version}"])


CLIP_336: Settings = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES_13B: Settings = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
