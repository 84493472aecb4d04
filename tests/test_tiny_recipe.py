"""What the embedded model is made from: other pictures, the mix, and the pull to words."""

from __future__ import annotations

import json
import random
import sys

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_llava import load
from mlx_llava.tuner import trainer
from mlx_llava.tuner.data import IGNORED, Batch
from mlx_llava.tuner.recipe import answer_loss
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import measure_tiny
import others
import patches
import shapes
import train_tiny

ALL_KINDS = [*others.KINDS, *others.HELD_OUT_KINDS]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_picture_of_a_kind_is_no_drawing_and_comes_from_its_seed(kind):
    pictures = [others.make(kind, seed) for seed in range(8)]
    assert {(p.mode, p.size) for p in pictures} == {("RGB", (shapes.SIDE, shapes.SIDE))}
    assert len({p.tobytes() for p in pictures}) == 8
    assert others.make(kind, 3).tobytes() == pictures[3].tobytes()
    assert not any(others.could_be_drawn(picture) for picture in pictures)


def test_every_drawing_of_the_world_is_told_as_one():
    scenes = [scene for split in shapes.SPLITS for scene in shapes.make_scenes(split, 40, seed=5)]
    assert all(others.could_be_drawn(scene.draw()) for scene in scenes)


def test_kinds_for_measuring_are_not_shown_in_training():
    assert not others.KINDS.keys() & others.HELD_OUT_KINDS.keys()
    assert not any("photo" in kind for kind in others.KINDS)


def test_whatever_is_asked_has_the_same_honest_answer():
    chance = random.Random(0)
    asked = others.conversation(chance, 300)
    assert {question.answer for question in asked} == {others.ANSWER}
    assert len({question.text for question in asked}) > 100
    part = sum(question.text in others.OPEN_QUESTIONS for question in asked) / len(asked)
    assert part == pytest.approx(others.OPEN, abs=0.1)
    for colour, shape in shapes.HELD_OUT_PAIRS:
        assert f"{colour} {shape}" not in " ".join(question.text for question in asked)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A small set of what the stages learn."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny, "PICTURES", 120)
        patch.setattr(train_tiny, "OTHERS", 30)
        train_tiny.make_data(folder / "train")
    return folder


@pytest.mark.parametrize("file", ["facts", "captions", "short", "long"])
def test_each_stage_sees_both_and_refuses_others_alone(work, file):
    samples = json.loads((work / "train" / f"{file}.json").read_text())
    assert [sample["id"] for sample in samples] == list(range(150))
    for sample in samples:
        image = Image.open(work / "train" / sample["image"])
        said = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
        refused = [others.ANSWER in text for text in said]
        assert others.could_be_drawn(image) == (sample["id"] < 120)
        assert all(refused) if sample["id"] >= 120 else not any(refused)


def test_each_word_of_the_answer_is_a_token(work):
    model, processor = train_tiny.new_model(work)
    words = others.ANSWER.rstrip(".").split()
    ids = processor.tokenizer.encode(f" {others.ANSWER}")
    assert len(ids) == len(["<s>", *words, "."])
    assert len(processor.tokenizer.spec["model"]["vocab"]) <= model.config.text_config.vocab_size


def test_patches_of_other_pictures_have_a_name_of_their_own():
    scene = shapes.make_scene(random.Random(1), "train")
    drawn, other = patches.names_of([scene, None], 6)
    places = list(patches.NAMES)
    assert not drawn[:, places.index("other")].any()
    assert other[:, places.index("other")].all()
    assert not other[:, :3].any()
    assert np.count_nonzero(drawn[:, places.index("shape")]) == 4 * len(scene.things)


def heads_that_say(folder, name: int) -> None:
    """Heads that give every patch the same name."""
    arrays = {}
    for head in ("shape", "colour", "size", "cell"):
        arrays[f"{head}.weight"] = mx.zeros((patches.NAMES[head], 128))
        arrays[f"{head}.bias"] = mx.arange(patches.NAMES[head]) == name
    mx.save_safetensors(str(folder), arrays)


def test_the_pull_is_the_distance_of_patches_of_things_from_their_words(tmp_path):
    model, processor = load(dtype="float32")
    model.train()
    pixels = processor.image_processor([shapes.make_scene(random.Random(2), "train").draw()])
    prompt = processor("Describe the picture.", shapes.make_scene(random.Random(2), "train").draw())
    ids = mx.array(prompt.input_ids)
    labels = mx.where(mx.arange(ids.shape[1]) < ids.shape[1] - 2, IGNORED, ids)
    batch = Batch(ids, labels, mx.array(pixels), None)
    plain, count = answer_loss(model, batch)
    path = tmp_path / "heads.safetensors"
    heads_that_say(path, 0)
    with patches.pulled_to_words(path, processor.tokenizer):
        nothing, _ = trainer.answer_loss(model, batch)
    heads_that_say(path, 1)
    with patches.pulled_to_words(path, processor.tokenizer):
        pulled, _ = trainer.answer_loss(model, batch)
    assert trainer.answer_loss is answer_loss
    assert nothing.item() == pytest.approx(plain.item(), rel=1e-5)

    table = np.array(model.language_model.model.embed_tokens.weight, np.float64)
    projected = np.array(model.encode_images(mx.array(pixels))[0], np.float64)
    for vectors in (table, projected):
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    scores = patches.SHARPNESS * projected @ table.T
    far = np.log(np.exp(scores).sum(axis=-1))
    words = [
        processor.tokenizer.encode(f" {word}")[-1] for word in ("circle", "red", "large", "top")
    ]
    distance = np.mean([far - scores[:, word] for word in words])
    expected = plain.item() + patches.PULL * count.item() * distance
    assert pulled.item() == pytest.approx(expected, rel=1e-4)


def test_refusals_are_counted_by_kind_and_on_its_own_drawings(tmp_path, monkeypatch):
    model = ROOT / "weights" / "tiny-llava"
    monkeypatch.setattr(measure_tiny, "OTHERS", 1)
    monkeypatch.setattr(measure_tiny, "PHOTOGRAPHS", tmp_path / "none")
    measure_tiny.measure_all(model, tmp_path, 21, 0)
    counts = measure_tiny.measure_refusals(model, tmp_path, 0)
    assert {kind: count for kind, (_, count) in counts.items()} == {
        "all": len(ALL_KINDS), **dict.fromkeys(ALL_KINDS, 1), "its own drawings": 3 * 21
    }  # fmt: skip
    table = measure_tiny.refusal_table(counts).splitlines()
    assert len(table) == 2 + len(counts)
    assert "| bokeh (held out) |" in table[-2]


def test_crops_of_photographs_are_squares_that_come_from_their_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_tiny, "CROPS", 6)
    paths = [tmp_path / "wide.png", tmp_path / "high.png"]
    for path, size in zip(paths, ((200, 120), (100, 150)), strict=True):
        others.make("leaves", 0).resize(size).save(path)
    cut = measure_tiny.crops(paths, 1)
    assert all(c.width == c.height >= others.SIDE for c in cut)
    assert len(cut) == 6
    assert [c.tobytes() for c in cut] == [c.tobytes() for c in measure_tiny.crops(paths, 1)]


def test_patches_near_words_are_counted(monkeypatch):
    monkeypatch.setattr(measure_tiny, "DRAWINGS", 3)
    scenes = shapes.make_scenes("seen", 3, seed=4)
    hits, count = measure_tiny.near_words(ROOT / "weights" / "tiny-llava", 4)
    assert count == 4 * sum(len(scene.things) for scene in scenes)
    assert 0 <= hits <= count
