"""Choosing the next token, against mlx-lm's own functions."""

from __future__ import annotations

import inspect
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava import stream_generate
from mlx_llava.arguments import MAX_REPEATS
from mlx_llava.generate import build_parser
from mlx_llava.generation.sampling import Options, keep_top_p, make_logits_processors, make_sampler

theirs = pytest.importorskip("mlx_lm.sample_utils")


def logprobs(rows: int = 64, ties: bool = False) -> mx.array:
    """Log-probabilities (rows, 97) of many shapes, the last with impossible ones."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, np.linspace(0.1, 6, rows)[:, None], (rows, 97)).astype(np.float32)
    logits[-1, ::2] = -np.inf
    values = mx.array(logits.round() if ties else logits)
    return values - mx.logsumexp(values, axis=-1, keepdims=True)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.8, "min_p": 0.02, "top_k": 12},
        {"top_p": 1.0},
        {},
    ],
    ids=str,
)
def test_draws_are_mlx_lms(options, ties, uncompiled):
    given = {"top_p": 0.0, "min_p": 0.0, "top_k": 0, **options}
    for temp in (0.3, 1.0, 1.9):
        drawn = []
        for sampler in (make_sampler(temp, **given), theirs.make_sampler(temp=temp, **given)):
            mx.random.seed(11)
            drawn.append([sampler(logprobs(ties=ties)).tolist() for _ in range(3)])
        assert drawn[0] == drawn[1]


def test_more_top_k_than_there_are_tokens_leaves_all():
    mx.random.seed(1)
    plain = make_sampler(1.0, 0, 0, 0)(logprobs()).tolist()
    for top_k in (97, 10**9):
        mx.random.seed(1)
        assert make_sampler(1.0, 0, 0, top_k)(logprobs()).tolist() == plain


def test_the_likeliest_is_never_left_out():
    even = mx.full((1, 8), -np.log(8).astype(np.float32))
    for top_p in (1e-9, 0.5, 1 - 1e-9):
        assert np.isfinite(np.array(keep_top_p(even, top_p))).any()


@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_repetition_penalty_is_mlx_lms(penalty):
    seen = mx.array([*range(30), 5, 5, 8])
    (ours,) = make_logits_processors(penalty)
    (other,) = theirs.make_logits_processors(repetition_penalty=penalty)
    for tokens in (seen, seen[:3], seen[:0]):
        logits = [mx.random.normal((1, 97), key=mx.random.key(2)) for _ in range(2)]
        assert ours(tokens, logits[0]).tolist() == other(tokens, logits[1]).tolist()


def test_penalties_that_are_none_or_make_no_sense():
    assert make_logits_processors(None) == make_logits_processors(0.0) == []
    with pytest.raises(ValueError, match="repetition_penalty is -1"):
        Options(repetition_penalty=-1.0)


def test_what_was_said_is_penalised_by_how_often():
    (penalize,) = make_logits_processors(None, 0.5, 0.25, prompt_length=3)
    logits = mx.random.normal((1, 9), key=mx.random.key(3))
    for said in ([], [4], [4, 7, 4, 0]):
        counts = np.bincount([*said], minlength=9)
        expected = np.array(logits) - 0.5 * counts - 0.25 * (counts > 0)
        ours = penalize(mx.array([1, 2, 4, *said], mx.int32), logits)
        np.testing.assert_allclose(np.array(ours), expected, rtol=1e-6)


def test_biases_are_added():
    (bias,) = make_logits_processors(None, logit_bias={"5": -100, "2": 1.5})
    added = bias(mx.array([1]), mx.zeros((1, 7)))
    assert added.tolist() == [[0, 0, 1.5, 0, 0, -100, 0]]
    for wrong in ({"x": 1}, {"-1": 1}, {"5": 101}, {"5": "x"}, {"5": float("nan")}, {"5": True}):
        with pytest.raises(ValueError, match="logit_bias has"):
            Options(logit_bias=wrong)
    with pytest.raises(ValueError, match="logit_bias has 7, of a vocabulary of 7"):
        Options(logit_bias={"7": 1}).processors(0, 7)


def test_options_are_shown_where_they_are_taken():
    parameters = inspect.signature(stream_generate).parameters
    parsed = vars(build_parser().parse_args(["--prompt", "hi"]))
    for_people = {"max_repeats": MAX_REPEATS}
    for option in fields(Options):
        assert parameters[option.name].default == option.default
        assert f"        {option.name} ({option.type}): " in stream_generate.__doc__
        given = parsed[option.name]
        expected = for_people.get(option.name, option.default)
        assert (tuple(given) if option.name == "stop" else given) == expected
