"""What people ask in a file of instructions: its verbs, and the nouns that they are about.

A picture like figure 2 of Wang et al. 2022 (Self-Instruct, arXiv:2212.10560), without a parser: the
verb is the first word of a question that is in `VERBS`, else its question word; the noun is the
next word that is not in `FUNCTION_WORDS`. That is a rule of thumb for English, and no grammar.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from math import cos, radians, sin
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mlx_llava.json_files import read_records

VERBS = frozenset(
    "analyze answer assess choose classify compare count create describe detail determine discuss "
    "elaborate estimate evaluate examine explain find generate give identify illustrate imagine "
    "infer list locate make name narrate point provide read recognize say share show state suggest "
    "summarize tell transcribe translate write".split()
)
QUESTION_WORDS = frozenset(
    "what which who whose where when why how is are was were do does did has have can could".split()
)
FUNCTION_WORDS = QUESTION_WORDS | frozenset(
    "a an the this that these those there here it its they them their he she his her you your i me "
    "my we us our one some any all each every and or of in on at to for from with by about as be "
    "been being not no if then than so would should will may might must please given following "
    "see many much other such only more most".split()
)
#: Nouns of a verb that have a place of their own.
MOST_NOUNS = 6
MOST_VERBS = 8


def verb_and_noun(question: str) -> tuple[str, str] | None:
    """What is asked, and of what; None where no word of a question is known."""
    words = re.findall(r"[a-z]+", question.replace("<image>", " ").lower())
    firsts = [i for known in (VERBS, QUESTION_WORDS) for i, w in enumerate(words) if w in known]
    if not firsts:
        return None
    rest = (word for word in words[firsts[0] + 1 :] if word not in FUNCTION_WORDS)
    return words[firsts[0]], next(rest, "")


def count_instructions(path: str | Path) -> Counter[tuple[str, str]]:
    """How often each verb and noun are in the human turns of a file in LLaVA's format.

    Raises:
        ValueError: The file is no JSON.
    """
    found = Counter[tuple[str, str]]()
    for _, sample in read_records(Path(path)):
        for turn in sample.get("conversations", ()):
            pair = verb_and_noun(turn["value"]) if turn["from"] == "human" else None
            found.update([pair] if pair else [])
    return found


def plot_instructions(counts: Mapping[tuple[str, str], int], figure: Any = None) -> Any:
    """Verbs as the inner ring, their commonest nouns as the outer one; areas are counts."""
    figure = figure or Figure(figsize=(6.4, 6.4), dpi=80, layout="constrained")
    axes = figure.subplots()
    by_verb = Counter[str]()
    for (verb, _), count in counts.items():
        by_verb[verb] += count
    inner, outer = list[tuple[str, int]](), list[tuple[str, int]]()
    colours, shades = list[Any](), list[Any]()
    rest = sum(count for _, count in by_verb.most_common()[MOST_VERBS:])
    for i, (verb, count) in enumerate(by_verb.most_common(MOST_VERBS)):
        nouns = Counter({noun: n for (v, noun), n in counts.items() if v == verb})
        common = nouns.most_common(MOST_NOUNS)
        inner.append((verb, count))
        outer += [(noun or "(none)", n) for noun, n in common]
        outer.append(("others", count - sum(n for _, n in common)))
        colours.append(_colour(i, 0.2))
        shades += [_colour(i, 0.35 + 0.07 * j) for j in range(len(common))] + ["0.95"]
    if rest:
        inner.append(("others", rest))
        outer.append(("others", rest))
        colours.append("0.8")
        shades.append("0.95")
    total = sum(by_verb.values())
    for ring, radius, tints, width in ((inner, 0.62, colours, 0.35), (outer, 1.0, shades, 0.37)):
        wedges, _ = axes.pie(
            [n for _, n in ring], radius=radius, colors=tints, startangle=90, counterclock=False,
            wedgeprops={"width": width, "edgecolor": "white"},
        )  # fmt: skip
        for wedge, (word, n) in zip(wedges, ring, strict=True):
            if n >= 0.012 * total:
                _write(axes, wedge, word, radius - width / 2)
    axes.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02))
    return figure


def _colour(number: int, pale: float = 0.0) -> tuple[float, ...]:
    """One of eight colours that colour-blind readers can tell apart (Okabe and Ito), or paler."""
    hexes = ("0072B2", "E69F00", "009E73", "CC79A7", "56B4E9", "D55E00", "F0E442", "999999")
    rgb = bytes.fromhex(hexes[number % len(hexes)])
    return tuple(c / 255 * (1 - pale) + pale for c in rgb)


def _write(axes: Any, wedge: Any, word: str, radius: float) -> None:
    """A word along the middle of a wedge, the right way up."""
    angle = (wedge.theta1 + wedge.theta2) / 2
    turned = angle + 180 if 90 < angle % 360 < 270 else angle
    place = radius * cos(radians(angle)), radius * sin(radians(angle))
    axes.text(*place, word, rotation=turned, ha="center", va="center", fontsize=9)
