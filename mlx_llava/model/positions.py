"""Where tokens stand when images before them are shown in part.

Every token keeps the position that it has where images are whole: without, grounding is lost
(arXiv:2506.21873). T stored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int32]


class Part(NamedTuple):
    """What is shown of an image.

    Attributes:
        start: the index of its first token in the prompt.
        kept: which of its features are shown, ascending.
        total: how many there are.
    """

    start: int
    kept: Ids
    total: int


@dataclass(frozen=True, eq=False)
class Positions:
    """Those of the tokens of one sequence.

    Attributes:
        parts: of its images that are shown in part, in reading order.
    """

    parts: tuple[Part, ...] = ()

    def of(self, stop: int) -> Ids:
        """Those of the first tokens, (stop,)."""
        positions = np.arange(stop, dtype=np.int32)
        for start, kept, total in self.parts:
            if start < stop:
                end = start + len(kept)
                positions[start:end] = positions[start] + kept[: stop - start]
                positions[end:] += total - len(kept)
        return positions

    def jumping(self, stop: int) -> Ids | None:
        """Those of the first tokens, (1, stop), or None where they are in order."""
        return self.of(stop)[None] if self.parts else None

    def upto(self, length: int) -> Positions:
        """Those of the first tokens, which end within no image, and of others after them."""
        return Positions(tuple(part for part in self.parts if part.start < length))


IN_ORDER = Positions()


def positions_of(cache: Any) -> Positions:
    """Those of what a layer's cache stores, of whatever kind it is."""
    return getattr(cache, "positions", IN_ORDER)
