"""Verbs and nouns of files of instructions."""

from __future__ import annotations

import io
import json
import random
import sys

import pytest

from mlx_llava.analysis.instructions import (
    MOST_VERBS,
    count_instructions,
    plot_instructions,
    verb_and_noun,
)
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import shapes


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Describe the following image.", ("describe", "image")),
        ("<image>\nCan you describe this picture?", ("describe", "picture")),
        ("What are the colors of the bus in the image?\n<image>", ("what", "colors")),
        ("How many red stars are there?", ("how", "red")),
        ("What is it?", ("what", "")),
        ("Hm!", None),
        ("", None),
    ],
)
def test_a_verb_and_what_it_is_about(question, expected):
    assert verb_and_noun(question) == expected


@pytest.mark.parametrize("as_lines", [False, True])
def test_human_turns_are_counted(as_lines, tmp_path):
    scenes = shapes.make_scenes("seen", 20, seed=0)
    asked = [shapes.conversation(random.Random(i), scene) for i, scene in enumerate(scenes)]
    samples = [shapes.training_sample(i, questions) for i, questions in enumerate(asked)]
    text = "\n".join(map(json.dumps, samples)) if as_lines else json.dumps(samples)
    path = tmp_path / ("train.jsonl" if as_lines else "train.json")
    path.write_text(text)
    counts = count_instructions(path)
    assert counts.total() == sum(map(len, asked))
    described = sum(q.text == "Describe the picture." for questions in asked for q in questions)
    assert counts["describe", "picture"] == described > 0


def test_what_has_no_human_turn_counts_nothing(tmp_path):
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"id": 1}, {"conversations": [{"from": "gpt", "value": "Name!"}]}]))
    assert not count_instructions(path)


def test_rings_hold_every_instruction():
    """The inner ring is the verbs, and the outer one splits each of them into its nouns."""
    counts = {(f"verb{i}", f"noun{j}"): 20 - i for i in range(12) for j in range(9)}
    figure = plot_instructions(counts)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    (axes,) = figure.axes
    angles = [(w.r > 0.8, w.theta1, w.theta2) for w in axes.patches]
    inner, outer = ([(a, b) for far, a, b in angles if far is ring] for ring in (False, True))
    assert len(inner) == MOST_VERBS + 1
    ends = {round(end % 360, 2) for _, end in outer}
    assert {round(end % 360, 2) for _, end in inner} <= ends
    assert {"verb0", "noun0", "others"} <= {text.get_text() for text in axes.texts}


def test_no_wide_part_of_a_ring_is_without_a_word():
    counts = {("what", ""): 5, **{("what", f"noun{i}"): 4 for i in range(9)}}
    (axes,) = plot_instructions(counts).axes
    texts = [text.get_text() for text in axes.texts if text.get_text()]
    assert len(texts) == len(axes.patches)
    assert {"(none)", "others"} <= {*texts}
