"""How objects show themselves in Jupyter: pieces of HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mlx_llava.inputs.image import data_url, png

#: The longer side of an image that is shown, in pixels.
SIDE = 192


def pictures(images: Sequence[Image.Image]) -> str:
    """Images in a row, made small enough for it."""
    shown = []
    for image in images:
        small = image.copy()
        small.thumbnail((SIDE, SIDE))
        shown.append(f'<img alt="" src="{data_url(png(small))}">')
    return f"<div>{' '.join(shown)}</div>" if shown else ""


def texts(lines: Sequence[str]) -> str:
    """Texts as they are, each in a paragraph."""
    style = "white-space: pre-wrap; text-align: left"
    return "".join(f'<p style="{style}">{html.escape(line)}</p>' for line in lines)


def table(rows: Mapping[str, Any]) -> str:
    """Names and values."""
    cells = (
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"
