"""What an exercise says to what people may put there."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava.analysis.exercises import check

ROWS = [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    "answer", [0.67, "0.67", "2/3", " 0.67 ", np.float32(0.67), mx.array(0.67), np.array(0.67)]
)
def test_a_right_number_may_have_any_form(answer, capsys):
    check(answer, 0.6652, "", near=0.006)
    assert capsys.readouterr().out == "Right.\n"


@pytest.mark.parametrize(
    "answer",
    [[], [0.67], (4, 198), np.array([1, 2]), "two", "", "1/0", {}, int, 1j, 10**400, [1, [2, 3]]],
)
def test_what_is_no_number_is_asked_for_one(answer, capsys):
    check(answer, 0.67, "no hint for this")
    assert capsys.readouterr().out == "A number, please.\n"


@pytest.mark.parametrize("answer", [ROWS, np.array(ROWS), mx.array(ROWS), [["1/2"] * 2] * 2])
def test_right_rows_may_have_any_form(answer, capsys):
    check(answer, ROWS, "", wanted="Two rows")
    assert capsys.readouterr().out == "Right.\n"


@pytest.mark.parametrize("answer", [0.5, [0.5] * 4, [[0.5] * 3] * 2, [[0.5], [0.5, 0.5]], "rows"])
def test_other_rows_are_asked_for(answer, capsys):
    check(answer, ROWS, "no hint for this", wanted="Two rows of two numbers")
    assert capsys.readouterr().out == "Two rows of two numbers, please.\n"


def test_another_number_gets_the_hint(capsys):
    for answer in (577, "577", float("nan"), float("inf")):
        check(answer, 576, "mind the one.")
        assert capsys.readouterr().out == "Not yet: mind the one.\n"


def test_no_answer_yet_is_no_mistake(capsys):
    check(None, 576, "no hint for this")
    assert capsys.readouterr().out == "Your turn.\n"
