"""How far a prompt is read is told as it is read, and costs nothing of the answer."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step as generate_step_of_mlx_lm

from mlx_llava import batch_generate, generate, stream_generate
from mlx_llava.generation import steps
from mlx_llava.generation.batch import BatchGenerator, run
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.sampling import Options
from mlx_llava.generation.session import Picture, Session
from mlx_llava.generation.steps import generate_step, prefill
from tests.conftest import PICTURE

QUESTION = "What is in this picture?"


class Told(list):
    """What a callback was told; one that is empty, and no less a callback."""

    def __call__(self, processed, total):
        self.append((processed, total))

    def of_each(self):
        """The same, of one prompt after another."""
        starts = [i for i, (processed, _) in enumerate(self) if processed == 0]
        return [self[start:end] for start, end in pairwise([*starts, len(self)])]


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(steps, "on_cpu", lambda: False)


@pytest.mark.usefixtures("machine", "on_a_gpu")
@pytest.mark.parametrize("step", [1, 8, 15, 30, 2048])
def test_chunks_are_told_as_mlx_lm_tells_them(loaded, step):
    model, processor = loaded
    x = model.embed(**processor(QUESTION, PICTURE))
    ours, theirs = Told(), Told()
    decoder, prompt = model.language_model, mx.zeros((x.shape[1],), mx.int32)
    options = {
        "max_tokens": 1,
        "prompt_progress_callback": theirs.__call__,
        "prefill_step_size": step,
    }
    list(generate_step_of_mlx_lm(prompt, decoder, input_embeddings=x[0], **options))
    assert theirs
    list(generate_step(x, decoder, max_tokens=1, prefill_step=step, prompt_progress_callback=ours))
    last_alone = x.shape[1] - 1  # which mlx-lm reads by itself
    assert [one for one in theirs if one[0] != last_alone or step == 1] == [
        one for one in ours if one[0] != last_alone or step == 1
    ]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("step", [9, 2048])
def test_a_cpu_tells_of_each_layer_when_it_is_done(both, step, monkeypatch):
    model, processor = both
    x = model.embed(**processor(QUESTION, PICTURE))
    decoder, told, events = model.language_model, Told(), []
    cache = decoder.make_cache()
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *a: events.append("done") or evaluate(*a))

    def tell(processed, total):
        told(processed, total)
        assert events
        events.clear()

    logits = prefill(x, decoder, cache, step, tell)
    chunks, layers = -(-x.shape[1] // step), len(decoder.layers)
    assert len(told) == chunks * (layers + 1) + 1
    assert (told[0], told[-1]) == ((0, x.shape[1]), (x.shape[1], x.shape[1]))
    assert all(a[0] <= b[0] for a, b in pairwise(told))
    silent = prefill(x, decoder, decoder.make_cache(), step)
    assert np.array_equal(np.array(logits), np.array(silent))


@pytest.mark.usefixtures("machine")
def test_what_is_cached_is_not_counted(loaded):
    model, processor = loaded
    told, cache = Told(), PromptCache(model)
    for question, pictures in ((QUESTION, [PICTURE]), (QUESTION + " And why?", [PICTURE])):
        parts = stream_generate(
            *(model, processor, question, pictures),
            max_tokens=3,
            prompt_cache=cache,
            prompt_progress_callback=told,
        )
        *_, last = parts
        unread = last.prompt_tokens - last.cached_tokens
        assert told.of_each()[-1][-1] == (unread, unread)
    assert last.cached_tokens > 16


def test_all_is_read_before_the_first_token_is_said(loaded):
    told = Told()
    stream = stream_generate(*loaded, QUESTION, [PICTURE, PICTURE], prompt_progress_callback=told)
    assert not told
    first = next(stream)
    assert told[-1] == (first.prompt_tokens, first.prompt_tokens)
    assert told.of_each() == [told]
    stream.close()
    assert generate(*loaded, QUESTION, PICTURE, max_tokens=4) == generate(
        *loaded, QUESTION, PICTURE, max_tokens=4, prompt_progress_callback=told
    )


@pytest.mark.parametrize("ahead", [True, False])
def test_prompts_that_are_read_together_are_counted_together(loaded, ahead, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(steps, "on_cpu", lambda: not ahead)
    prompts = ["What?", "What is here, and why is it here?", "Where?"]
    pictures = [PICTURE, None, [PICTURE, PICTURE]]
    told = Told()
    answers = batch_generate(
        model, processor, prompts, pictures, batch_size=2, max_tokens=4,
        prompt_progress_callback=told,
    )  # fmt: skip
    assert answers == batch_generate(model, processor, prompts, pictures, max_tokens=4)
    lengths = [processor(p, i).input_ids.shape[1] for p, i in zip(prompts, pictures, strict=True)]
    together, alone = told.of_each()
    assert together[0] == (0, lengths[0] + lengths[1])
    assert (lengths[0], sum(lengths[:2])) in together
    assert together[-1] == (sum(lengths[:2]), sum(lengths[:2]))
    assert (alone[0], alone[-1]) == ((0, lengths[2]), (lengths[2], lengths[2]))
    for one in (together, alone):
        assert all(a[0] <= b[0] for a, b in pairwise(one))


def test_what_a_schema_forces_is_no_part_of_a_batchs_prompts(loaded):
    model, processor = loaded
    told = Told()
    generator = BatchGenerator(model, processor, prompt_progress_callback=told)
    lengths = []
    for schema in (None, {"const": "a cat"}):
        inputs = processor(QUESTION, PICTURE)
        lengths.append(inputs.input_ids.shape[1])
        generator.insert(inputs, Options(max_tokens=8, json_schema=schema))
    list(run(generator))
    assert {total for _, total in told} == {sum(lengths)}
    assert told[-1] == (sum(lengths), sum(lengths))


def test_a_session_tells_of_each_answer(loaded):
    session = Session(*loaded, max_tokens=3)
    for question, pictures in (("What?", [Picture.read(str(PICTURE))]), ("Why?", [])):
        session.ask(question, pictures)
        told = Told()
        *_, last = session.answer(told)
        assert told[-1] == (last.prompt_tokens - last.cached_tokens,) * 2
