"""Figures of one head of the decoder's attention. Needs ``pip install 'mlx_llava[plot]'``.

Queries are blue, keys orange and values green, in shades that colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mlx_llava.analysis.attribution import Explanation
from mlx_llava.analysis.boxes import heat_map
from mlx_llava.analysis.heads import Head
from mlx_llava.analysis.panels import SMALL, Drawing, plain
from mlx_llava.analysis.trace import Array

#: A patch whose score is lower by this than the best gets less than a hundredth of its weight.
FAINT = 4.6
SEEKS, PALE_SEEKS, DARK_MARKS = "#0072B2", "#9DC3DF", "#A86F00"
GIVES, DARK_GIVES = "#009E73", "#00664A"


def plot_lights(
    explanation: Explanation,
    head: Head,
    word: int,
    given: Sequence[str],
    picture: int = 0,
    most: int = 9,
) -> Drawing:
    """What a head seeks for one word, what marks the patches it finds, and what these give it.

    Args:
        explanation (Explanation): What `explain` gave.
        head (Head): The head.
        word (int): Which word of the answer.
        given (list of str): What each feature of the picture gives, in a word; see `given_words`.
        picture (int): Which of the pictures.
        most (int): Words are drawn for so many patches at most, those with the most weight.
    """
    figure = Figure(figsize=(12, 4.1), dpi=80, layout="constrained")
    seeks, marks, gives = figure.subplots(1, 3, width_ratios=[0.8, 1.15, 1.15])
    image, boxes = explanation.images[picture], explanation.boxes[picture]
    query = int(explanation.trace.queries[word])
    scores = head.scores(query)[explanation.positions[picture]]
    _draw_seekers(seeks, explanation, head, word)
    for axes in (marks, gives):
        axes.set(xticks=[], yticks=[])
    extent = (0, image.width, image.height, 0)
    marks.imshow(image.convert("L"), "gray", extent=extent)
    size = (image.height, image.width)
    area = heat_map(np.ones_like(scores), boxes, size)
    heat = heat_map(scores, boxes, size) / np.maximum(area, 1e-12)
    shown = marks.imshow(heat, "Oranges", extent=extent, alpha=0.75, interpolation="nearest")
    bar = figure.colorbar(shown, ax=marks, fraction=0.05, pad=0.02)
    bar.set_label(r"score $q \cdot k / \sqrt{d}$", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    marks.set_title("k: what marks each patch,\nlit by that query", fontsize=10, color=DARK_MARKS)
    gives.imshow(image, extent=extent, alpha=0.35)
    lit = np.where(np.isnan(boxes[:, 0]), -np.inf, scores)
    for feature in np.argsort(-lit)[:most]:
        if lit[feature] > lit.max() - FAINT:
            (x, y), text = (boxes[feature, :2] + boxes[feature, 2:]) / 2, given[feature].strip()
            style = {"fontsize": SMALL, "color": DARK_GIVES, "ha": "center", "va": "center"}
            gives.text(x, y, plain(text).replace(" ", "\n"), **style)
    gives.set_title(
        "v: what each lit patch gives,\nas the word it makes likelier", fontsize=10, color=GIVES
    )
    return figure


def _draw_seekers(axes: Any, explanation: Explanation, head: Head, word: int) -> None:
    """Of each word how alike its query is to one word's, of at most twelve words."""
    words = [plain(w.strip()) for w in explanation.words]
    seeks = head.seeks[explanation.trace.queries]
    seeks = seeks / np.linalg.norm(seeks, axis=1, keepdims=True)
    alike = seeks @ seeks[word]
    order = np.argsort(alike)[-12:]
    colours = [SEEKS if i == word else PALE_SEEKS for i in order]
    axes.barh(range(len(order)), alike[order], color=colours)
    axes.set_yticks(range(len(order)), [f"{words[i]} ({i + 1})" for i in order], fontsize=SMALL)
    axes.set_xlabel("cosine of the two queries", fontsize=SMALL)
    axes.set_title(f"q: what '{words[word]}' seeks,\nand who seeks alike", fontsize=10, color=SEEKS)


def plot_steps(
    head: Head, query: int, labels: Sequence[str], most: int = 6, width: int = 5
) -> Drawing:
    """softmax(q k / sqrt d) v for one token in numbers: the tokens with most weight, and the rest.

    Args:
        head (Head): The head.
        query (int): Which token looks.
        labels (list of str): What to call each token.
        most (int): Tokens with a row of their own.
        width (int): How many of a value's numbers are shown.
    """
    scores = head.scores(query)
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    top = np.argsort(-weights)[:most]
    others = np.setdiff1d(np.arange(len(weights)), top)
    values = head.values[: query + 1, :width]
    rest = weights[others] @ values[others] / max(weights[others].sum(), 1e-12)
    columns: list[tuple[str, Array, str, str]] = [
        (r"$q \cdot k$", scores[top, None] / head.scale, "Oranges", "{:.0f}"),
        (r"$/\,\sqrt{d}$", scores[top, None], "Oranges", "{:.1f}"),
        ("softmax", np.append(weights[top], weights[others].sum())[:, None], "Blues", "{:.2f}"),
        (f"times v (first {width} of {head.values.shape[1]} numbers)",
         np.concatenate([values[top], rest[None]]), "PRGn", "{:+.1f}"),
    ]  # fmt: skip
    figure = Figure(figsize=(8.6, 0.36 * (most + 2) + 0.9), dpi=80, layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=[1, 1, 1, width], sharey=True)
    names = [plain(labels[i]) for i in top] + [f"the other {len(others)}"]
    for axes, (title, numbers, colours, form) in zip(panels, columns, strict=True):
        _numbers(axes, numbers, colours, form)
        axes.set_title(title, fontsize=SMALL + 1)
        axes.set(xticks=[], ylim=(most + 1.5, -0.5))
        axes.spines[:].set_visible(False)
    result = weights @ values
    _numbers(panels[3], result[None], "PRGn", "{:+.1f}", row=most + 1)
    panels[2].text(0, most + 1, "sum:", ha="center", va="center", fontsize=SMALL, weight="bold")
    panels[0].set_yticks(range(most + 2), [*names, "what the token gets"], fontsize=SMALL)
    return figure


def _numbers(axes: Any, numbers: Array, colours: str, form: str, row: int = 0) -> None:
    """A table of numbers on colours that say how large they are."""
    largest = float(np.abs(numbers).max()) * 1.8 or 1.0  # pale, so that black letters can be read
    low = -largest if colours == "PRGn" else 0
    count, width = numbers.shape
    box = (-0.5, width - 0.5, row + count - 0.5, row - 0.5)
    axes.imshow(numbers, cmap=colours, vmin=low, vmax=largest, aspect="auto", extent=box)
    for (i, j), number in np.ndenumerate(numbers):
        axes.text(j, row + i, form.format(number), ha="center", va="center", fontsize=SMALL)
