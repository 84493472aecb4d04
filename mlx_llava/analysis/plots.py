"""Figures of what `explain` found, and of training. Needs ``pip install 'mlx_llava[plot]'``.

Colours are matplotlib's viridis and PuOr, which colour-blind readers can tell apart.
An `explanation` is what `explain` gave, `picture` the index of one of its pictures, `words` are
indices of words of the answer and `layers` of layers; without these it is all of them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from matplotlib.ticker import LogFormatter
from PIL import Image

from mlx_llava.analysis.attribution import Explanation, MaskEffect
from mlx_llava.analysis.boxes import LONGEST, Array, paint
from mlx_llava.model.llava import Llava

#: A figure of matplotlib, or a part of one.
Drawing: TypeAlias = Any
#: Inches of one panel.
PANEL = 1.55
#: Panels in a row.
COLUMNS = 6
#: What the colours of attention mean.
SHARE = "attention per 1 % of area"


def _new(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=80, layout="constrained")


def _panels(count: int, columns: int, figure: Drawing) -> tuple[Drawing, list[Any]]:
    """A figure and so many axes in it, without ticks."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = figure or _new(columns * PANEL, rows * (PANEL + 0.15))
    grid = {"squeeze": False, "subplot_kw": {"xticks": [], "yticks": []}}
    axes = figure.subplots(rows, columns, **grid).flatten()
    for one in axes[count:]:
        one.remove()
    return figure, list(axes[:count])


def _small(image: Image.Image) -> Image.Image:
    """A picture as large as it is drawn; photographs of many megapixels would take long."""
    copy = image.copy()
    copy.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX)
    return copy


def plain(text: str) -> str:
    """Text in which matplotlib finds no mathematics."""
    return text.replace("$", r"\$")


def _label(word: str) -> str:
    """A word as a title, with what cannot be seen spelt out."""
    word = word.strip() or word
    return plain(word) if word.isprintable() and word.strip() else plain(repr(word))


def plot_pictures(
    images: Sequence[Image.Image],
    titles: Sequence[str] = (),
    columns: int = COLUMNS,
    figure: Drawing = None,
) -> Drawing:
    """Pictures side by side, each with its title above it, so many columns in a row.

    Like all of these functions it draws into `figure`, a figure of matplotlib's or a part of one,
    or into a new one where there is none, and returns it.
    """
    figure, axes = _panels(len(images), columns, figure)
    for one, image, title in zip(axes, images, titles or [""] * len(images), strict=True):
        one.imshow(_small(image))
        one.set_title(title, fontsize=9)
    return figure


def plot_maps(
    image: Image.Image,
    maps: Sequence[Array],
    titles: Sequence[str],
    label: str,
    columns: int = COLUMNS,
    figure: Drawing = None,
) -> Drawing:
    """Maps, (height, width) in a picture's proportions, over it; `label` says what colours mean."""
    figure, axes = _panels(len(maps), columns, figure)
    largest = max(float(np.abs(one).max()) for one in maps) or 1.0
    is_signed = any(float(one.min()) < 0 for one in maps)
    colours = {"cmap": "PuOr" if is_signed else "viridis", "vmin": -largest * is_signed}
    extent = (0, image.width, image.height, 0)
    grey = _small(image).convert("L")
    for one, heat, title in zip(axes, maps, titles, strict=True):
        one.imshow(grey, cmap="gray", extent=extent)
        style = {"alpha": 0.7, "interpolation": "nearest", "vmax": largest, **colours}
        shown = one.imshow(heat, extent=extent, **style)
        one.set_title(title, fontsize=9)
    bar = figure.colorbar(shown, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return figure


def _density(explanation: Explanation, picture: int, values: Array) -> Array:
    """A map of how much of what the features got, (F,), is on 1 % of the picture's area."""
    heat = explanation.on_picture(values, picture)
    return heat * heat.size / 100


def _plot_words(
    explanation: Explanation,
    picture: int,
    words: Sequence[int] | None,
    draw: Callable[[Array], Array],
    values: Array,
    label: str,
    figure: Drawing,
) -> Drawing:
    """A map for each word, drawn of its values, (G, values)."""
    chosen = range(len(explanation.words)) if words is None else words
    titles = [_label(explanation.words[word]) for word in chosen]
    maps = [draw(values[word]) for word in chosen]
    return plot_maps(explanation.images[picture], maps, titles, label, figure=figure)


def plot_attention(
    explanation: Explanation,
    picture: int = 0,
    words: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    figure: Drawing = None,
) -> Drawing:
    """Where each word looked in a picture, by the mean head of the mean layer."""
    attention = explanation.attention(picture)
    chosen = attention if layers is None else attention[list(layers)]
    draw, mean = partial(_density, explanation, picture), chosen.mean(axis=(0, 1))
    return _plot_words(explanation, picture, words, draw, mean, SHARE, figure)


def plot_rollout(
    explanation: Explanation,
    picture: int = 0,
    words: Sequence[int] | None = None,
    figure: Drawing = None,
) -> Drawing:
    """How much of each part of a picture came to each word through all layers."""
    draw, rollout = partial(_density, explanation, picture), explanation.rollout(picture)
    return _plot_words(explanation, picture, words, draw, rollout, SHARE, figure)


def plot_heads(
    explanation: Explanation,
    word: int,
    picture: int = 0,
    layers: Sequence[int] | None = None,
    figure: Drawing = None,
) -> Drawing:
    """Where every head looked in a picture for one word."""
    attention = explanation.attention(picture)[:, :, word]
    columns = attention.shape[1]
    chosen = range(len(attention)) if layers is None else layers
    heads = [(layer, head) for layer in chosen for head in range(columns)]
    maps = [_density(explanation, picture, attention[head]) for head in heads]
    titles = [f"layer {layer + 1}, head {head + 1}" for layer, head in heads]
    return plot_maps(explanation.images[picture], maps, titles, SHARE, columns, figure)


def plot_mask_effect(
    explanation: Explanation,
    effect: MaskEffect,
    picture: int = 0,
    words: Sequence[int] | None = None,
    figure: Drawing = None,
) -> Drawing:
    """What each word loses when a part of a picture is masked."""
    image = explanation.images[picture]
    draw = partial(paint, boxes=effect.boxes, size=(image.height, image.width))
    label = "fall of log-probability (nats)"
    return _plot_words(explanation, picture, words, draw, effect.drops.T, label, figure)


def plot_lens(
    words: Sequence[Sequence[str]],
    probabilities: Array,
    titles: Sequence[str],
    figure: Drawing = None,
) -> Drawing:
    """The likeliest words and their probabilities, (layers + 1, Q), with titles of positions."""
    layers, positions = probabilities.shape
    figure = figure or _new(0.62 * positions + 1.8, 0.3 * layers + 1.0)
    axes = figure.subplots()
    shown = axes.imshow(probabilities, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for layer, position in np.ndindex(layers, positions):
        colour = "black" if probabilities[layer, position] > 0.6 else "white"
        text = _label(words[layer][position])
        axes.text(position, layer, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(layers), ["embedding", *(f"layer {i}" for i in range(1, layers))])
    axes.set_xticks(range(positions), [_label(title) for title in titles], rotation=60)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("the word that came", fontsize=8)
    bar = figure.colorbar(shown, fraction=0.04, pad=0.02)
    bar.set_label("probability", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def plot_nearest_words(
    explanation: Explanation,
    words: Sequence[str],
    picture: int = 0,
    figure: Drawing = None,
) -> Drawing:
    """Of words of features, (F,), those of a picture's first tile, each on its patch."""
    image = explanation.images[picture]
    figure = figure or _new(5, 5 * image.height / image.width)
    axes = figure.subplots()
    extent = (0, image.width, image.height, 0)
    axes.imshow(_small(image), alpha=0.35, extent=extent)
    boxes = explanation.boxes[picture]
    first = np.flatnonzero(~np.isnan(boxes[:, 0]))[: explanation.tile_patches]
    size = 7 if len(first) < 100 else 3.5
    for feature in first:
        left, top, right, bottom = boxes[feature]
        x, y = (left + right) / 2, (top + bottom) / 2
        axes.text(x, y, _label(words[feature]), ha="center", va="center", size=size, clip_on=True)
    axes.set(xticks=[], yticks=[])
    return figure


def plot_shares(shares: Mapping[str, Array], chance: float, figure: Drawing = None) -> Drawing:
    """How much of the attention to a picture is on something, layer by layer.

    Args:
        shares: Of each kind of thing, (examples, layers).
        chance (float): What even attention would give.
        figure (optional): Where to draw.
    """
    figure = figure or _new(6, 2.6)
    axes = figure.subplots()
    width = 0.8 / len(shares)
    for i, (name, values) in enumerate(shares.items()):
        layers = np.arange(1, values.shape[1] + 1)
        left = layers + (i - (len(shares) - 1) / 2) * width
        axes.bar(left, values.mean(axis=0), width, label=name)
    axes.axhline(chance, color="black", linestyle="--", linewidth=1, label="chance")
    axes.set(xticks=layers, xlabel="layer", ylabel="share of attention")
    axes.legend(fontsize=8)
    return figure


def plot_flow(model: Llava, explanation: Explanation, figure: Drawing = None) -> Drawing:
    """The way from one picture and a question to an answer, in the arrays of one run.

    A row is a token, in units of its own length; a column is one of its numbers. The letters are
    those of Liu et al. 2023 (arXiv:2304.08485), figure 1.
    """
    if figure is None:
        figure = _new(9.6, 4)
        figure.get_layout_engine().set(w_pad=0.14)
    trace, layer = explanation.trace, model.config.feature_layers[-1]
    tower = "SigLIP" if model.config.vision_config.is_siglip else "CLIP"
    embedded = trace.hidden_states[0][: trace.queries[0] + 1]
    words = np.delete(embedded, explanation.positions[0], axis=0)
    panels = {
        "X_v": (explanation.inputs.tiles()[0], "$X_v$: the picture"),
        "Z_v": (
            trace.vision_states[layer, 0, model.config.drops_first :],
            f"$Z_v = g(X_v)$: {tower}",
        ),
        "H_v": (trace.image_features[0], "$H_v = W Z_v$: projector"),
        "H_q": (words, "$H_q$: the embedded words"),
        "all": (embedded, "$H_q$ around $H_v$"),
    }
    axes = figure.subplot_mosaic(
        [["X_v", "Z_v", "H_v", "all", "X_a"], [".", ".", "H_q", "all", "X_a"]],
        width_ratios=[1, 1.2, 1.2, 1.2, 1],
    )
    for name, (content, title) in panels.items():
        axes[name].set_title(title, fontsize=9)
        axes[name].set(xticks=[], yticks=[])
        axes[name].set_xlabel(_show(axes[name], content), fontsize=8)
    axes["X_a"].set_title("$X_a$: the answer", fontsize=9)
    axes["X_a"].axis("off")
    text = "\n".join(textwrap.wrap(plain(explanation.answer), 18))
    axes["X_a"].text(0.5, 0.5, text, ha="center", va="center", fontsize=9)
    arrows = {("H_v", "all"): 0.76, ("H_q", "all"): 0.24}  # where they end; others in the middle
    for start, end in (("X_v", "Z_v"), ("Z_v", "H_v"), *arrows, ("all", "X_a")):
        figure.add_artist(_arrow(axes[start], axes[end], arrows.get((start, end), 0.5)))
    return figure


def _show(axes: Any, content: Image.Image | Array) -> str:
    """Draws a picture, or the rows of an array; returns its size."""
    if isinstance(content, Image.Image):
        axes.imshow(content)
        return f"{content.height} x {content.width} x 3"
    scaled = content / np.maximum(content.std(axis=1, keepdims=True), 1e-12)
    axes.imshow(scaled, aspect="auto", cmap="viridis", vmin=-2, vmax=2)
    return f"{content.shape[0]} x {content.shape[1]}"


def _arrow(start: Any, end: Any, height: float) -> ConnectionPatch:
    return ConnectionPatch(
        (1.02, 0.5),
        (-0.02, height),
        coordsA="axes fraction",
        coordsB="axes fraction",
        axesA=start,
        axesB=end,
        arrowstyle="-|>",
        mutation_scale=14,
    )


class _PlainNumbers(LogFormatter):
    """A logarithmic axis with 0.6 instead of 6 x 10^-1."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.3g}" if super().__call__(x, pos) else ""


def plot_losses(reports: Sequence[Mapping[str, float]], figure: Drawing = None) -> Drawing:
    """Training and validation loss of what metrics.jsonl holds, on a logarithmic scale."""
    figure = figure or Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (
        ("loss", "training", {"linewidth": 1.2}),
        ("valid_loss", "validation", {"marker": "o", "linestyle": "--"}),
    ):
        points = [(report["step"], report[key]) for report in reports if key in report]
        if points:
            seen = {"marker": "o"} if len(points) < 3 else {}
            axes.plot(*zip(*points, strict=True), label=label, **{**style, **seen})
    axes.set(yscale="log", xlabel="step", ylabel="loss (nats per token)")
    for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        each(_PlainNumbers(minor_thresholds=(2, 0.5)))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
