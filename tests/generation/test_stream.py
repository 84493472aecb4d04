"""Generation: the same text whatever way it is computed, and an end where there is one."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_llava import GenerationResponse, generate, load, stream_generate
from mlx_llava.explain import explain
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.steps import generate_step, prefill
from mlx_llava.inputs.processor import Processor
from mlx_llava.inputs.templates import get_template
from mlx_llava.model.cache import KVCache
from tests.conftest import PICTURE

QUESTION = "What is in this picture?"
PROMPT_TOKENS = 31  # of the golden tokenizer: 16 of the picture, 15 of the text around it


@pytest.fixture(params=["llava", "llava_next"])
def both(request, loaded, loaded_next):
    return loaded if request.param == "llava" else loaded_next


def embeddings(model, processor) -> mx.array:
    return model.embed(**processor(QUESTION, PICTURE))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("step", [1, 2, 7, 39, 40, 41, 1000])
def test_chunked_prefill_is_one_pass(both, step):
    model, processor = both
    x = embeddings(model, processor)
    whole = model.language_model(input_embeddings=x)[:, -1]
    cache = model.language_model.make_cache()
    assert mx.abs(prefill(x, model.language_model, cache, step) - whole).max() < 1e-5
    assert cache[0].offset == x.shape[1]


@pytest.mark.usefixtures("machine")
def test_cached_decoding_is_decoding_without_a_cache(both):
    model, processor = both
    x = embeddings(model, processor)
    ids = [token for token, _ in generate_step(x, model.language_model, max_tokens=20)]
    table = model.language_model.model.embed_tokens
    for n, token in enumerate(ids):
        sequence = mx.concatenate([x, table(mx.array([ids[:n]], mx.int32))], axis=1)
        logits = model.language_model(input_embeddings=sequence)[0, -1]
        assert int(mx.argmax(logits)) == token


@pytest.mark.usefixtures("machine")
def test_a_cache_continues_a_conversation(loaded):
    model, processor = loaded
    x = embeddings(model, processor)
    cache = model.language_model.make_cache()
    prefill(x[:, :17], model.language_model, cache, 5)
    continued = generate_step(x[:, 17:], model.language_model, cache=cache, max_tokens=9)
    whole = generate_step(x, model.language_model, max_tokens=9)
    assert [token for token, _ in continued] == [token for token, _ in whole]


def test_the_cache_has_the_duck_type_of_mlx_lm():
    theirs = pytest.importorskip("mlx_lm.models.cache").KVCache()
    ours = KVCache()
    for length in (3, 1, 300, 1):
        keys, values = mx.random.normal((2, 1, 2, length, 4)), None
        keys, values = keys[0], keys[1]
        for a, b in zip(
            ours.update_and_fetch(keys, values), theirs.update_and_fetch(keys, values), strict=True
        ):
            assert mx.array_equal(a, b)
    assert ours.trim(4) == theirs.trim(4) == 4
    assert ours.offset == theirs.offset == 301
    assert ours.is_trimmable()
    copy = KVCache()
    copy.state = ours.state
    assert copy.offset == 301
    assert mx.array_equal(copy.state[0], ours.state[0])
    assert ours.trim(1000) == 301


def test_a_cache_of_mlx_lm_gives_the_same_tokens(loaded):
    caches = pytest.importorskip("mlx_lm.models.cache")
    model, processor = loaded
    x = embeddings(model, processor)
    theirs = caches.make_prompt_cache(model.language_model)
    assert all(isinstance(cache, KVCache) for cache in theirs)
    theirs = [caches.KVCache() for _ in model.language_model.layers]
    ours = generate_step(x, model.language_model, max_tokens=9)
    assert [t for t, _ in generate_step(x, model.language_model, cache=theirs, max_tokens=9)] == [
        t for t, _ in ours
    ]


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (True, ["queued", "queued", "read", "queued", "read", "read"]),
        (False, ["queued", "read", "queued", "read", "queued", "read"]),
    ],
)
def test_the_next_step_is_queued_before_the_token_is_read(loaded, monkeypatch, ahead, expected):
    model, processor = loaded
    events = []
    monkeypatch.setattr("mlx_llava.generation.steps.queues_ahead", lambda: ahead)
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: events.append("queued"))
    for _ in generate_step(embeddings(model, processor), model.language_model, max_tokens=3):
        events.append("read")
    assert events == expected


def test_responses_tell_what_happened(loaded):
    model, processor = loaded
    parts = list(stream_generate(model, processor, QUESTION, PICTURE, max_tokens=6))
    last = parts[-1]
    assert all(isinstance(part, GenerationResponse) for part in parts)
    assert [part.finish_reason for part in parts] == [None] * 5 + ["length"]
    assert [part.generation_tokens for part in parts] == [1, 2, 3, 4, 5, 6]
    assert (last.prompt_tokens, last.image_tokens) == (PROMPT_TOKENS, 16)
    assert last.logprobs.shape == (320,)
    assert mx.argmax(last.logprobs).item() == last.token
    times = (
        last.preprocess_seconds,
        last.encode_seconds,
        last.prefill_seconds,
        last.decode_seconds,
    )
    assert all(time > 0 for time in times)
    assert last.peak_memory > 0
    assert last.prompt_tps == pytest.approx(PROMPT_TOKENS / last.prefill_seconds)
    text = generate(model, processor, QUESTION, PICTURE, max_tokens=6)
    assert text == "".join(part.text for part in parts)
    assert text == processor.tokenizer.decode([part.token for part in parts])


@pytest.mark.usefixtures("machine")
def test_images_may_be_given_in_every_way(loaded):
    model, processor = loaded
    picture = Image.open(PICTURE).convert("RGB")
    parts = [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": str(PICTURE)}},
    ]
    answers = {
        generate(model, processor, QUESTION, PICTURE, max_tokens=5),
        generate(model, processor, QUESTION, [picture], max_tokens=5),
        generate(model, processor, QUESTION, image=np.asarray(picture), max_tokens=5),
        generate(model, processor, [{"role": "user", "content": parts}], max_tokens=5),
        generate(
            model,
            processor,
            f"USER: <image>\n{QUESTION} ASSISTANT:",
            PICTURE,
            raw=True,
            max_tokens=5,
        ),
        generate(model, processor, processor(QUESTION, PICTURE), max_tokens=5),
    }
    assert len(answers) == 1


SAMPLING = {
    "temp": {"temp": 1.0},
    "top_p": {"temp": 1.0, "top_p": 0.8},
    "top_k": {"temp": 1.0, "top_k": 5},
    "min_p": {"temp": 1.0, "min_p": 0.05},
    "repetition": {"temp": 1.0, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_the_same_seed_gives_the_same_text(loaded, name):
    model, processor = loaded

    def answer(seed):
        return generate(
            model, processor, QUESTION, PICTURE, seed=seed, max_tokens=12, **SAMPLING[name]
        )

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(6)}) > 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seed": -1}, r"seed is -1; it must lie in 0..2\^64 - 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"temp": float("nan")}, "temp is nan; it must be a number"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
    ],
)
def test_numbers_that_no_sampler_takes_are_refused(loaded, option, message):
    with pytest.raises(ValueError, match=message):
        generate(*loaded, QUESTION, **{"temp": 1.0, "seed": 2**64 - 1, **option}, max_tokens=1)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_narrowest_sampling_is_greedy(loaded, options):
    model, processor = loaded
    greedy = generate(model, processor, QUESTION, PICTURE, max_tokens=12)
    narrow = generate(
        model, processor, QUESTION, PICTURE, max_tokens=12, temp=1.0, seed=5, **options
    )
    assert narrow == greedy


def test_temperature_follows_the_models_probabilities(loaded):
    model, processor = loaded
    x = embeddings(model, processor)
    first = next(iter(generate_step(x, model.language_model, max_tokens=1)))
    expected = mx.softmax(first[1] / 2.0)
    from mlx_llava.generation.sampling import make_sampler

    draws = make_sampler(2.0, 0, 0, 0)(mx.broadcast_to(first[1], (20_000, 320)))
    counts = np.bincount(np.array(draws), minlength=320) / 20_000
    assert np.abs(counts - np.array(expected)).max() < 0.015


def test_repetition_penalty_is_mlx_lms_over_the_text_of_the_prompt(loaded):
    model, processor = loaded
    without = [p.token for p in stream_generate(model, processor, QUESTION, PICTURE, max_tokens=20)]
    penalised = [
        p.token
        for p in stream_generate(
            model, processor, QUESTION, PICTURE, max_tokens=20, repetition_penalty=5.0
        )
    ]
    assert len(set(penalised)) > len(set(without))


def script(monkeypatch, processor, text: str, eos: bool = False):
    """Replaces the decoder's choice by a text, token by token."""
    ids = processor.tokenizer.encode(processor.tokenizer.protect(text)) + [2] * eos
    monkeypatch.setattr(
        importlib.import_module("mlx_llava.generation.stream"),
        "decode",
        lambda *args, **kw: ((i, mx.zeros(320)) for i in ids[: kw["max_tokens"]]),
    )


def test_an_end_of_answer_token_ends_it_and_is_not_shown(loaded, monkeypatch):
    model, processor = loaded
    script(monkeypatch, processor, "A small dog", eos=True)
    parts = list(stream_generate(model, processor, "hi"))
    assert "".join(part.text for part in parts) == "A small dog"
    assert parts[-1].finish_reason == "stop"
    assert parts[-1].token == 2


@pytest.mark.parametrize("stop", [["mall d"], ["nothing", "mall d"], ["mall d", " dog"]])
def test_stop_texts_work_across_tokens_and_are_not_shown(loaded, monkeypatch, stop):
    model, processor = loaded
    script(monkeypatch, processor, "A small dog that sleeps")
    parts = list(stream_generate(model, processor, "hi", stop=stop))
    assert "".join(part.text for part in parts) == "A s"
    assert parts[-1].finish_reason == "stop"


def test_the_stop_of_llava_v0(loaded, monkeypatch):
    model, processor = loaded
    v0 = Processor(
        processor.config, processor.tokenizer, processor.image_processor, get_template("llava_v0")
    )
    tokenizer = processor.tokenizer
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids: "".join("#" if i == 9 else "x" for i in ids)
    )
    module = importlib.import_module("mlx_llava.generation.stream")
    ids = [8, 9, 9, 8, 9, 9, 9, 8]
    monkeypatch.setattr(module, "decode", lambda *a, **k: ((i, mx.zeros(1)) for i in ids))
    assert generate(model, v0, "hi") == "x##x"


def test_what_a_stop_withheld_is_shown_at_the_end(loaded, monkeypatch):
    model, processor = loaded
    script(monkeypatch, processor, "A small dog")
    assert generate(model, processor, "hi", stop=["dog!"], max_tokens=100) != ""
    script(monkeypatch, processor, "A small dog", eos=True)
    assert generate(model, processor, "hi", stop=["dog!"]) == "A small dog"


def test_ends_of_answer_come_from_everywhere(loaded):
    _, processor = loaded
    special = processor.tokenizer.special_tokens
    config = replace(processor.config, eos_token_id=(71, 72))
    template = replace(get_template("vicuna_v1"), stops=("<pad>", "words"))
    made = Processor(
        config, processor.tokenizer, processor.image_processor, template, eos_ids=(73,)
    )
    assert made.eos_ids == {71, 72, 73, special["</s>"], special["<pad>"]}
    assert made.template.stops == ("<pad>", "words")


def test_the_context_is_checked_before_any_compute(loaded, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(type(model), "embed", lambda *args, **kwargs: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"prompt has 8\d\d tokens and the model's context is 777"):
        generate(model, processor, "x " * 400)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        generate(model, processor, "hi", max_tokens=0)
    for option in ({"temp": -1}, {"top_k": -1}, {"top_p": 7}, {"min_p": -0.5}):
        with pytest.raises(ValueError, match=r"(temp|top_k|top_p|min_p) is .*; it must be at"):
            generate(model, processor, "hi", **option)


def test_the_answer_fills_the_context_and_no_more(loaded):
    model, processor = loaded
    processor = Processor(processor.config, processor.tokenizer, processor.image_processor)
    processor.eos_ids = frozenset()
    processor.context_length = PROMPT_TOKENS + 9
    *_, last = stream_generate(model, processor, QUESTION, PICTURE, max_tokens=100)
    assert (last.prompt_tokens, last.generation_tokens) == (PROMPT_TOKENS, 9)
    assert last.finish_reason == "length"


def test_inputs_are_numpys_of_any_thread_and_the_model_takes_mlxs_too(loaded):
    model, processor = loaded
    with ThreadPoolExecutor(1) as pool:
        inputs = pool.submit(processor, [QUESTION, "Hi"], [PICTURE, None]).result()
    arrays = {key: value for key, value in dict(inputs).items() if key != "image_sizes"}
    assert {key: (type(value), str(value.dtype)) for key, value in arrays.items()} == {
        "input_ids": (np.ndarray, "int32"),
        "pixel_values": (np.ndarray, "float32"),
        "attention_mask": (np.ndarray, "int32"),
    }
    converted = {key: mx.array(value) for key, value in arrays.items()}
    assert mx.array_equal(model(**inputs), model(**converted))


def test_an_image_without_a_place_in_the_model_is_an_error(loaded):
    model, processor = loaded
    inputs = processor("<image>", PICTURE)
    with pytest.raises(ValueError, match="16 image tokens but the images give 32 features"):
        model.embed(inputs.input_ids, np.concatenate([inputs.pixel_values] * 2))
    with pytest.raises(ValueError, match="16 image tokens but the images give 0 features"):
        model.embed(inputs.input_ids)
    with pytest.raises(ValueError, match=r"the tower reads \(B, 28, 28, 3\)"):
        model.embed(inputs.input_ids, mx.zeros((1, 3, 28, 28)))


def test_only_one_prompt_is_answered_and_no_option_is_ignored(loaded):
    model, processor = loaded
    with pytest.raises(ValueError, match="One prompt can be answered at a time; the inputs hold 2"):
        generate(model, processor, ["a", "b"])
    inputs = processor("<image>", PICTURE)
    for options in ({"image": PICTURE}, {"system": "Be brief."}):
        with pytest.raises(ValueError, match="Inputs are complete"):
            generate(model, processor, inputs, **options)


def test_tiles_and_sizes_must_match(loaded_next):
    model, processor = loaded_next
    inputs = processor("<image>", PICTURE)
    tiles = inputs.pixel_values
    for wrong in (tiles[:-1], np.concatenate([tiles, tiles[:1]])):
        with pytest.raises(ValueError, match=r"tiles but image_sizes need \d"):
            model.encode_images(wrong, inputs.image_sizes)


def in_thread(function, *args, **kwargs):
    """What a function returns in a thread of its own."""

    def run():
        try:
            return function(*args, **kwargs)
        finally:
            mx.clear_streams()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@pytest.mark.usefixtures("machine")
def test_a_model_works_in_any_thread(golden):
    """As web frameworks use it, which answer in other threads than the one that loaded it."""
    model, processor = in_thread(load, golden)
    cache = PromptCache(model)
    answers = [
        run(generate, model, processor, QUESTION, PICTURE, max_tokens=8, prompt_cache=kept)
        for kept in (None, cache, cache)
        for run in (in_thread, lambda function, *args, **kwargs: function(*args, **kwargs))
    ]
    assert len(set(answers)) == 1
    inputs = in_thread(processor, QUESTION, PICTURE)
    assert generate(model, processor, inputs, max_tokens=8) == answers[0]
    explained = in_thread(explain, model, processor, QUESTION, PICTURE, max_tokens=8)
    assert explained.answer == answers[0].strip()
