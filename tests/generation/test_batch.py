"""Many prompts at once: every row's answer is the one it would have alone."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_llava import batch_generate, generate, stream_generate
from mlx_llava.analysis.random_model import random_config
from mlx_llava.generate import main
from mlx_llava.generation.batch import BatchGenerator, run
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.sampling import Options
from mlx_llava.model.batch_cache import make_batch_cache
from mlx_llava.model.cache import fork
from mlx_llava.model.llama import LanguageModel
from tests.conftest import GOLDENS, PICTURE

MODEL = str(GOLDENS / "llava")


pytestmark = pytest.mark.usefixtures("machine")


def picture(seed: int, size=(40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


PROMPTS = [
    ("What is this?", [picture(0)]),
    ("A much longer question, of many words, about nothing at all.", []),
    ("<image> or <image>?", [picture(1, (20, 90)), picture(2)]),
    ("x", [picture(0)]),
    ("And this?", [picture(3), picture(0), picture(4)]),
]
LENGTHS = [5, 12, 9, 1, 7]


def alone(model, processor, **options):
    return [
        generate(model, processor, prompt, images, max_tokens=n, **options)
        for (prompt, images), n in zip(PROMPTS, LENGTHS, strict=True)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_rows_are_their_single_runs(both, batch_size):
    prompts, images = zip(*PROMPTS, strict=True)
    texts = batch_generate(*both, prompts, images, max_tokens=LENGTHS, batch_size=batch_size)
    assert texts == alone(*both)


@pytest.mark.parametrize(
    "options",
    [
        {"temp": 1.0, "seed": 7},
        {"temp": 0.8, "top_p": 0.9, "seed": 1},
        {"repetition_penalty": 1.5},
        {"stop": ["a", "e"]},
    ],
    ids=str,
)
def test_each_row_has_its_own_sampling_and_stop(loaded, options):
    prompts, images = zip(*PROMPTS, strict=True)
    own = {
        name: [value] + [Options.__dataclass_fields__[name].default] * 4
        for name, value in options.items()
    }
    texts = batch_generate(*loaded, prompts, images, max_tokens=LENGTHS, **own)
    assert texts == alone(*loaded, **options)[:1] + alone(*loaded)[1:]


@pytest.mark.parametrize("window", [None, 6])
def test_rows_of_any_length_share_a_step(window):
    config = replace(random_config("tiny", 3).text_config, sliding_window=window)
    decoder = LanguageModel(config)
    caches, alone = [], []
    for length in (3, 9, 300):
        ids = mx.random.randint(0, 99, (1, length))
        caches.append(decoder.make_cache())
        decoder(ids, cache=caches[-1])
        alone.append(decoder(mx.array([[7]]), cache=fork(caches[-1], length)))
    batch = make_batch_cache()
    for cache in caches:
        batch.join(cache)
    logits = decoder(mx.full((3, 1), 7), cache=batch.step([1, 1, 1]))
    assert mx.allclose(logits, mx.concatenate(alone), atol=1e-5)
    assert [batch.extract(row)[0].offset for row in range(3)] == [4, 10, 301]


def test_rows_leave_and_join(loaded):
    model, processor = loaded
    generator = BatchGenerator(model, processor, batch_size=2)
    inputs = [processor(prompt, images) for prompt, images in PROMPTS]
    for row, n in zip(inputs[:3], LENGTHS, strict=False):
        generator.insert(row, Options(max_tokens=n))
    texts = dict.fromkeys(range(5), "")
    running = []
    for step in range(100):
        if step == 3:
            for row, n in zip(inputs[3:], LENGTHS[3:], strict=True):
                generator.insert(row, Options(max_tokens=n))
        responses = generator.next()
        running.append({uid for uid, _ in responses})
        for uid, response in responses:
            texts[uid] += response.text
        if step > 3 and generator.is_idle:
            break
    assert list(texts.values()) == alone(model, processor)
    assert max(map(len, running)) == 2
    assert {0, 1} in running
    assert {1, 2} in running


def test_a_row_that_is_removed_says_nothing_more_and_disturbs_nobody(loaded):
    model, processor = loaded
    generator = BatchGenerator(model, processor, batch_size=2)
    for prompt, images in PROMPTS[:3]:
        generator.insert(processor(prompt, images), Options(max_tokens=9))
    texts = {0: "", 1: "", 2: ""}
    for step in range(30):
        if step == 2:
            generator.remove(0)
        for uid, response in generator.next():
            assert not (uid == 0 and step >= 2)
            texts[uid] += response.text
    assert generator.is_idle
    for uid in (1, 2):
        prompt, images = PROMPTS[uid]
        assert texts[uid] == generate(model, processor, prompt, images, max_tokens=9)


def test_pictures_are_encoded_together_and_once(loaded, monkeypatch):
    model, processor = loaded
    calls = []
    encode = type(model).encode_images
    monkeypatch.setattr(
        type(model),
        "encode_images",
        lambda self, pixels, sizes=None: calls.append(len(pixels)) or encode(self, pixels, sizes),
    )
    prompts, images = zip(*PROMPTS, strict=True)
    batch_generate(model, processor, prompts, images, max_tokens=2)
    assert calls == [5]  # of seven pictures, two are there again


def test_pictures_are_read_when_their_prompt_has_a_place(loaded, monkeypatch):
    model, processor = loaded
    waiting: list[int] = []
    call, step = type(processor).__call__, BatchGenerator.next

    def answered(self):
        waiting.append(0)
        return step(self)

    def read(self, *args, **kwargs):
        waiting[-1:] = [waiting[-1] + 1] if waiting else [1]
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(processor), "__call__", read)
    monkeypatch.setattr(BatchGenerator, "next", answered)
    texts = batch_generate(model, processor, ["hi"] * 9, [PICTURE] * 9, batch_size=2, max_tokens=3)
    assert len(set(texts)) == 1
    assert max(waiting) == 2
    assert sum(waiting) == 9


def test_rows_wait_for_memory(loaded, monkeypatch):
    """What all that run will need counts, not one prompt's need alone."""
    model, processor = loaded
    generator = BatchGenerator(model, processor, batch_size=4)
    for _ in range(6):
        generator.insert(processor("What is this?", PICTURE), Options(max_tokens=9))
    need = generator._bytes([generator._waiting[0].length])

    def available() -> int:
        return int(2.5 * need) - generator._cache.nbytes

    monkeypatch.setattr("mlx_llava.generation.batch.available_memory", available)
    together, texts = 0, {}
    while not generator.is_idle:
        for uid, response in generator.next():
            texts[uid] = response.answer
        together = max(together, len(generator._rows))
    assert together == 2
    assert set(texts.values()) == {generate(*loaded, "What is this?", PICTURE, max_tokens=9)}
    assert len(texts) == 6
    monkeypatch.setattr("mlx_llava.generation.batch.available_memory", lambda: 0)
    generator.insert(processor("hi"), Options(max_tokens=2))
    assert len(list(run(generator))) == 2  # alone, what fitted when it came is answered


def test_many_tiles_go_through_the_tower_some_at_a_time(loaded, monkeypatch):
    model, processor = loaded
    inputs = processor("<image>" * 19, [picture(seed) for seed in range(19)])
    whole = model.encode_images(inputs.pixel_values)
    monkeypatch.setattr("mlx_llava.model.llava.TILES_AT_ONCE", 4)
    assert len(whole) == 19
    for a, b in zip(whole, model.encode_images(inputs.pixel_values), strict=True):
        assert mx.allclose(a, b, atol=1e-5)


def test_a_batch_uses_and_fills_a_prompt_cache(loaded):
    model, processor = loaded
    cache = PromptCache(model)
    first = list(stream_generate(*loaded, "What is this?", PICTURE, prompt_cache=cache))
    generator = BatchGenerator(model, processor, prompt_cache=cache)
    for _ in range(2):
        generator.insert(processor("What is this?", PICTURE), Options(max_tokens=5))
    responses = list(run(generator))
    assert {response.cached_tokens for _, response in responses} == {first[0].prompt_tokens - 1}
    tokens = [response.token for uid, response in responses if uid == 1]
    assert tokens == [part.token for part in first[:5]]


def test_wrong_batches_are_named(loaded):
    model, processor = loaded
    with pytest.raises(ValueError, match="2 prompts but images for 1"):
        batch_generate(model, processor, ["a", "b"], [None])
    with pytest.raises(ValueError, match="2 prompts but 3 values of temp"):
        batch_generate(model, processor, ["a", "b"], temp=[0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="batch size is 0"):
        BatchGenerator(model, processor, batch_size=0)
    with pytest.raises(ValueError, match="at a time; the inputs hold 2"):
        BatchGenerator(model, processor).insert(processor(["a", "b"]))
    with pytest.raises(ValueError, match="context is 777"):
        BatchGenerator(model, processor).insert(processor("x " * 900))
    with pytest.raises(ValueError, match="temp is -1"):
        BatchGenerator(model, processor).insert(processor("x"), Options(temp=-1))


def lines_of(capsys, *arguments) -> tuple[int, list[dict], str]:
    code = main(["--model", MODEL, "--max-tokens", "6", *arguments])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_a_file_of_prompts(capsys, loaded, tmp_path):
    records = [
        {"prompt": "What is this?", "images": [str(PICTURE)], "id": "a"},
        {"prompt": "hi", "max_tokens": 2},
        {"prompt": [{"role": "user", "content": "hi"}], "temp": 1.0, "seed": 3},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    code, lines, err = lines_of(capsys, "--prompts-file", str(path), "--batch-size", "2")
    assert (code, err) == (0, "")
    answers = {line["index"]: line for line in lines}
    assert answers[0]["id"] == "a"
    assert answers[0]["text"] == generate(*loaded, "What is this?", PICTURE, max_tokens=6)
    assert answers[1]["text"] == generate(*loaded, "hi", max_tokens=2)
    assert answers[2]["text"] == generate(*loaded, "hi", max_tokens=6, temp=1.0, seed=3)
    assert answers[0]["image_tokens"] == 16
    assert [line["index"] for line in lines] == [0, 1, 2]  # though the second ends first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts-file", "x", "--image", "y"], "--prompts-file does not go with --image"),
        (["--prompt", "x", "--batch-size", "2"], "--batch-size is for --prompts-file"),
        (["--prompts-file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompts-file", "-", "--batch-size", "0"], "batch size is 0"),
    ],
)
def test_arguments_that_do_not_go_together(capsys, arguments, message):
    code, _, err = lines_of(capsys, *arguments)
    assert code == 2
    assert message in err
