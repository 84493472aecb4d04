"""Values that config files write in several ways."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from mlx_llava.model.config_checks import refuse_value


def read_placeholders(data: Mapping[str, Any]) -> dict[str, int]:
    """The ids of placeholders, under their old or their new names, if there are any."""
    found: dict[str, int] = {}
    for what in ("image", "video"):
        given = {data[k] for k in (f"{what}_token_index", f"{what}_token_id") if data.get(k)}
        if len(given) > 1:
            raise ValueError(f"config.json gives the {what} token two ids: {sorted(given)}.")
        found |= {f"{what}_token_index": int(i) for i in given}
    return found


def read_pinpoints(
    pinpoints: str | Sequence[Sequence[int]], side: int = 1
) -> tuple[tuple[int, int], ...]:
    """Reads ``image_grid_pinpoints``: pairs, the text of some, or LLaVA-NeXT's range of tiles.

    A range, ``"(1x1),...,(6x6)"``, is every grid from the first to the last of tiles with a side
    of so many pixels (mm_utils.py, process_anyres_image).
    """
    if isinstance(pinpoints, str) and "x" in pinpoints:
        grids = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if len(grids) < 2:
            raise ValueError(f"image_grid_pinpoints={pinpoints!r} is no range of grids.")
        ends = zip(grids[0], grids[-1], strict=True)
        heights, widths = (range(a * side, b * side + 1, side) for a, b in ends)
        return tuple(product(heights, widths))
    try:
        pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"image_grid_pinpoints={pinpoints!r} is no list of pairs.") from error
    return tuple((int(height), int(width)) for height, width in pairs)


def read_ends(ids: object, where: str) -> tuple[int, ...]:
    """Reads an ``eos_token_id``: one id, several, or null."""
    ends = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(end) is int for end in ends):
        refuse_value(where, "eos_token_id", ids, "an id or a list of ids")
    return tuple(ends)
