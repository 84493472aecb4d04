"""Prompts and schemas become columns."""

from __future__ import annotations

import pytest

from mlx_llava.captioning.questions import (
    PROMPT,
    read_questions,
    whole_text,
    with_columns_alone,
)

TAGS = {"type": "object", "properties": {"caption": {}, "tags": {}, "count": {}}}


@pytest.mark.parametrize(
    ("prompts", "schema", "columns"),
    [
        ([], None, ("text",)),
        (["What?"], None, ("text",)),
        (["short=What?"], None, ("short",)),
        (["What?", "mood=Which mood?", "And now?"], None, ("text", "mood", "text_3")),
        (["What is a = b?"], None, ("text",)),
        (["What?"], TAGS, ("caption", "tags", "count")),
        (["a=What?", "b=What?"], {"properties": {"x": {}}}, ("a.x", "b.x")),
        (["What?"], {"type": "object"}, ("text",)),
    ],
)
def test_columns(prompts, schema, columns):
    assert read_questions(prompts, schema).columns == columns


def test_prompts():
    named = read_questions(["a=What\nis = it?", "Which = ?"], None).prompts
    assert named == {"a": "What\nis = it?", "text_2": "Which = ?"}
    assert read_questions([], None).prompts == {"text": PROMPT}


@pytest.mark.parametrize(
    ("prompts", "schema", "prefix", "message"),
    [
        (["a=x", "a=y"], None, "", "Two prompts are named a"),
        (["image=x"], None, "", "A column is named image"),
        (["x"], {"properties": {"error": {}}}, "", "A column is named error"),
        (["x"], TAGS, "a ", "--prefix and --suffix"),
    ],
)
def test_what_makes_no_sense(prompts, schema, prefix, message):
    with pytest.raises(ValueError, match=message):
        read_questions(prompts, schema, prefix)


def test_values():
    questions = read_questions(["a=x", "b=y"], None, "zwx, ", "!")
    assert questions.values([{"text": " red "}, {"text": "blue"}]) == {
        "a": "zwx, red!",
        "b": "zwx, blue!",
    }
    with pytest.raises(ValueError, match="broken"):
        questions.values([{"text": "red"}, {"error": "broken"}])


@pytest.mark.parametrize("text", ['{"caption": "x", "ta', "[1]", ""])
def test_an_answer_that_is_cut_off_is_an_error(text):
    with pytest.raises(ValueError, match="The answer is no"):
        read_questions([], TAGS).values([{"text": text}])


def test_fields():
    values = read_questions([], TAGS).values([{"text": '{"tags": ["a", "b"], "count": 2}'}])
    assert values == {"caption": None, "tags": ["a", "b"], "count": 2}
    assert whole_text(values) == "a, b\n2"
    assert whole_text({"a": {"b": [1]}, "c": "x"}) == '{"b": [1]}\nx'


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (None, None),
        ({"type": "object"}, {"type": "object"}),
        (
            {"properties": {"a": {}}},
            {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
        ),
        (
            {"properties": {"a": {}}, "additionalProperties": True},
            {"type": "object", "properties": {"a": {}}, "additionalProperties": True},
        ),
    ],
)
def test_answers_are_objects_of_the_columns_alone(schema, closed):
    assert with_columns_alone(schema) == closed
