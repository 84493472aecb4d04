"""Tokens that a schema forces are read together, and nothing else changes."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_llava import stream_generate
from mlx_llava.analysis.random_model import random_config
from mlx_llava.generation.batch import BatchGenerator
from mlx_llava.generation.json_schema import JsonConstraint
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.processor import Processor
from mlx_llava.inputs.tokenizer import Tokenizer
from mlx_llava.inputs.vocabulary import spec_from_sentencepiece
from mlx_llava.model.llama import LanguageModel
from mlx_llava.model.llava import Llava
from tests.conftest import PICTURE, SHAPES
from tests.generation.test_json_schema import SCHEMA, SCHEMAS, embedded

COLOURS = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "shape": {"enum": ["circle", "square", "triangle"]},
        "is_large": {"type": "boolean"},
    },
    "required": ["colour", "shape", "is_large"],
    "additionalProperties": False,
}


@contextmanager
def one_by_one():
    """As if nothing was known to be forced: what else is impossible is masked, and chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonConstraint, "forced", lambda *_: [])
        yield


@contextmanager
def counted():
    """How many tokens each pass of the decoder reads."""
    passes: list[int] = []
    states = LanguageModel.hidden_states

    def count(self, x, *args, **kwargs):
        passes.append(x.shape[0] * x.shape[1])
        return states(self, x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "hidden_states", count)
        yield passes


def told(parts):
    """Everything that is said of an answer."""
    return [(p.token, p.logprobs[p.token].item(), p.text, p.finish_reason) for p in parts]


def assert_same(parts, others):
    assert [p[::2] + p[3:] for p in parts] == [p[::2] + p[3:] for p in others]
    assert [p[1] for p in parts] == pytest.approx([p[1] for p in others], abs=3e-5)


@pytest.fixture(scope="module")
def untrained(llama_tokenizer_model):
    """Random weights, and LLaMA's vocabulary."""
    spec = spec_from_sentencepiece(llama_tokenizer_model, {})
    tokens = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    config = random_config("tiny", 32000)
    config = replace(config, text_config=replace(config.text_config, vocab_size=32064))
    _, processor = embedded()
    tokenizer = Tokenizer(spec, tokens, 32000)
    mx.random.seed(5)
    return Llava(config), Processor(config, tokenizer, processor.image_processor)


@pytest.mark.usefixtures("machine")
@settings(
    max_examples=7,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    schema=SCHEMAS,
    options=st.sampled_from(
        [
            {},
            {"temp": 1.5, "seed": 3},
            {"temp": 0.9, "top_p": 0.9, "seed": 8, "repetition_penalty": 1.3},
            {"repetition_penalty": 1.7},
        ]
    ),
)
@pytest.mark.parametrize("of", ["trained", "untrained"])
def test_the_same_is_said_as_token_by_token(of, request, schema, options):
    both = embedded() if of == "trained" else request.getfixturevalue("untrained")
    options = {"max_tokens": 60, "json_schema": schema, **options}
    with counted() as passes:
        parts = told(stream_generate(*both, "Describe it.", **options))
    with one_by_one(), counted() as passes_before:
        others = told(stream_generate(*both, "Describe it.", **options))
    assert_same(parts, others)
    assert len(passes) <= len(passes_before) == len(others)


@pytest.mark.usefixtures("machine")
def test_what_a_schema_leaves_open_is_all_that_the_model_is_asked():
    options = {"json_schema": COLOURS, "max_tokens": 100}
    with counted() as passes:
        parts = list(stream_generate(*embedded(), "Describe it.", PICTURE, **options))
    with one_by_one(), counted() as passes_before:
        others = list(stream_generate(*embedded(), "Describe it.", PICTURE, **options))
    jsonschema.validate(json.loads(parts[-1].answer), COLOURS)
    assert_same(told(parts), told(others))
    assert len(passes_before) == len(others) == parts[-1].generation_tokens
    assert len(passes) == 3
    assert parts[-1].prompt_tokens < sum(passes) < parts[-1].prompt_tokens + len(parts)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("seed", range(2))
def test_rows_of_a_batch_are_what_they_are_alone(seed):
    model, processor = embedded()
    random = np.random.default_rng(seed)
    schemas = [COLOURS, None, SCHEMA, {"const": "all of it is known"}, None, {"type": "string"}]
    rows = [
        Options(json_schema=schema, max_tokens=int(random.integers(3, 70)), temp=1.0, seed=i)
        for i, schema in enumerate(random.permutation(np.array(schemas, object)).tolist())
    ]
    generator = BatchGenerator(model, processor, batch_size=4, prompt_cache=PromptCache(model))
    parts: dict[int, list] = {}
    with counted() as passes:
        while rows or not generator.is_idle:
            for _ in range(int(random.integers(3))):
                if rows:
                    row = processor(f"What is {len(rows)}?", PICTURE), rows.pop()
                    parts[generator.insert(*row)] = [row]
            for uid, response in generator.next():
                parts[uid].append(response)
    with one_by_one(), counted() as passes_before:
        for (inputs, options), *responses in parts.values():
            alone = stream_generate(model, processor, inputs, **asdict(options))
            assert_same(told(responses), told(alone))
    assert len(passes) < len(passes_before)


@pytest.mark.parametrize("length", range(1, 60, 6))
def test_answers_that_are_cut_off_are_cut_there(length):
    options = {"json_schema": COLOURS, "max_tokens": length}
    parts = list(stream_generate(*embedded(), "Describe it.", **options))
    with one_by_one():
        others = list(stream_generate(*embedded(), "Describe it.", **options))
    assert_same(told(parts), told(others))


def test_a_stop_text_ends_among_forced_tokens_and_what_was_read_is_kept():
    model, processor = embedded()
    cache = PromptCache(model)
    options = {"json_schema": COLOURS, "stop": ['"sha']}
    first = list(stream_generate(model, processor, "Describe it.", prompt_cache=cache, **options))
    assert first[-1].answer.endswith(", ")
    for prompt in ("Describe it.", "Describe it again."):
        parts = stream_generate(model, processor, prompt, prompt_cache=cache, json_schema=COLOURS)
        alone = stream_generate(model, processor, prompt, json_schema=COLOURS)
        assert_same(told(parts), told(alone))


def test_a_cache_that_rolls_takes_what_fits():
    model, processor = embedded()
    inputs = processor("Describe it.", PICTURE)
    size = inputs.input_ids.shape[1] + 20
    options = {"json_schema": COLOURS, "max_kv_size": size}
    parts = told(stream_generate(model, processor, inputs, **options))
    with one_by_one():
        assert_same(parts, told(stream_generate(model, processor, inputs, **options)))


def test_rows_without_a_schema_are_queued_ahead_of_the_reading(monkeypatch):
    """The host waits for the tokens of a step when the next one is on its way already."""
    model, processor = embedded()
    monkeypatch.setattr("mlx_llava.generation.batch.queues_ahead", lambda: True)
    generator = BatchGenerator(model, processor)
    generator.insert(processor("Describe it.", PICTURE), Options(json_schema=COLOURS))
    generator.insert(processor("Describe it.", SHAPES), Options(max_tokens=12))
    events: list[str] = []
    call, item = LanguageModel.__call__, mx.array.item
    monkeypatch.setattr(
        LanguageModel, "__call__", lambda *a, **k: events.append("step") or call(*a, **k)
    )
    monkeypatch.setattr(mx.array, "item", lambda self: events.append("read") or item(self))
    generator.next()  # which reads the prompts
    both = 0
    for _ in range(11):
        del events[:]
        told = {uid for uid, _ in generator.next()}
        assert events[0] == "step"
        assert events.count("step") == 1
        assert 1 in told
        both += told == {0, 1}
    assert both >= 3
