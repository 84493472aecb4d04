"""The whole way of a LLaVA as one picture. Needs ``pip install 'mlx_llava[plot]'``."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import numpy as np
from matplotlib.patches import ConnectionPatch
from PIL import Image

from mlx_llava.analysis.attribution import Explanation
from mlx_llava.analysis.boxes import Array
from mlx_llava.analysis.panels import SMALL, Drawing, new_figure, plain
from mlx_llava.model.llava import Llava

#: Numbers of a token that are drawn of it.
COLUMNS_SHOWN = 32


def plot_flow(model: Llava, explanation: Explanation, figure: Drawing = None) -> Drawing:
    """The way from one picture and a question to an answer, in the arrays of one run.

    A row is a token, a column one of its numbers: those that differ most between tokens, in each
    array others, each as it differs from the others of its column; beside a patch stands its own
    colour. The letters
    are H for what is encoded and Z for what W makes of it; Liu et al. 2023 (arXiv:2304.08485),
    figure 1, has the two the other way round.
    """
    if figure is None:
        figure = new_figure(11, 4.8)
        figure.get_layout_engine().set(w_pad=0.12)
    trace, config = explanation.trace, model.config
    tower = "SigLIP" if config.vision_config.is_siglip else "CLIP"
    embedded = trace.hidden_states[0][: trace.queries[0] + 1]
    is_patch = np.isin(np.arange(len(embedded)), explanation.positions[0])
    tile = explanation.inputs.tiles()[0]
    axes = figure.subplot_mosaic(
        [["X_v", "H_v", "Z_v", "all", "f", "X_a"], ["X_q", "H_q", "H_q", "all", "f", "X_a"]],
        width_ratios=[1, 1.2, 1.2, 1.2, 0.8, 1],
        height_ratios=[2, 1],
    )
    seen = trace.vision_states[config.feature_layers[-1], 0, config.drops_first :]
    small = tile.resize((config.vision_config.patches_per_side,) * 2, Image.Resampling.BOX)
    colours = np.asarray(small).reshape(-1, 3)
    axes["X_v"].imshow(tile)
    _rows(axes["H_v"], seen, colours)
    _rows(axes["Z_v"], trace.image_features[0], colours)
    _rows(axes["H_q"], embedded[~is_patch])
    marks = np.full((len(embedded), 3), 255)
    marks[is_patch] = np.resize(colours, (is_patch.sum(), 3))
    lengths = np.linalg.norm(embedded, axis=1, keepdims=True)  # which the decoder norms first
    shown = _rows(axes["all"], embedded / np.maximum(lengths, 1e-12), marks)
    layers = f"{config.text_config.num_hidden_layers} layers\nof attention"
    spoken = re.sub(r"<[^>]*>", " ", re.split("<image[^>]*>", explanation.inputs.prompts[0])[-1])
    texts = {"X_q": textwrap.shorten(spoken, 90), "X_a": explanation.answer}
    for name, text in {**texts, "f": f"the decoder\n\n{layers}"}.items():
        wrapped = "\n".join(textwrap.fill(line, 15) for line in plain(text.strip()).split("\n"))
        axes[name].text(0.5, 0.5, wrapped, ha="center", va="center", fontsize=SMALL)
    for name, title in {
        "X_v": "$X_v$: the picture",
        "X_q": "$X_q$: the question",
        "H_v": f"$H_v = g(X_v)$: {tower}",
        "Z_v": "$Z_v = W H_v$: projector",
        "H_q": "$H_q$: the question's words, embedded",
        "all": "$Z_v$ among $H_q$",
        "f": "$f$",
        "X_a": "$X_a = f(Z_v, H_q)$: the answer",
    }.items():
        axes[name].set_title(title, fontsize=SMALL)
        axes[name].set(xticks=[], yticks=[])
    for name in ("X_q", "X_a"):
        axes[name].axis("off")
    axes["f"].set_facecolor("0.92")
    bar = figure.colorbar(shown, ax=axes["X_a"], location="bottom", ticks=[-2, 0, 2])
    bar.set_label(
        "a number against the\nothers of its column,\nin standard deviations", fontsize=SMALL
    )
    arrows = {("Z_v", "all"): 0.7, ("H_q", "all"): 0.15}  # where they end; others in the middle
    for start, end in (
        *(("X_v", "H_v"), ("H_v", "Z_v"), ("X_q", "H_q")),
        *(*arrows, ("all", "f"), ("f", "X_a")),
    ):
        figure.add_artist(_arrow(axes[start], axes[end], arrows.get((start, end), 0.5)))
    return figure


def _rows(axes: Any, rows: Array, colours: Array | None = None) -> Any:
    """Draws the columns of an array in which its rows differ most, beside each row's colour."""
    spread = rows.std(axis=0)
    most = np.argsort(-spread)[:COLUMNS_SHOWN]
    scaled = (rows - rows.mean(axis=0))[:, most] / np.maximum(spread[most], 1e-12)
    _, _, directions = np.linalg.svd(scaled, full_matrices=False)
    scaled = scaled[:, np.argsort(directions[0])]  # columns that go together stand together
    count, width = scaled.shape
    style = {"aspect": "auto", "interpolation": "nearest"}
    shown = axes.imshow(scaled, cmap="PuOr", vmin=-2, vmax=2, **style)
    if colours is not None:
        strip = (-0.12 * width - 0.5, -0.5, count - 0.5, -0.5)
        axes.imshow(np.resize(colours, (count, 1, 3)).astype(np.uint8), extent=strip, **style)
        axes.set_xlim(strip[0], width - 0.5)
    drawn = f", {width} columns drawn" if width < rows.shape[1] else ""
    axes.set_xlabel(f"{rows.shape[0]} x {rows.shape[1]}{drawn}", fontsize=SMALL)
    return shown


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
