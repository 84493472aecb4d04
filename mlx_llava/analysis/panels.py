"""What all figures are made of: panels side by side, small pictures, and texts as they are."""

from __future__ import annotations

from typing import Any, TypeAlias

from matplotlib.figure import Figure
from PIL import Image

from mlx_llava.analysis.boxes import LONGEST

#: A figure of matplotlib, or a part of one.
Drawing: TypeAlias = Any
#: Inches of one panel.
PANEL = 1.55
#: Points of the smallest letters.
SMALL = 9


def new_figure(width: float, height: float) -> Figure:
    """An empty one, of so many inches."""
    return Figure(figsize=(width, height), dpi=80, layout="constrained")


def panels(count: int, columns: int, figure: Drawing) -> tuple[Drawing, list[Any]]:
    """A figure and so many axes in it, without ticks."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = figure or new_figure(columns * PANEL, rows * (PANEL + 0.15))
    grid = {"squeeze": False, "subplot_kw": {"xticks": [], "yticks": []}}
    axes = figure.subplots(rows, columns, **grid).flatten()
    for one in axes[count:]:
        one.remove()
    return figure, list(axes[:count])


def thumbnail(image: Image.Image) -> Image.Image:
    """A picture as large as it is drawn; photographs of many megapixels would take long."""
    copy = image.copy()
    copy.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX)
    return copy


def plain(text: str) -> str:
    """Text in which matplotlib finds no mathematics."""
    return text.replace("$", r"\$")


def title_of(word: str) -> str:
    """A word as a title, with what cannot be seen spelt out."""
    word = word.strip() or word
    return plain(word) if word.isprintable() and word.strip() else plain(repr(word))
