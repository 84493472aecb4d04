"""The embedded model is what its card says, here, in transformers and for held-out pictures."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llava import batch_generate, generate, load
from mlx_llava.checkpoint.hub import embedded_model, embedded_note
from mlx_llava.folders import MANIFEST
from mlx_llava.generate import main
from tests.conftest import ROOT, as_on

sys.path.insert(0, str(ROOT / "scripts"))
import measure_tiny
import shapes
import train_tiny

FOLDER = ROOT / "weights" / "tiny-llava"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
SHAPES = FOLDER / "examples" / "shapes.png"
QUESTION = "What is in this picture?"


@pytest.fixture(scope="module")
def embedded():
    return load(dtype="float32")


def test_it_is_small_and_in_half_precision():
    assert embedded_model() == FOLDER
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 8e6
    model, _ = load(as_stored=True)
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.float16}


def test_a_new_one_takes_the_place_of_its_own_files_alone(tmp_path):
    made, out = tmp_path / "made", tmp_path / "out"
    for folder, text in ((made, "new"), (out, "old")):
        (folder / "examples").mkdir(parents=True)
        for name in ("config.json", "examples/shapes.png"):
            (folder / name).write_text(text)
    (made / MANIFEST).write_text("{}")
    (out / "examples" / "notes.txt").write_text("mine")
    train_tiny.publish(made, out)
    assert {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.*")} == {
        "config.json": "new",
        "examples/shapes.png": "new",
        "examples/notes.txt": "mine",
    }


def test_its_script_writes_over_no_other_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        train_tiny.main()
    assert f"{tmp_path} exists already" in capsys.readouterr().err


def test_the_command_uses_it_and_says_so(capsys):
    arguments = ["--image", str(SHAPES), "--prompt", QUESTION]
    assert main(arguments) == 0
    answer, said = capsys.readouterr()
    assert said.startswith(embedded_note() + "\n")
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr() == (answer, "")
    assert main([*arguments, "--model", str(FOLDER)]) == 0
    assert embedded_note() not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "model"),
    [
        (5.7e9, "llava-hf/llava-interleave-qwen-0.5b-hf (downloads 1.8 GB)"),
        (11.8e9, "mlx-community/llava-1.5-7b-4bit (downloads 4 GB)"),
        (24e9, "llava-hf/llava-1.5-7b-hf (downloads 14 GB)"),
    ],
)
def test_a_model_of_photographs_is_named_that_fits_the_machine(memory, model, monkeypatch):
    """What Metal recommends on Macs of 8 and 16 GB, and more."""
    monkeypatch.setattr("mlx_llava.checkpoint.download.total_memory", lambda: memory)
    assert embedded_note().endswith(f"for photographs: --model {model}")


def test_its_vocabulary_is_what_it_was_trained_with(embedded):
    """Ids of questions and of any text, and texts of ids, by their digest."""
    tokenizer = embedded[1].tokenizer
    chance = random.Random(0)
    scenes = [shapes.make_scene(chance, split) for split in shapes.SPLITS for _ in range(20)]
    texts = [q.text + q.answer for s in scenes for q in shapes.conversation(chance, s)]
    texts += [shapes.describe(scene, places=True) for scene in scenes]
    texts += [QUESTION, "", " ", "\n \n\n", "\t\r\0\x7f", "It's 3.5 naïve 猫 🦙 ▁ Ġ <0x41> é"]
    texts += [
        "USER: <image>\n at the top left ASSISTANT: top right</s>",
        "".join(map(chr, range(400))),
    ]
    ids = [tokenizer.encode(text) for text in texts]
    assert all(
        tokenizer.decode(i) == text.lstrip(" ") for i, text in zip(ids[:200], texts, strict=False)
    )
    after = [tokenizer.decode([6, i]) for i in range(len(tokenizer.spec["model"]["vocab"]) + 8)]
    said = json.dumps([ids, [tokenizer.decode(i) for i in ids], after])
    assert (
        hashlib.sha256(said.encode()).hexdigest()
        == "f11c8fc378285de5d8571d5b1dddce9202f7ea2c4539e602edffff8bc9097761"
    )


def test_readers_that_go_by_the_decoder_can_tell_the_bytes_of_its_pieces(embedded):
    """llguidance's, which mistral.rs uses: ByteLevel alone, or ByteFallback and characters."""
    spec, tokenizer = embedded[1].tokenizer.spec, embedded[1].tokenizer
    assert "ByteFallback" in [step["type"] for step in spec["decoder"]["decoders"]]
    pieces = spec["model"]["vocab"]
    assert all(piece.isascii() for piece in pieces)
    assert {bytes([i]) for i in range(256)} <= {tokenizer.bytes_of(i) for i in pieces.values()}


def table_of(title: str) -> dict[str, list[float]]:
    """The rates of a table of the card, by row."""
    text = CARD[CARD.index(title) :]
    rows = re.findall(r"^\| ([a-z/]+) \| (\d.+) \|$", text.split("\n\n## How")[0], re.M)
    rows = rows[: 1 + len(shapes.TYPES)]
    return {name: [float(c.split(" ")[0]) for c in cells.split(" | ")] for name, cells in rows}


def test_the_card_reports_what_was_asked_for():
    by_split, by_bits = table_of("## Accuracy"), table_of("The held-out questions with")
    assert by_split.keys() == by_bits.keys() == {"all", *shapes.TYPES}
    counts = re.findall(r"^\| all .*?/(\d+) .*/(\d+) \|$", CARD, re.M)
    assert counts == [("1050", "2100"), ("2100", "2100")]
    held_out = {name: cells[0] for name, cells in by_bits.items()}
    assert held_out.pop("all") >= 97
    assert min(held_out.values()) >= 93
    sixteen, eight, _ = by_bits["all"]
    assert abs(sixteen - eight) <= 1
    below = CARD[CARD.index("## What it does not know") :]
    said = dict(re.findall(r"^\| ([\w' ()]+) \| ([\d.]+) \(", below, re.M))
    assert float(said["photographs (held out)"]) >= 95
    assert float(said["its own drawings"]) <= 1
    (near,) = re.findall(r"projected patch does: ([\d.]+) \(", below)
    assert float(near) >= 80


def test_held_out_is_what_training_never_shows_nor_names():
    for number in range(2000):
        chance = random.Random(number)
        scene = shapes.make_scene(chance, "train")
        for thing in scene.things:
            assert thing.pair not in shapes.HELD_OUT_PAIRS
            assert thing.cell != shapes.held_out_place(*thing.pair)
        said = [shapes.facts(chance, scene), shapes.describe(scene)]
        said += [q.text + q.answer for q in shapes.conversation(chance, scene)]
        for colour, shape in shapes.HELD_OUT_PAIRS:
            assert f"{colour} {shape}" not in " ".join(said)
    for split, is_held_out in (
        ("pairs", lambda thing: thing.pair in shapes.HELD_OUT_PAIRS),
        ("places", lambda thing: thing.cell == shapes.held_out_place(*thing.pair)),
        ("new", lambda thing: thing.colour in shapes.NEW_COLOURS),
    ):
        assert all(is_held_out(scene.things[0]) for scene in shapes.make_scenes(split, 300, 0))


def test_facts_are_true_and_anything_may_be_looked_up_first():
    firsts = set()
    for number in range(300):
        chance = random.Random(number)
        scene = shapes.make_scene(chance, "train")
        for key, said in re.findall(r"((?:\w+ )?\w+): ([\w, ]+)\.", shapes.facts(chance, scene)):
            names = {"place": key, "shape": key, "colour": key, "pair": tuple(key.split())}
            ((by, thing),) = [
                (name, thing)
                for name, value in names.items()
                for thing in scene.things
                if getattr(thing, name) == value
            ]
            if by == "place":
                assert said == str(thing)
                continue
            known = ("colour", "shape") if by == "pair" else (by,)
            values = {name: getattr(thing, name) for name in ("colour", "shape", "size", "place")}
            rest = {value: name for name, value in values.items() if name not in known}
            assert sorted(said.split(", ")) == sorted(rest)
            firsts.add((by, rest[said.split(", ")[0]]))
    assert len(firsts) == 3 + 3 + 2


def test_questions_have_one_right_answer():
    """Counted again from the scene, whatever way the question was made."""
    for number in range(1500):
        chance = random.Random(number)
        scene = shapes.make_scene(chance, shapes.SPLITS[number % 4])
        for type_ in shapes.TYPES:
            question = shapes.ask(chance, scene, type_)
            if question is None:
                continue
            words = question.text.rstrip("?.").replace("crosses", "cross").split()
            words = [word.removesuffix("s") if word != "cross" else word for word in words]
            place = question.text.rpartition(" at the ")[2].partition("?")[0]
            place = next((p for p in sorted(shapes.PLACES, key=len) if place.startswith(p)), None)
            if " at the " not in question.text:
                place = None
            elif place is not None:
                place = max((p for p in shapes.PLACES if f"at the {p}" in question.text), key=len)
            fits = [
                thing
                for thing in scene.things
                if (place is None or thing.place == place)
                and (thing.shape in words or not {*words} & {*shapes.SHAPES} or type_ == "yes/no")
                and (thing.colour in words or not {*words} & {*shapes.COLOURS} or type_ == "yes/no")
            ]
            if type_ in ("colour", "shape", "size", "position"):
                assert len(fits) == 1, question
                values = {"position": fits[0].place, "size": fits[0].size}
                values |= {"colour": fits[0].colour, "shape": fits[0].shape}
                assert question.answer == values[type_], question
            elif type_ == "count":
                assert question.answer == shapes.NUMBERS[len(fits)], question


def ask(model, processor, folder, split: str, count: int, seed: int) -> list[tuple]:
    shapes.write_split(folder, split, count, seed)
    questions = [json.loads(line) for line in (folder / "question.jsonl").read_text().splitlines()]
    texts = batch_generate(
        model,
        processor,
        [[{"role": "user", "content": question["text"]}] for question in questions],
        [folder / question["image"] for question in questions],
        max_tokens=64,
    )
    return [(q, text) for q, text in zip(questions, texts, strict=True)]


@pytest.mark.parametrize("split", ["pairs", "places"])
def test_it_is_right_about_what_it_never_saw(split, embedded, tmp_path):
    answers = ask(*embedded, tmp_path, split, count=70, seed=77)
    right = [question["answer"] == text for question, text in answers]
    assert sum(right) >= 0.9 * len(right)


def test_transformers_gives_the_same_answers(embedded, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from PIL import Image

    model = transformers.LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(FOLDER)
    answers = ask(*embedded, tmp_path, "seen", count=21, seed=3)
    with as_on("mac"):
        assert ask(*load(as_stored=True), tmp_path, "seen", count=21, seed=3) == answers
    for question, ours in answers:
        parts = [{"type": "image"}, {"type": "text", "text": question["text"]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        picture = Image.open(tmp_path / question["image"])
        batch = processor(text=prompt, images=picture, return_tensors="pt")
        batch.pop("token_type_ids", None)
        inputs = embedded[1]([{"role": "user", "content": question["text"]}], picture)
        assert inputs.input_ids.tolist() == batch["input_ids"].tolist()
        with torch.no_grad():
            tokens = model.generate(**batch, max_new_tokens=64, do_sample=False)
        theirs = processor.decode(
            tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert ours == theirs, question


def test_a_conversation_goes_on(embedded):
    first = generate(*embedded, "How many objects are there?", SHAPES)
    turns = [
        {"role": "user", "content": "How many objects are there?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": QUESTION},
    ]
    assert generate(*embedded, turns, SHAPES) == generate(*embedded, QUESTION, SHAPES)


def test_intervals_are_wilsons():
    assert measure_tiny.wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert measure_tiny.wilson(100, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)


def test_the_fast_functions_of_its_training_are_mlxs(uncompiled):
    import fast_cpu
    import mlx.nn as nn

    x = mx.random.normal((3, 40, 40)) * 20
    weight = mx.random.normal(x.shape)
    for ours, theirs in (
        (fast_cpu.softmax, lambda x: mx.softmax(x, axis=-1)),
        (lambda x: fast_cpu.gate(x, mx.array(1.0)), nn.silu),
        (lambda x: fast_cpu.gate(x, mx.array(1.702)), nn.gelu_fast_approx),
    ):
        values = [mx.value_and_grad(lambda x: (f(x) * weight).sum())(x) for f in (ours, theirs)]  # noqa: B023
        assert mx.abs(ours(x) - theirs(x)).max() < 1e-5
        assert mx.abs(values[0][1] - values[1][1]).max() < 1e-5


def test_masked_scores_leave_nothing_subnormal(uncompiled):
    """With which the gradients of a step took five times as long as all the rest."""
    import fast_cpu

    assert fast_cpu.exp(mx.array([-1e9, -100.0, -89.0])).tolist() == [0, 0, 0]
    x = np.linspace(-87, 5, 1001, dtype=np.float32)
    expected = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(np.array(fast_cpu.exp(mx.array(x))), expected, rtol=1e-5)


def test_with_them_training_is_compiled():
    """Each is one kernel only where it is."""
    import fast_cpu

    from mlx_llava.tuner import trainer

    before = trainer.compiles, mx.fast.scaled_dot_product_attention
    with fast_cpu.installed():
        assert trainer.compiles()
        assert mx.fast.scaled_dot_product_attention is fast_cpu.attention
    assert (trainer.compiles, mx.fast.scaled_dot_product_attention) == before
