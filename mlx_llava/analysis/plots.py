"""Figures of what `explain` found, and of training. Needs ``pip install 'mlx_llava[plot]'``.

Colours are matplotlib's viridis and PuOr, which colour-blind readers can tell apart.
An `explanation` is what `explain` gave, `picture` the index of one of its pictures, `words` are
indices of words of the answer and `layers` of layers; without these it is all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image

from mlx_llava.analysis.attribution import Explanation, MaskEffect, folded
from mlx_llava.analysis.boxes import Array, paint
from mlx_llava.analysis.panels import SMALL, Drawing, new_figure, panels, plain, thumbnail, title_of

#: Panels in a row.
COLUMNS = 6
#: What the colours of attention mean.
SHARE = "attention per 1 % of area"
#: Where the scale of masking ends at least, in nats, so that no effect looks like none.
LEAST_DROP = 0.1


def headline(figure: Drawing, finding: str) -> Drawing:
    """A figure with one sentence above it that says what there is to see in it."""
    lines = finding.count("\n") + 1
    figure.set_figheight(figure.get_figheight() + 0.22 * lines + 0.1)
    figure.suptitle(plain(finding), fontsize=11, fontweight="bold")
    return figure


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
    figure, axes = panels(len(images), columns, figure)
    for one, image, title in zip(axes, images, titles or [""] * len(images), strict=True):
        one.imshow(thumbnail(image))
        one.set_title(title, fontsize=SMALL)
    return figure


def plot_maps(
    image: Image.Image,
    maps: Sequence[Array],
    titles: Sequence[str],
    label: str,
    columns: int = COLUMNS,
    figure: Drawing = None,
    largest: float | None = None,
) -> Drawing:
    """Maps, (height, width) in a picture's proportions, over it; `label` says what colours mean.

    Where a map is NaN, the picture stays as it is. All have one scale, that ends at `largest`, or
    at the largest value.
    """
    figure, axes = panels(len(maps), columns, figure)
    largest = largest or max(float(np.nanmax(np.abs(one))) for one in maps) or 1.0
    is_signed = any(float(np.nanmin(one)) < 0 for one in maps)
    colours = {"cmap": "PuOr" if is_signed else "viridis", "vmin": -largest * is_signed}
    extent = (0, image.width, image.height, 0)
    grey = thumbnail(image).convert("L")
    for one, heat, title in zip(axes, maps, titles, strict=True):
        one.imshow(grey, cmap="gray", extent=extent)
        style = {"alpha": 0.7, "interpolation": "nearest", "vmax": largest, **colours}
        shown = one.imshow(heat, extent=extent, **style)
        one.set_title(title, fontsize=SMALL)
    bar = figure.colorbar(shown, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def _density(explanation: Explanation, picture: int, values: Array) -> Array:
    """A map of how much of what the features got, (F,), is on 1 % of the picture's area.

    NaN where the model has not looked, as outside of the square that is cut out.
    """
    heat = explanation.on_picture(values, picture)
    was_read = explanation.on_picture(np.ones_like(values), picture) > 0
    return np.where(was_read, heat * heat.size / 100, np.nan)


def _plot_words(
    explanation: Explanation,
    picture: int,
    words: Sequence[int] | None,
    draw: Callable[[Array], Array],
    values: Array,
    label: str,
    figure: Drawing,
    largest: float | None = None,
) -> Drawing:
    """A map for each word, or each run of one, drawn of its values, (G, values)."""
    if words is None:
        chosen = folded(explanation.words)
    else:
        chosen = {word: explanation.words[word] for word in words}
    maps, titles = [draw(values[word]) for word in chosen], [*map(title_of, chosen.values())]
    image = explanation.images[picture]
    return plot_maps(image, maps, titles, label, figure=figure, largest=largest)


def plot_overview(explanation: Explanation, figure: Drawing = None) -> Drawing:
    """Each picture, and where all of the answer looked in it: words', layers' and heads' mean."""
    count = len(explanation.images)
    figure = figure or new_figure(6.4, 2.6 * count)
    parts = np.array(figure.subfigures(count, 1)).flatten()
    for i, (part, image) in enumerate(zip(parts, explanation.images, strict=True)):
        left, right = part.subfigures(1, 2, width_ratios=(1, 1.2))
        plot_pictures([image], figure=left)
        mean = explanation.attention(i).mean(axis=(0, 1, 2))
        plot_maps(image, [_density(explanation, i, mean)], [""], SHARE, figure=right)
    return figure


def largest_share(explanation: Explanation) -> float:
    """Where one scale for all words' attention and rollout in all pictures ends."""
    shares = [
        float(np.nanmax(_density(explanation, i, values[word])))
        for i in range(len(explanation.images))
        for values in (explanation.attention(i).mean(axis=(0, 1)), explanation.rollout(i))
        for word in folded(explanation.words)
    ]
    return max(shares, default=0.0)


def plot_attention(
    explanation: Explanation,
    picture: int = 0,
    words: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    figure: Drawing = None,
    largest: float | None = None,
) -> Drawing:
    """Where each word looked in a picture, by the mean head of the mean layer."""
    attention = explanation.attention(picture)
    chosen = attention if layers is None else attention[list(layers)]
    draw, mean = partial(_density, explanation, picture), chosen.mean(axis=(0, 1))
    return _plot_words(explanation, picture, words, draw, mean, SHARE, figure, largest)


def plot_rollout(
    explanation: Explanation,
    picture: int = 0,
    words: Sequence[int] | None = None,
    figure: Drawing = None,
    largest: float | None = None,
) -> Drawing:
    """How much of each part of a picture came to each word through all layers."""
    draw, rollout = partial(_density, explanation, picture), explanation.rollout(picture)
    return _plot_words(explanation, picture, words, draw, rollout, SHARE, figure, largest)


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
    """What each word loses when a part of a picture is masked; see `LEAST_DROP`."""
    image = explanation.images[picture]
    draw = partial(paint, boxes=effect.boxes, size=(image.height, image.width))
    drops, label = effect.drops.T, "fall of log-probability (nats)"
    shown = drops if words is None else drops[[*words]]
    largest = max(LEAST_DROP, float(np.abs(shown).max(initial=0)))
    return _plot_words(explanation, picture, words, draw, drops, label, figure, largest)


def plot_lens(
    words: Sequence[Sequence[str]],
    probabilities: Array,
    titles: Sequence[str],
    figure: Drawing = None,
) -> Drawing:
    """The likeliest words and their probabilities, (layers + 1, Q), with titles of positions."""
    layers, positions = probabilities.shape
    figure = figure or new_figure(0.75 * positions + 1.8, 0.32 * layers + 1.2)
    axes = figure.subplots()
    shown = axes.imshow(probabilities, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for layer, position in np.ndindex(layers, positions):
        colour = "black" if probabilities[layer, position] > 0.6 else "white"
        text = title_of(words[layer][position])
        axes.text(position, layer, text, ha="center", va="center", fontsize=SMALL, color=colour)
    axes.set_yticks(range(layers), ["embedding", *(f"layer {i}" for i in range(1, layers))])
    axes.set_xticks(range(positions), [title_of(title) for title in titles], rotation=60)
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("the word that came", fontsize=SMALL)
    bar = figure.colorbar(shown, fraction=0.04, pad=0.02)
    bar.set_label("probability", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def plot_nearest_words(
    explanation: Explanation,
    words: Sequence[str],
    picture: int = 0,
    figure: Drawing = None,
) -> Drawing:
    """Of words of features, (F,), those of a picture's first tile, each on its patch."""
    image = explanation.images[picture]
    boxes = explanation.boxes[picture]
    first = np.flatnonzero(~np.isnan(boxes[:, 0]))[: explanation.tile_patches]
    side = max(5, 0.6 * len(first) ** 0.5)  # room for the letters
    figure = figure or new_figure(side, side * image.height / image.width)
    axes = figure.subplots()
    extent = (0, image.width, image.height, 0)
    axes.imshow(thumbnail(image), alpha=0.35, extent=extent)
    for feature in first:
        left, top, right, bottom = boxes[feature]
        x, y = (left + right) / 2, (top + bottom) / 2
        text = title_of(words[feature])
        axes.text(x, y, text, ha="center", va="center", size=SMALL, clip_on=True)
    axes.set(xticks=[], yticks=[])
    return figure


def plot_shares(shares: Mapping[str, Array], chance: float, figure: Drawing = None) -> Drawing:
    """How much of the attention to a picture is on something, layer by layer.

    Args:
        shares: Of each kind of thing, (examples, layers).
        chance (float): What even attention would give.
        figure (optional): Where to draw.
    """
    figure = figure or new_figure(6, 2.6)
    axes = figure.subplots()
    width = 0.8 / len(shares)
    for i, (name, values) in enumerate(shares.items()):
        layers = np.arange(1, values.shape[1] + 1)
        left = layers + (i - (len(shares) - 1) / 2) * width
        axes.bar(left, values.mean(axis=0), width, label=name)
    axes.axhline(chance, color="black", linestyle="--", linewidth=1, label="chance")
    axes.set(xticks=layers, xlabel="layer", ylabel="share of attention")
    axes.legend(fontsize=SMALL)
    return figure


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
