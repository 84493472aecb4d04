"""What published LLaVAs say about themselves, key for key, and how they are to be read."""

from __future__ import annotations

from tests.published.converted import GGUF, QUANTISED_HF, QUANTISED_ORIGINAL
from tests.published.family import FAMILY
from tests.published.llava_hf import HF
from tests.published.onevision import ONEVISION
from tests.published.original import ORIGINAL
from tests.published.row import Published

ROWS: tuple[Published, ...] = (
    *(*HF, *FAMILY, *ONEVISION, *QUANTISED_HF),
    *(*ORIGINAL, *QUANTISED_ORIGINAL, *GGUF),
)
