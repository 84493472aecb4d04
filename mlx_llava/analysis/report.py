"""An explanation as one picture or one page, for people without Jupyter."""

from __future__ import annotations

import html
import io
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlx_llava.analysis.attribution import Explanation, folded, logit_lens, mask_effect
from mlx_llava.files import own_file
from mlx_llava.inputs.image import data_url
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.llava import Llava

#: Inches.
WIDTH = 9.6
ROW = 1.7
FORMATS = (".png", ".html")
#: What reports say of themselves, so that only they are written over.
COMMAND = "mlx_llava.explain"

_OVERVIEW = "The picture, and where the answer looked in it. Grey is what the model has not read."
_ATTENTION = "Where each word looked when it was chosen; all layers, mean head."
_ROLLOUT = "What came from the picture to each word through all layers together."
_MASKING = "How much less likely each word becomes when a part of the picture is hidden."
_NO_EFFECT = "Hiding a single part changes nothing here; larger ones (--window) may."
_LENS = "The word that the model would have said if it had ended after each layer."
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="generator" content="{command}">
<style>body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }} h2 {{ margin-bottom: 0 }} p {{ margin-top: 0.2em; color: #444 }}</style>
<p>{question}</p>
<h1>{title}</h1>
{body}
</html>
"""


@dataclass(frozen=True)
class Section:
    """One figure, what it is called, and how to read it."""

    title: str
    caption: str
    height: float
    draw: Callable[..., Any]


def check_report(path: Path) -> None:
    """Raises ValueError where no report can be written, before anything is computed."""
    if path.suffix not in FORMATS:
        raise ValueError(f"The report {path} must end in {' or '.join(FORMATS)}.")
    if find_spec("matplotlib") is None:
        raise ValueError("A report needs matplotlib: pip install 'mlx_llava[plot]'.")


def sections(
    model: Llava, processor: Processor, explanation: Explanation, **mask_options: Any
) -> list[Section]:
    """What a report shows; options are those of `mask_effect`."""
    from mlx_llava.analysis import plots

    found, words = [], folded(explanation.words)
    if explanation.images:
        height = 1.6 * ROW * len(explanation.images)
        shown = partial(plots.plot_overview, explanation)
        found.append(Section("Where it looked", _OVERVIEW, height, shown))
    height = ROW * max(1.3, -(-len(words) // plots.COLUMNS))  # with room for the scale's name
    largest = plots.largest_share(explanation)
    for i, _ in enumerate(explanation.images):
        effect = mask_effect(model, processor, explanation, i, **mask_options)
        is_seen = np.abs(effect.drops).max(initial=0) > plots.LEAST_DROP
        masking = _MASKING if is_seen else f"{_MASKING} {_NO_EFFECT}"
        attention = partial(plots.plot_attention, explanation, i, largest=largest)
        rollout = partial(plots.plot_rollout, explanation, i, largest=largest)
        for title, caption, draw in (
            ("attention", _ATTENTION, attention),
            ("rollout", _ROLLOUT, rollout),
            ("masking", masking, partial(plots.plot_mask_effect, explanation, effect, i)),
        ):
            found.append(Section(f"Picture {i + 1}: {title}", caption, height, draw))
    observed = explanation.trace.hidden_states[:, explanation.trace.queries][:, [*words]]
    tokens, probabilities = logit_lens(model, observed)
    said = [[processor.tokenizer.text_of(int(i)) for i in layer] for layer in tokens[..., 0]]
    draw = partial(plots.plot_lens, said, probabilities[..., 0], [*words.values()])
    return [*found, Section("Layer by layer", _LENS, 1.2 + 0.3 * len(said), draw)]


def write_report(found: list[Section], question: str, answer: str, path: Path) -> None:
    """Writes a PNG or a page that needs no other file, as the path ends; see `own_file`."""
    write = _png if path.suffix == ".png" else _page
    content = write(found, question, " ".join(folded(answer.split()).values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with own_file(path, COMMAND) as beside:
        beside.write_bytes(content)


def _png(found: list[Section], question: str, answer: str) -> bytes:
    from matplotlib.figure import Figure

    from mlx_llava.analysis.panels import plain

    heights = [section.height + 0.5 for section in found]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), dpi=100, layout="constrained")
    said = "\n".join(textwrap.fill(text, 100) for text in (question, answer))
    figure.suptitle(plain(said), fontsize=12)
    parts = figure.subfigures(len(found), 1, height_ratios=heights, squeeze=False).flatten()
    for part, section in zip(parts, found, strict=True):
        part.suptitle(textwrap.fill(f"{section.title}. {section.caption}", 120), fontsize=9)
        section.draw(figure=part)
    return _saved(figure)


def _page(found: list[Section], question: str, answer: str) -> bytes:
    from matplotlib.figure import Figure

    body = []
    for section in found:
        figure = Figure(figsize=(WIDTH, section.height), dpi=100, layout="constrained")
        section.draw(figure=figure)
        heading, caption = html.escape(section.title), html.escape(section.caption)
        body.append(
            f"<h2>{heading}</h2>\n<p>{caption}</p>\n"
            f'<img alt="{heading}" src="{data_url(_saved(figure))}">'
        )
    shown = {"question": html.escape(question), "title": html.escape(answer)}
    return _PAGE.format(**shown, command=COMMAND, body="\n".join(body)).encode()


def _saved(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # Letters that the font lacks become boxes. `catch_warnings` would change the filters of all
    # threads; this one holds for what is drawn here alone.
    warnings.filterwarnings("ignore", "Glyph .* missing", module=r"mlx_llava\.analysis\.report")
    figure.savefig(buffer, format="png", metadata={"Software": COMMAND})
    return buffer.getvalue()
