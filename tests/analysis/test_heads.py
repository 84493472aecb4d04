"""What a head seeks, marks and gives is what the decoder computes with."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava import load
from mlx_llava.analysis.heads import given_words, take_head
from mlx_llava.analysis.trace import trace
from mlx_llava.explain import explain
from tests.conftest import GOLDENS, PICTURE, SHAPES, load_as_stored


def check(model, ours):
    """All heads' weights are a trace's, and what they write is what attention gives."""
    for layer, block in enumerate(model.language_model.layers):
        written = np.zeros_like(ours.hidden_states[0])
        for number in range(block.self_attn.n_heads):
            head = take_head(model, ours, layer, number)
            for query in range(len(written)):
                powers = np.exp(head.scores(query) - head.scores(query).max())
                weights = powers / powers.sum()
                expected = ours.attention[layer, number, query]
                assert np.abs(weights - expected[: query + 1]).max() < 1e-4
                written[query] += weights @ head.writes[: query + 1]
        x = block.input_layernorm(mx.array(ours.hidden_states[layer])[None])
        bias = block.self_attn.o_proj.bias if "bias" in block.self_attn.o_proj else 0
        expected = np.array(block.self_attn(x, "causal", 0, None)[0] - bias)
        assert np.abs(written - expected).max() < 1e-3


@pytest.mark.parametrize("name", ["gqa", "mqa_one_row", "head_dim", "llama3_rope", "qwen2"])
def test_heads_together_are_the_layer(name, tmp_path):
    tiny = pytest.importorskip("tests.tiny", reason="the oracle: pip install '.[test]'")
    case = next(case for case in tiny.CASES if case.name == name)
    tiny.save(case, tmp_path)
    model, processor = load_as_stored(tmp_path)
    (prompt, *_), (pictures, *_) = tiny.rows(replace(case, images=case.images[:1]))
    check(model, trace(model, processor(prompt, pictures, raw=True)))


def test_a_quantised_head_too(tmp_path):
    from mlx_llava import convert
    from mlx_llava.checkpoint.convert import Quantization

    convert(GOLDENS / "llava", tmp_path / "q", quantization=Quantization(bits=8, group_size=32))
    model, processor = load(tmp_path / "q", dtype="float32")
    check(model, trace(model, processor("What is it?", PICTURE)))


def test_patches_give_the_names_of_what_they_show():
    """The embedded model's hardest-looking head gives a thing's own words and no others."""
    model, processor = load()
    seen = explain(model, processor, "What is in this picture?", SHAPES)
    looks = seen.attention()[-1]
    found = 0
    for word, others in (
        (" star", (" small", " black", " top left")),
        (" triangle", (" large", " red", " right")),
        (" square", (" large", " orange", " bottom left")),
    ):
        at = seen.words.index(word)
        number = int(looks[:, at].max(axis=-1).argmax())
        head = take_head(model, seen.trace, len(model.language_model.layers) - 1, number)
        brightest = seen.positions[0][[looks[number, at].argmax()]]
        given = given_words(model, processor, head.writes[brightest], count=2)[0]
        found += {*given} <= {word, *others}
    assert found >= 2
