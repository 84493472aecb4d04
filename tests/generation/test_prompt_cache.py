"""What was read before is not read again, and nothing of one picture is used for another."""

from __future__ import annotations

import json
import shutil
from itertools import product

import mlx.core as mx
import pytest

from mlx_llava import generate, load, stream_generate
from mlx_llava.generate import main
from mlx_llava.generation.batch import BatchGenerator, run
from mlx_llava.generation.prompt_cache import PromptCache, fingerprint
from mlx_llava.generation.sampling import Options
from mlx_llava.generation.steps import generate_step
from mlx_llava.model.cache import KVCache, RollingKVCache, make_cache, nbytes
from tests.conftest import GOLDENS, PICTURE
from tests.generation.test_batch import picture

MODEL = str(GOLDENS / "llava")

pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture
def encoded(loaded, monkeypatch):
    """How many tiles the vision tower has read, call by call."""
    calls: list[int] = []
    encode = type(loaded[0]).encode_images
    monkeypatch.setattr(
        type(loaded[0]),
        "encode_images",
        lambda self, pixels, sizes=None: calls.append(len(pixels)) or encode(self, pixels, sizes),
    )
    return calls


def answer(both, prompt, image, cache, **options):
    parts = list(stream_generate(*both, prompt, image, max_tokens=6, prompt_cache=cache, **options))
    return [part.token for part in parts], parts[-1]


def test_a_second_question_reads_only_itself(both, encoded):
    cache = PromptCache(both[0])
    answer(both, "What is this?", PICTURE, cache)
    del encoded[:]
    tokens, last = answer(both, "And what else?", PICTURE, cache)
    assert encoded == []
    assert last.prompt_tokens - 40 < last.cached_tokens
    assert last.cached_tokens > last.image_tokens
    assert tokens == answer(both, "And what else?", PICTURE, None)[0]


def test_a_conversation_goes_on_from_its_answer(both, encoded):
    cache = PromptCache(both[0])
    question = {"role": "user", "content": "What is this?"}
    first, last = answer(both, [question], PICTURE, cache)
    text = both[1].tokenizer.decode(first)
    messages = [question, {"role": "assistant", "content": text}, {"role": "user", "content": "?"}]
    del encoded[:]
    tokens, after = answer(both, messages, PICTURE, cache)
    assert encoded == []
    assert after.cached_tokens >= last.prompt_tokens
    assert tokens == answer(both, messages, PICTURE, None)[0]


def test_another_picture_is_never_answered_from_this_one(both):
    cache = PromptCache(both[0])
    pictures = [picture(seed) for seed in range(3)]
    pictures.append(pictures[0].copy())
    pictures[3].putpixel((0, 29), (1, 2, 3))  # one pixel is another
    for question, image in product(("What is this?", "And <image>?"), pictures):
        tokens, last = answer(both, question, image, cache)
        assert tokens == answer(both, question, image, None)[0]
        assert last.cached_tokens < last.prompt_tokens


def test_pictures_in_another_order_or_number(both, encoded):
    cache = PromptCache(both[0])
    a, b = picture(1), picture(2)
    for images in ([a], [a, a], [a, b], [b, a], [b], [b, b, a], [a, b]):
        assert answer(both, "x", images, cache)[0] == answer(both, "x", images, None)[0]
    del encoded[:]
    answer(both, "y", [b, a, b], cache)
    assert encoded == []


def test_a_prompt_that_ends_in_a_picture_reads_it_again(loaded):
    cache = PromptCache(loaded[0])
    for _ in range(2):
        tokens, last = answer(loaded, "a <image>", PICTURE, cache, raw=True)
    assert last.cached_tokens == last.prompt_tokens - 16
    assert tokens == answer(loaded, "a <image>", PICTURE, None, raw=True)[0]


def test_an_answer_that_was_not_read_to_its_end_is_kept_as_far_as_it_came(loaded):
    cache = PromptCache(loaded[0])
    stream = stream_generate(*loaded, "hi", PICTURE, prompt_cache=cache)
    next(stream)
    stream.close()
    tokens, last = answer(loaded, "hi", PICTURE, cache)
    assert last.cached_tokens == last.prompt_tokens - 1
    assert tokens == answer(loaded, "hi", PICTURE, None)[0]


def test_what_is_kept_is_bounded(loaded):
    model, _ = loaded
    one = answer(loaded, "0", picture(0), PromptCache(model))[1].prompt_tokens
    size = nbytes(model.language_model.make_cache()[:0])
    assert size == 0
    config = model.config.text_config
    per_token = 8 * config.num_hidden_layers * config.kv_heads * config.dims_per_head
    features = 4 * 16 * config.hidden_size
    cache = PromptCache(model, max_bytes=3 * per_token * (one + 8), max_feature_bytes=2 * features)
    for seed in range(6):
        answer(loaded, str(seed), picture(seed), cache)
    assert len(cache._entries) == 3
    assert len(cache._features) == 2
    assert answer(loaded, "5?", picture(5), cache)[1].cached_tokens > 16
    assert answer(loaded, "0", picture(0), cache)[1].cached_tokens < 16


def ask(capsys, *arguments):
    code = main(["--model", MODEL, "--image", str(PICTURE), "-m", "5", "--json", *arguments])
    out, err = capsys.readouterr()
    return (code, json.loads(out)) if code == 0 else (code, err)


def test_a_prompt_cache_file(capsys, tmp_path, monkeypatch, loaded):
    path = tmp_path / "deep" / "cache"
    arguments = ["--prompt-cache-file", str(path)]
    _, first = ask(capsys, "--prompt", "What is this?", *arguments)
    monkeypatch.setattr(type(loaded[0]), "encode_images", None)  # must not be called
    _, second = ask(capsys, "--prompt", "What else?", *arguments)
    monkeypatch.undo()
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] > 16
    assert second["text"] == generate(*loaded, "What else?", PICTURE, max_tokens=5)
    assert [p.name for p in path.parent.iterdir()] == ["cache"]


def test_without_a_picture_the_one_of_the_cache_file_is_asked_about(
    capsys, tmp_path, monkeypatch, loaded
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(PICTURE, "a.png")
    (tmp_path / "elsewhere").mkdir()
    arguments = ["--model", MODEL, "-m", "5", "--quiet", "--prompt-cache-file", f"{tmp_path}/cache"]
    assert main([*arguments, "--prompt", "What is this?", "--image", "a.png"]) == 0
    monkeypatch.chdir("elsewhere")
    for question in ("What else?", "And now?"):
        capsys.readouterr()
        assert main([*arguments, "--prompt", question]) == 0
        answer = generate(*loaded, question, PICTURE, max_tokens=5)
        assert capsys.readouterr().out == answer + "\n"
    (tmp_path / "a.png").unlink()
    assert main([*arguments, "--prompt", question]) == 2
    assert f"There is no image {tmp_path / 'a.png'}" in capsys.readouterr().err


def test_a_prompt_cache_file_that_does_not_fit_is_refused(capsys, tmp_path):
    path = tmp_path / "cache"
    arguments = ["--prompt", "hi", "--prompt-cache-file", str(path)]
    ask(capsys, *arguments)
    code, err = ask(capsys, *arguments, "--dtype", "float16")
    assert (code, "was made with another model; remove it" in err) == (2, True)
    code, err = ask(capsys, *arguments, "--max-kv-size", "100")
    assert (code, "does not go with --max-kv-size" in err) == (2, True)
    path.write_bytes(b"nonsense")
    code, err = ask(capsys, *arguments)
    assert (code, "is not a prompt cache" in err) == (2, True)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"x": mx.ones(3)})
    code, err = ask(capsys, *arguments[:3], str(tmp_path / "other.safetensors"))
    assert (code, "is not a prompt cache of mlx_llava" in err) == (2, True)


def test_a_model_is_known_by_its_weights(loaded):
    model, _ = load(GOLDENS / "llava")
    assert fingerprint(model) == fingerprint(loaded[0])
    model.language_model.model.norm.weight = model.language_model.model.norm.weight + 1e-3
    assert fingerprint(model) != fingerprint(loaded[0])
    assert fingerprint(load(GOLDENS / "llava_next")[0]) != fingerprint(loaded[0])


def test_a_rolling_cache_keeps_the_first_and_the_last():
    rolling, whole = RollingKVCache(10, keep=4), KVCache()
    numbers = mx.arange(30, dtype=mx.float32).reshape(1, 1, 30, 1)
    for start, stop in [(0, 7), (7, 8), *((i, i + 1) for i in range(8, 30))]:
        new = numbers[:, :, start:stop]
        keys, values = rolling.update_and_fetch(new, -new)
        stored = whole.update_and_fetch(new, -new)[0].flatten().tolist()
        expected = stored if stop <= 10 else stored[:4] + stored[-6:]
        assert sorted(keys.flatten().tolist()) == expected
        assert mx.array_equal(keys, -values)
        assert rolling.offset == stop
    assert not rolling.is_trimmable()
    assert rolling.keys.shape[2] <= 256


def test_a_bounded_cache_answers_like_a_whole_one_until_it_is_full(loaded):
    whole, _ = answer(loaded, "hi", PICTURE, None)
    length = loaded[1]("hi", PICTURE).input_ids.shape[1]
    assert answer(loaded, "hi", PICTURE, None, max_kv_size=length + 6)[0] == whole
    tokens, last = answer(loaded, "hi", PICTURE, None, max_kv_size=length + 2)
    assert tokens[:3] == whole[:3]
    assert last.generation_tokens == 6
    with pytest.raises(ValueError, match=f"max_kv_size is {length} and the prompt.* has {length}"):
        answer(loaded, "hi", PICTURE, None, max_kv_size=length)
    with pytest.raises(ValueError, match="can have one of them"):
        answer(loaded, "hi", PICTURE, None, max_kv_size=90, kv_bits=8)


def test_a_bounded_cache_keeps_all_of_a_prompt_whose_beginning_was_known(loaded):
    """The picture is in the prompt; a long answer must not take its place."""
    cache = PromptCache(loaded[0])
    answer(loaded, "hi", PICTURE, cache, max_kv_size=200)
    longer = "hi, what is this, and what is that, and what else is there to see?"
    size = loaded[1](longer, PICTURE).input_ids.shape[1] + 2
    tokens, last = answer(loaded, longer, PICTURE, cache, max_kv_size=size)
    assert last.cached_tokens > last.image_tokens
    assert tokens == answer(loaded, longer, PICTURE, None, max_kv_size=size)[0]


@pytest.fixture(scope="module")
def wide():
    """The embedded model, whose heads are wide enough for groups of 32."""
    return load(dtype="float32")


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.3)])
def test_a_quantised_cache_is_close(wide, bits, tolerance):
    model, processor = wide
    embeddings = model.embed(**processor("What is in this picture?", picture(0)))
    plain, quantised = (
        [
            logprobs
            for _, logprobs in generate_step(
                embeddings,
                model.language_model,
                cache=make_cache(model.config.text_config, 0, kv_bits),
                max_tokens=3,
            )
        ]
        for kv_bits in (None, bits)
    )
    difference = mx.abs(mx.exp(plain[0]) - mx.exp(quantised[0])).max()
    assert 0 < difference < tolerance


def test_a_quantised_cache_is_reused_and_batched(wide, capsys, tmp_path):
    model, _ = wide
    cache = PromptCache(model)
    options = {"kv_bits": 8}
    answer(wide, "What is it?", PICTURE, cache, **options)
    tokens, last = answer(wide, "How many?", PICTURE, cache, **options)
    assert last.cached_tokens > 36
    assert tokens == answer(wide, "How many?", PICTURE, None, **options)[0]
    assert answer(wide, "How many?", PICTURE, cache)[1].cached_tokens == 0
    generator = BatchGenerator(*wide, kv_bits=8)
    for question in ("How many?", "What is it?"):
        generator.insert(wide[1](question, PICTURE), Options(max_tokens=6))
    assert tokens == [response.token for uid, response in run(generator) if uid == 0]
    arguments = ["--image", str(PICTURE), "--json", "--prompt-cache-file", str(tmp_path / "c")]
    for cached in (False, True):
        assert main([*arguments, "--prompt", "How many?", "--kv-bits", "8"]) == 0
        assert bool(json.loads(capsys.readouterr().out)["cached_tokens"]) == cached
    assert main([*arguments, "--prompt", "How many?"]) == 2
    assert "made with other --kv-bits" in capsys.readouterr().err


def test_heads_that_have_no_groups_are_refused(loaded):
    with pytest.raises(ValueError, match="kv_bits is 8 and a head has"):
        answer(loaded, "hi", PICTURE, None, kv_bits=8)
    with pytest.raises(ValueError, match="kv_bits is 0"):
        answer(loaded, "hi", PICTURE, None, kv_bits=0)
