"""Pictures in fewer tokens, whichever way a question is asked and goes on."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava import generate, load, stream_generate
from mlx_llava.analysis.trace import trace
from mlx_llava.generate import main
from mlx_llava.generation.batch import BatchGenerator, run
from mlx_llava.generation.memory import ContextError
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.sampling import Options
from mlx_llava.generation.session import Picture, Session
from mlx_llava.model.cache import make_cache
from tests.conftest import GOLDENS, PICTURE
from tests.generation.test_batch import picture

pytestmark = pytest.mark.usefixtures("machine")


def answer(both, prompt, image, cache=None, **options):
    options = {"image_tokens": 5, "max_tokens": 6, "prompt_cache": cache, **options}
    parts = list(stream_generate(*both, prompt, image, **options))
    return [part.token for part in parts], parts[-1]


def test_all_features_or_more_are_as_none_left_out(both):
    model, processor = both
    plain = processor("What is this?", PICTURE)
    (whole,) = plain.image_tokens
    for count in (whole, 10_000):
        inputs = processor("What is this?", PICTURE, image_tokens=count)
        assert [*inputs.keys()] == [*plain.keys()]
        assert mx.array_equal(model(**inputs), model(**plain))
        reuse = PromptCache(model)
        answer(both, "What is this?", PICTURE, reuse, image_tokens=None)
        assert answer(both, "What?", PICTURE, reuse, image_tokens=count)[1].cached_tokens > whole


def test_another_number_of_tokens_is_another_picture_to_what_is_kept(both):
    reuse, whole = PromptCache(both[0]), both[1]("", PICTURE).image_tokens[0]
    for count in (5, None, 9, 5, None):
        tokens, last = answer(both, "What is this?", PICTURE, reuse, image_tokens=count)
        assert tokens == answer(both, "What is this?", PICTURE, image_tokens=count)[0]
        assert (last.image_tokens, last.whole_image_tokens) == (count or whole, whole)
    assert last.cached_tokens == last.prompt_tokens - 1


def test_a_prompt_that_goes_on_from_what_was_read_stands_where_it_would_alone(both):
    reuse, pictures = PromptCache(both[0]), [picture(1), picture(2)]
    system = "a <image> b"
    answer(both, f"{system} c", pictures[:1], reuse, raw=True)
    for prompt, images in (
        (f"{system} and <image> d", pictures),
        (f"{system} and <image> e", pictures),
        (f"{system}<image>", pictures),
        (f"{system} and more", pictures[:1]),
    ):
        tokens, last = answer(both, prompt, images, reuse, raw=True)
        assert last.cached_tokens > 5
        assert tokens == answer(both, prompt, images, raw=True)[0]


def test_turns_of_a_conversation_keep_their_pictures_tokens(both):
    session = Session(*both, image_tokens=5, max_tokens=4)
    messages = []
    for text, shown in (("What is this?", [picture(1)]), ("And this?", [picture(2)]), ("So?", [])):
        session.ask(text, [Picture.of(image) for image in shown])
        said = list(session.answer())
        content = [{"type": "image", "image": image} for image in shown]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": text}]})
        tokens = [part.token for part in said]
        assert tokens == answer(both, messages, None, max_tokens=4)[0]
        messages.append({"role": "assistant", "content": session.turns[-1].answer})
    assert said[-1].image_tokens == 10
    assert said[-1].cached_tokens > 10


def test_a_prompt_cache_file_holds_where_tokens_stand(loaded, tmp_path):
    path, reuse = tmp_path / "cache.safetensors", PromptCache(loaded[0])
    answer(loaded, "What is this?", PICTURE, reuse)
    reuse.save(path)
    again = PromptCache(loaded[0])
    again.load(path, make_cache(loaded[0].config.text_config))
    tokens, last = answer(loaded, "What is this, then?", PICTURE, again)
    assert last.cached_tokens > 5
    assert tokens == answer(loaded, "What is this, then?", PICTURE)[0]


def test_rows_of_a_batch_that_are_shown_in_part_whole_or_nothing(both):
    asked = [("a?", picture(1), 3), ("what is b?", picture(2), None), ("c", None, 4)]
    asked += [("and what about d?", picture(3), 9), ("e?", picture(1), 3)]
    rows = [(*row, {"image_tokens": count}) for *row, count in asked]
    alone = [answer(both, prompt, image, **how)[0] for prompt, image, how in rows]
    generator = BatchGenerator(*both, batch_size=3, prompt_cache=PromptCache(both[0]))
    answers: dict[int, list[int]] = {}
    for prompt, image, how in rows:
        answers[generator.insert(both[1](prompt, image, **how), Options(max_tokens=6))] = []
    for uid, part in run(generator):
        answers[uid].append(part.token)
    assert [*answers.values()] == alone


def test_caches_that_hold_less_know_where_tokens_stand(loaded):
    plain, last = answer(loaded, "hello there", PICTURE, max_tokens=20)
    room = last.prompt_tokens + len(plain)
    assert answer(loaded, "hello there", PICTURE, max_tokens=20, max_kv_size=room)[0] == plain


def test_codes_know_where_tokens_stand():
    wide = load(dtype="float32")  # the embedded model, whose heads are wide enough
    reuse = PromptCache(wide[0])
    question = "How many things are there?"
    plain = answer(wide, question, PICTURE, image_tokens=12)[0]
    for cached in (False, True):
        tokens, last = answer(wide, question, PICTURE, reuse, image_tokens=12, kv_bits=8)
        assert tokens == plain
        assert bool(last.cached_tokens) == cached


def test_memory_is_for_the_tokens_and_context_for_the_positions(loaded, monkeypatch):
    processor = loaded[1]
    inputs = processor("hi", PICTURE, image_tokens=5)
    length = inputs.input_ids.shape[1]
    assert inputs.positions == length + 11
    monkeypatch.setattr(processor, "context_length", length + 12)
    assert len(answer(loaded, "hi", PICTURE)[0]) == 1
    monkeypatch.setattr(processor, "context_length", length + 11)
    with pytest.raises(ContextError, match=f"The prompt has {length + 11} tokens"):
        answer(loaded, "hi", PICTURE)


def test_what_makes_no_sense_is_refused(loaded):
    model, processor = loaded
    with pytest.raises(ValueError, match="image_tokens is 0; it must be at least 1"):
        processor("hi", PICTURE, image_tokens=0)
    with pytest.raises(ValueError, match="shown in 5 tokens.*call the model"):
        model.embed(**processor("hi", PICTURE, image_tokens=5))
    with pytest.raises(ValueError, match="leave image_tokens out"):
        trace(model, processor("hi", PICTURE, image_tokens=5))


def test_the_command_says_how_many_tokens_are_left(capsys, loaded):
    arguments = ["--model", str(GOLDENS / "llava"), "--image", str(PICTURE), "-p", "hi", "-m", "3"]
    assert main([*arguments, "--image-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out == generate(*loaded, "hi", PICTURE, image_tokens=5, max_tokens=3) + "\n"
    assert "images: 1, 16 -> 5 tokens\n" in err
    assert main([*arguments, "--image-tokens", "5", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["image_tokens"], figures["whole_image_tokens"]) == (5, 16)
    shown = loaded[1]("hi", PICTURE, image_tokens=5)
    assert "16 -&gt; 5" in shown._repr_html_()
    assert np.count_nonzero(shown.input_ids == loaded[0].config.image_token_index) == 5
