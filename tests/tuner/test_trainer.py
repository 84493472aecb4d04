"""Training: what is learned of a file, and that a run is the same however it is split."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_llava import generate, load
from mlx_llava import train as command
from mlx_llava.checkpoint.save import save
from mlx_llava.fuse import main as fuse
from mlx_llava.generate import main as generate_main
from mlx_llava.inputs.processor import Processor
from mlx_llava.inputs.templates import TEMPLATES
from mlx_llava.tuner import trainer as trainer_module
from mlx_llava.tuner.data import IGNORED, Examples, order
from mlx_llava.tuner.lora import Adapter, add_lora
from mlx_llava.tuner.recipe import TrainingOptions, make_optimizer, make_schedule, prepare
from mlx_llava.tuner.samples import Sample, read_samples
from mlx_llava.tuner.trainer import Trainer
from tests.conftest import GOLDENS, PICTURE, ROOT

LLAVA = GOLDENS / "llava"


def sample(*turns: str, image: str | list[str] | None = None) -> dict:
    speakers = ("human", "gpt")
    conversations = [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"id": 0, "conversations": conversations, **({"image": image} if image else {})}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A training file of ten samples, some with pictures."""
    for name in ("a.png", "b.png"):
        Image.open(PICTURE).rotate(90 * (name == "b.png")).save(tmp_path / name)
    words = "A small dog that sleeps on a red chair near the old yellow house".split()
    samples = []
    for i in range(10):
        image = [None, "a.png", "b.png", ["a.png", "b.png"]][i % 4]
        marks = "<image>\n" * (0 if image is None else 1 if isinstance(image, str) else 2)
        turns = (f"{marks}What is number {i}?", " ".join(words[: i + 1]), "And?", words[i])
        samples.append(sample(*turns, image=image))
    (tmp_path / "train.json").write_text(json.dumps(samples))
    return tmp_path


def examples(folder: Path, processor: Processor, max_length: int = 512) -> Examples:
    reading = read_samples(folder / "train.json", folder, processor.tokenizer.protect)
    assert not reading.left_out
    return Examples(reading.samples, processor, max_length)


# --- what is learned ---


@pytest.mark.parametrize("name", [*TEMPLATES, None])
def test_the_answers_and_their_ends_are_learned_in_every_template(name, tmp_path):
    _, processor = load(LLAVA, template=name)
    turns = ("<image>\nWhat is it? </s>", "A dog there.", "How many?", "five")
    (tmp_path / "train.json").write_text(json.dumps([sample(*turns, image=str(PICTURE))]))
    own = examples(tmp_path, processor)
    own.max_length = 10_000  # more than the model's context: vicuna_v0 has long examples
    ids, labels, pictures = own.row(own.samples[0])
    end = processor.template.stops[0] if name else "</s>"
    learned, runs = [i != IGNORED for i in labels], []
    for i, is_learned in enumerate(learned):
        if is_learned and (i == 0 or not learned[i - 1]):
            runs.append([])
        if is_learned:
            assert labels[i] == ids[i]
            runs[-1].append(ids[i])
    texts = [decode(processor, run) for run in runs]
    space = "" if texts[0][0] != " " else " "
    gap = " " if TEMPLATES.get(name) and TEMPLATES[name].answer.endswith(f" {end}") else ""
    expected = [f"{space}{answer}{gap}{end}" for answer in ("A dog there.", "five")]
    expected = ["".join(expected)] if name == "plain" else expected  # nothing stands between
    assert texts == [decode(processor, processor.tokenizer.encode(text)) for text in expected]
    image = processor.config.image_token_index
    assert ids.count(image) == 16
    assert not any(own for own, i in zip(learned, ids, strict=True) if i == image)
    assert len(pictures) == 1


def decode(processor: Processor, ids: list[int]) -> str:
    """The text of ids, with the special tokens."""
    names = {i: token for token, i in processor.tokenizer.special_tokens.items()}
    return "".join(names.get(i) or processor.tokenizer.decode([i]) for i in ids)


def test_the_prompt_of_an_answer_is_the_prompt_that_generation_sees(tmp_path, loaded):
    _, processor = loaded
    turns = ("<image>\nWhat is it?", "A dog.")
    (tmp_path / "train.json").write_text(json.dumps([sample(*turns, image=str(PICTURE))]))
    own = examples(tmp_path, processor)
    ids, labels, _ = own.row(own.samples[0])
    prompt = processor("What is it?", PICTURE).input_ids[0].tolist()
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert labels[len(prompt) :] == ids[len(prompt) :]
    assert ids[-1] == processor.tokenizer.eos_id


def test_a_leading_answer_is_skipped_and_pictures_move_to_the_front(folder, loaded):
    entry = {
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": "Look: <image> what?"},
            {"from": "gpt", "value": "A"},
            {"from": "human", "value": "and\n<image>"},
            {"from": "gpt", "value": "B"},
        ],
    }
    (folder / "train.json").write_text(json.dumps([entry]))
    (only,) = read_samples(folder / "train.json", folder, loaded[1].tokenizer.protect).samples
    assert [(m.role, m.text, m.images) for m in only.messages] == [
        ("user", "Look:  what?", 1),
        ("assistant", "A", 0),
        ("user", "and", 1),
        ("assistant", "B", 0),
    ]
    text = loaded[1].template.segments(only.messages)
    assert "".join(p.text for p in text).count("<image>\n") == 2


def test_broken_pictures_and_long_rows_are_counted(folder, loaded):
    (folder / "a.png").write_bytes(b"no picture")
    own = examples(folder, loaded[1])
    assert own.batch(range(10)).input_ids.shape[0] == 5
    assert own.problems == {"image is broken": 5}
    assert own.batch([1]) is None
    Image.open(PICTURE).save(folder / "a.png")
    short = examples(folder, loaded[1], max_length=24)
    batch = short.batch([0, 1, 3, 4])
    assert short.problems == {
        "image beyond the longest length": 1,
        "no answer within the longest length": 1,
    }
    assert batch.input_ids.shape == (2, 32)
    assert mx.all(batch.input_ids[:, 24:] == 0)
    told = []
    short.on_left_out = told.append
    short.batch([1, 3])  # known from the epoch before
    short.batch([7])
    assert [str(left_out.place) for left_out in told] == [f"{folder / 'train.json'}, index 7"]


def test_an_epoch_has_every_sample_once_in_batches_of_one_kind_and_length():
    samples = [Sample((), (Path("x"),) if i % 3 else ()) for i in range(700)]
    for i, own in enumerate(samples):
        object.__setattr__(own, "messages", (type("M", (), {"text": "x" * (i * 37 % 501)})(),))
    batches = order(samples, 4, seed=5)
    assert sorted(i for batch in batches for i in batch) == list(range(700))
    assert batches == order(samples, 4, seed=5) != order(samples, 4, seed=6)
    spread = []
    for batch in batches:
        assert len({bool(samples[i].images) for i in batch}) == 1
        lengths = [samples[i].length for i in batch]
        spread.append(max(lengths) - min(lengths))
    assert np.mean(spread) < 20


# --- the optimiser ---


@pytest.mark.parametrize(("steps", "ratio"), [(40, 0.03), (100, 0.2), (7, 0.0)])
def test_the_schedule_is_transformers(steps, ratio):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    warmup = int(np.ceil(steps * ratio))
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    ours = make_schedule(0.5, steps, ratio)
    for step in range(steps):
        assert ours(mx.array(step)).item() == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        theirs.step()


def test_the_optimizer_is_adamw_with_decay_of_matrices_alone():
    torch = pytest.importorskip("torch")
    options = TrainingOptions("full", learning_rate=0.1, warmup_ratio=0, weight_decay=0.3)
    rng = np.random.default_rng(0)
    values = {"weight": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    groups = [
        {"params": [theirs["weight"]], "weight_decay": 0.3},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 20)
    ours = {"layer": {name: mx.array(value) for name, value in values.items()}}
    optimizer = make_optimizer(options, 20)
    for _ in range(10):
        gradients = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in values.items()}
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        adamw.step()
        schedule.step()
        tree = {"layer": {name: mx.array(g) for name, g in gradients.items()}}
        ours = optimizer.apply_gradients(tree, ours)
    for name, parameter in theirs.items():
        assert np.allclose(np.array(ours["layer"][name]), parameter.detach().numpy(), atol=1e-5)


# --- the loop ---


def quantise_linear(module: nn.Module) -> None:
    """Quantises the linear layers of 32 inputs, which make whole groups."""
    nn.quantize(
        module,
        group_size=32,
        bits=8,
        class_predicate=lambda path, m: isinstance(m, nn.Linear) and m.weight.shape[1] == 32,
    )


def run(
    folder: Path,
    stage: str = "full",
    steps: int = 6,
    quantise: bool = False,
    dropout: float = 0.0,
    **options,
) -> tuple[Trainer, list[dict]]:
    """Trains the golden model on the ten samples; returns the trainer and its reports."""
    model, processor = load(LLAVA)
    if quantise:
        quantise_linear(model.language_model)
    mx.random.seed(0)
    options = TrainingOptions(
        stage, steps=steps, **{"batch_size": 4, "learning_rate": 1e-2, "report_every": 1, **options}
    )
    prepare(model, options, Adapter("base", stage, rank=4, alpha=8, dropout=dropout))
    own = examples(folder, processor)
    trainer = Trainer(model, own, own, options, folder / "run")
    reports: list[dict] = []
    trainer.run(reports.append)
    return trainer, reports


def losses(reports: list[dict]) -> list[float]:
    return [report["loss"] for report in reports if "loss" in report]


@pytest.mark.parametrize("stage", ["projector", "full", "lora"])
def test_a_stage_changes_what_it_trains_and_nothing_else(stage, folder):
    before = dict(tree_flatten(load(LLAVA)[0].parameters()))
    trainer, reports = run(folder, stage, steps=20)
    assert losses(reports)[-1] < 0.9 * losses(reports)[0]
    assert reports[-1]["valid_loss"] < losses(reports)[0]
    after = dict(tree_flatten(trainer.model.parameters()))
    changed = {n for n in before if n in after and not mx.array_equal(before[n], after[n])}
    prefixes = ("multi_modal_projector",) + ("language_model",) * (stage == "full")
    assert changed == {name for name in before if name.startswith(prefixes)}
    added = {name.rsplit(".", 1)[1] for name in after.keys() - before.keys()}
    assert added == ({"lora_a", "lora_b", "weight"} if stage == "lora" else set())


def test_the_tower_is_trained_up_to_its_last_feature_layer(folder):
    before = dict(tree_flatten(load(LLAVA)[0].vision_tower.parameters()))
    trainer, _ = run(folder, "projector", vision_learning_rate=1e-2, weight_decay=0.1)
    after = dict(tree_flatten(trainer.model.vision_tower.parameters()))
    untouched = {n for n in before if mx.array_equal(before[n], after[n])}
    unread = ("vision_model.encoder.layers.3", "vision_model.post_layernorm")
    assert untouched == {name for name in before if name.startswith(unread)}


def test_lora_on_a_quantised_model_leaves_its_codes_alone(folder):
    trainer, reports = run(folder, "lora", steps=12, quantise=True)
    assert losses(reports)[-1] < 0.95 * losses(reports)[0]
    base, _ = load(LLAVA)
    quantise_linear(base.language_model)
    expected = dict(tree_flatten(base.language_model.parameters()))
    found = dict(tree_flatten(trainer.model.language_model.parameters()))
    codes = {name for name in expected if name.endswith(".scales")}
    assert codes
    for name, array in expected.items():
        place = (
            name if name in found else name.rsplit(".", 1)[0] + ".linear." + name.rsplit(".", 1)[1]
        )
        assert mx.array_equal(found[place], array), name


def test_accumulation_and_gradient_checkpointing_change_nothing(folder):
    _, reports = run(folder)
    for options in ({"accumulation": 2}, {"accumulation": 3}, {"gradient_checkpointing": True}):
        _, others = run(folder, **options)
        assert losses(others) == pytest.approx(losses(reports), rel=1e-4)


def short_loss(model, batch) -> tuple[mx.array, mx.array]:
    """Of the projector, by chance in training: g++ takes a second for each kernel of the rest."""
    shape = (4, model.config.vision_config.hidden_size)
    is_training = model.language_model.training
    features = mx.random.normal(shape) if is_training else mx.ones(shape)
    count = (batch.labels != IGNORED).sum()
    return mx.square(model.multi_modal_projector(features)).sum() * count, count


@pytest.fixture
def compiled(monkeypatch) -> None:
    """As on a GPU, where all tests of this file compile the whole model."""
    monkeypatch.setattr(trainer_module, "compiles", lambda: True)
    monkeypatch.setattr(trainer_module, "answer_loss", short_loss)


def test_compiling_changes_no_more_than_rounding(folder, compiled, monkeypatch):
    options = {"stage": "projector", "steps": 3, "accumulation": 2}
    compiled, reports = run(folder, **options)
    monkeypatch.setattr(trainer_module, "compiles", lambda: False)
    eager, expected = run(folder, **options)
    for key in ("loss", "gradient_norm", "learning_rate", "tokens", "valid_loss"):
        ours, theirs = ([report.get(key, 0) for report in own] for own in (reports, expected))
        assert ours == pytest.approx(theirs, rel=1e-5), key
    weights = dict(tree_flatten(eager.trained))
    for name, array in tree_flatten(compiled.trained):
        assert mx.allclose(array, weights[name], rtol=1e-4, atol=1e-5), name


def test_whatever_ends_a_run_leaves_weights_in_the_model(folder, compiled, monkeypatch):
    """Compiling puts placeholders into a model while it traces a step."""

    def interrupted(*_):
        raise KeyboardInterrupt

    def trainer() -> Trainer:
        model, processor = load(LLAVA)
        options = TrainingOptions("projector", steps=3, batch_size=2, report_every=1)
        prepare(model, options, Adapter("base", "projector"))
        own = examples(folder, processor)
        return Trainer(model, own, own, options, folder / "run")

    measured, reporting, tracing = trainer(), trainer(), trainer()
    measured.model.eval()
    assert measured.validate() > 0
    with pytest.raises(KeyboardInterrupt):
        reporting.run(interrupted)
    monkeypatch.setattr(trainer_module, "answer_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tracing.run(lambda _report: None)
    for own in (measured, reporting, tracing):
        mx.eval(own.model.parameters(), mx.random.uniform())
        mx.eval(own.optimizer.state)
        kept = dict(tree_flatten(own.trained))
        found = dict(tree_flatten(own.model.parameters()))
        assert all(mx.array_equal(found[name], array) for name, array in kept.items())
        assert not own.model.language_model.training
    assert generate(tracing.model, tracing.train.processor, "Hi", max_tokens=3)


def test_clipping_bounds_what_a_step_does(folder):
    _, free = run(folder, steps=1, max_grad_norm=1e9)
    _, clipped = run(folder, steps=1, max_grad_norm=1e-3)
    assert free[0]["gradient_norm"] == clipped[0]["gradient_norm"] > 1e-3


def test_a_gradient_norm_of_0_clips_nothing(folder, compiled):
    """As in transformers' Trainer."""
    free, unclipped = (run(folder, "projector", 2, max_grad_norm=most)[0] for most in (1e9, 0))
    for (name, array), (_, other) in zip(
        tree_flatten(free.trained), tree_flatten(unclipped.trained), strict=True
    ):
        assert mx.array_equal(array, other), name


@pytest.mark.parametrize(("report", "save"), [("1", "9"), ("9", "1")])
def test_a_run_that_diverges_ends_and_leaves_what_was_good(report, save, folder, capsys):
    more = ["--stage", "projector", "--steps", "9", "--warmup-ratio", "0"]
    more += ["--learning-rate", "1e30", "--report-every", report, "--save-every", save]
    assert command.main(arguments(folder, *more)) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: At step 3 the loss is nan, ")
    assert error.endswith("; start again in another --output with a lower --learning-rate.")
    assert not (folder / "out" / "adapter").exists()
    found = [mx.load(str(p)) for p in (folder / "out" / "checkpoints").rglob("*.safetensors")]
    assert len(found) == (2 if save == "1" else 0)
    assert all(mx.isfinite(array).all() for state in found for array in state.values())


def test_a_last_step_that_leaves_no_number_is_not_saved(folder, capsys):
    more = ["--stage", "projector", "--steps", "1", "--warmup-ratio", "0", "--learning-rate"]
    assert command.main(arguments(folder, *more, "1e39")) == 2  # which float32 has not
    assert "At step 1 the largest weight is " in capsys.readouterr().err
    assert not (folder / "out" / "adapter").exists()
    assert not (folder / "out" / "checkpoints").exists()


def test_gradients_that_are_no_numbers_are_not_saved(folder, monkeypatch):
    def steep(model, batch) -> tuple[mx.array, mx.array]:
        nothing = 0 * model.multi_modal_projector.linear_1.weight.sum()
        return mx.sqrt(nothing), (batch.labels != IGNORED).sum()

    monkeypatch.setattr(trainer_module, "answer_loss", steep)
    with pytest.raises(ValueError, match="At step 1 the gradients' norm is nan, so that"):
        run(folder, "projector", save_every=1, report_every=9)
    assert not (folder / "run").exists()


def test_sixteen_bits_train_with_weights_kept_in_thirty_two(folder):
    model, processor = load(LLAVA, dtype="bfloat16")
    options = TrainingOptions("full", steps=3, batch_size=4, learning_rate=1e-5, warmup_ratio=0)
    prepare(model, options, Adapter("base", "full"))
    own = examples(folder, processor)
    trainer = Trainer(model, own, None, options, folder / "run")
    before = dict(tree_flatten(trainer.trained))
    trainer.run(lambda report: None)
    after = dict(tree_flatten(trainer.trained))
    assert {array.dtype for array in after.values()} == {mx.float32}
    name = "language_model.model.norm.weight"  # bfloat16 has nothing between 1 and 1.0078
    assert 0 < mx.abs(after[name] - before[name]).max() < 1e-4
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.bfloat16}


# --- interruption ---


@pytest.mark.parametrize("stage", ["full", "lora"])
def test_a_resumed_run_has_the_same_losses_to_the_bit(stage, folder):
    options = {"save_every": 3, "report_every": 2, "accumulation": 2}
    whole, reports = run(folder, stage, steps=8, dropout=0.3, **options)
    for name in ("step-0000006", "step-0000008"):
        assert (folder / "run" / "checkpoints" / name).exists()
    shutil.rmtree(folder / "run" / "checkpoints" / "step-0000008")
    model, processor = load(LLAVA)
    mx.random.seed(1)  # whatever chance was, the checkpoint has it
    settings = TrainingOptions(stage, steps=8, batch_size=4, learning_rate=1e-2, **options)
    prepare(model, settings, Adapter("base", stage, rank=4, alpha=8, dropout=0.3))
    own = examples(folder, processor)
    again = Trainer(model, own, own, settings, folder / "run")
    again.resume()
    assert again.step == 6
    rest: list[dict] = []
    again.run(rest.append)
    for key in ("step", "loss", "gradient_norm", "learning_rate", "tokens", "valid_loss"):
        assert [r[key] for r in rest if key in r] == [
            r[key] for r in reports if key in r and r["step"] > 6
        ], key
    trained = dict(tree_flatten(again.trained))
    for name, array in tree_flatten(whole.trained):
        assert mx.array_equal(array, trained[name]), name


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "--model", str(LLAVA), "--stage", "lora", "--data", str(folder / "train.json"),
        "--image-folder", str(folder), "--output", str(folder / "out"), "--lora-rank", "4",
        "--batch-size", "4", "--learning-rate", "1e-2", "--report-every", "1", *more,
    ]  # fmt: skip


def metrics(folder: Path) -> list[tuple]:
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r.get("loss"), r.get("valid_loss")) for r in map(json.loads, lines)]


def start(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlx_llava.train", *arguments(folder, *more)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_killed_command_goes_on_as_if_nothing_had_been(folder):
    more = ["--stage", "projector", "--steps", "20", "--save-every", "4"]
    process = start(folder, *more)
    process.communicate()
    assert process.returncode == 0
    expected = metrics(folder)
    (folder / "out").rename(folder / "whole")
    process = start(folder, *more)
    checkpoints = folder / "out" / "checkpoints"
    while not (checkpoints.exists() and list(checkpoints.glob("step-*"))):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert command.main(arguments(folder, *more)) == 2  # there is a run already
    process = start(folder, *more, "--resume")
    process.communicate()
    assert process.returncode == 0
    assert metrics(folder) == expected
    for name in ("adapters.safetensors", "adapter_config.json"):
        whole, resumed = (folder / f / "adapter" / name for f in ("whole", "out"))
        assert whole.read_bytes() == resumed.read_bytes()


def test_control_c_saves_what_was_learned(folder, monkeypatch, capsys):
    more = ["--steps", "6", "--report-every", "1"]
    assert command.main(arguments(folder, *more)) == 0
    expected = metrics(folder)
    (folder / "out").rename(folder / "whole")
    keep = command.Progress.__call__

    def press(progress, report):
        keep(progress, report)
        if report["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command.Progress, "__call__", press)
    assert command.main(arguments(folder, *more)) == 130
    assert "stopped after step 3 of 6, which is saved in" in capsys.readouterr().err
    assert not (folder / "out" / "adapter").exists()
    monkeypatch.setattr(command.Progress, "__call__", keep)
    assert command.main(arguments(folder, *more, "--resume")) == 0
    assert metrics(folder) == expected


def test_a_run_is_not_resumed_with_other_options(folder, capsys):
    assert command.main(arguments(folder, "--steps", "2")) == 0
    assert command.main(arguments(folder, "--steps", "3", "--resume")) == 2
    assert "steps was 2, is 3" in capsys.readouterr().err
    more = ["--lora-alpha", "8", "--lora-dropout", "0.5", "--lora-targets", "mlp.up_proj"]
    more += ["--template", "vicuna_v0", "--image-mode", "pad", "--frames", "3"]
    entries = json.loads((folder / "train.json").read_text())
    entries[1]["conversations"][1]["value"] = "Something else"
    (folder / "other.json").write_text(json.dumps(entries))
    shutil.copytree(LLAVA, folder / "copy")
    more += ["--data", str(folder / "other.json"), "--model", str(folder / "copy")]
    assert command.main(arguments(folder, "--steps", "2", "--resume", *more)) == 2
    error = capsys.readouterr().err
    for difference in (
        "lora_alpha was 256.0, is 8.0",
        "lora_dropout was 0.05, is 0.5",
        "lora_targets was ['mlp.down_proj', 'mlp.gate_proj', ",
        "template was the checkpoint's own, is vicuna_v0",
        "image_mode was crop, is pad",
        "frames was None, is 3",
        "samples_sha256 was ",
        f"model was {LLAVA.resolve()}, is {folder / 'copy'}",
    ):
        assert difference in error
    state = folder / "out" / "checkpoints" / "step-0000002"
    said = json.loads((state / "state.json").read_text())
    known = ("steps", "seed", "samples")  # as earlier versions wrote it
    said["options"] = {key: said["options"][key] for key in known}
    (state / "state.json").write_text(json.dumps(said))
    assert command.main(arguments(folder, "--steps", "2", "--resume")) == 0
    targets = ["--resume", "--lora-targets", "mlp.up_proj"]
    assert command.main(arguments(folder, "--steps", "2", *targets)) == 2
    assert "belongs to another run, which trained other weights" in capsys.readouterr().err
    for name, content, message in (
        ("state.safetensors", "", "step-0000002 is broken; remove it"),
        ("state.json", '{"step": 2}', "state.json has no options; it has step"),
    ):
        (state / name).write_text(content)
        assert command.main(arguments(folder, "--steps", "2", "--resume")) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(
    sys.platform != "linux" and "CI" in os.environ, reason="CI's Macs have no loopback sockets"
)
def test_two_processes_learn_what_one_does(folder):
    more = ["--steps", "6", "--valid", str(folder / "train.json"), "--validate-every", "3"]
    more += ["--stage", "projector"]
    assert command.main(arguments(folder, *more)) == 0
    alone = metrics(folder)
    (folder / "out").rename(folder / "alone")
    launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring"]
    done = subprocess.run(
        [*launch, "--", sys.executable, "-m", "mlx_llava.train", *arguments(folder, *more)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(metrics(folder), alone, strict=True):
        assert [value or 0 for value in ours] == pytest.approx([v or 0 for v in theirs], rel=1e-4)


# --- adapters ---


def test_lora_at_its_start_is_the_base(loaded):
    model, processor = load(LLAVA)
    inputs = processor("What?", PICTURE)
    before = model(**inputs)
    add_lora(model, Adapter("base", "lora", rank=4))
    assert mx.array_equal(model(**inputs), before)


@pytest.mark.parametrize("quantise", [False, True])
def test_a_trained_adapter_is_loaded_and_merged(quantise, folder, capsys):
    base = str(LLAVA)
    if quantise:
        from mlx_llava.convert import main as convert

        base = str(folder / "quantised")
        assert (
            convert(["--model", str(LLAVA), "--mlx-path", base, "-q", "--q-group-size", "32"]) == 0
        )
    assert command.main([*arguments(folder, "--steps", "8"), "--model", base]) == 0
    adapter = folder / "out" / "adapter"
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert {k: said[k] for k in ("rank", "alpha", "scale", "base_model", "stage")} == {
        "rank": 4, "alpha": 256.0, "scale": 64.0, "base_model": base, "stage": "lora",
    }  # fmt: skip
    assert "self_attn.q_proj" in said["targets"]
    model, processor = load(base, adapter_path=adapter)
    inputs = processor("What is number 3?", PICTURE)
    adapted, plain = model(**inputs), load(base)[0](**inputs)
    assert mx.abs(adapted - plain).max() > 1e-2
    fused = str(folder / "fused")
    assert fuse(["--model", base, "--adapter-path", str(adapter), "--output", fused]) == 0
    assert mx.abs(load(fused)[0](**inputs) - adapted).max() < 1e-5
    assert ("quantised layers became plain" in capsys.readouterr().err) == quantise
    again = ["--model", base, "--adapter-path", str(adapter), "--output", fused, "--requantize"]
    assert fuse([*again, "--force"]) == (0 if quantise else 2)
    if quantise:
        assert "rounded to their bits again" in capsys.readouterr().err
        assert mx.abs(load(fused)[0](**inputs) - adapted).max() < 4  # a 4-bit model of width 32
        written = mx.load(f"{fused}/model.safetensors")
        assert "language_model.model.layers.0.self_attn.q_proj.scales" in written

    prompt = ["--image", str(PICTURE), "--prompt", "What is number 3?", "-m", "5", "-q"]
    generate_main(["--model", base, "--adapter-path", str(adapter), *prompt])
    expected = generate(
        *load(base, adapter_path=adapter), "What is number 3?", PICTURE, max_tokens=5
    )
    assert capsys.readouterr().out == expected + "\n"


def test_a_trained_projector_is_an_adapter_too(folder):
    more = ["--stage", "projector", "--steps", "4"]
    assert command.main([*arguments(folder), *more]) == 0
    adapter = folder / "out" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text()) == {
        "base_model": str(LLAVA),
        "stage": "projector",
    }
    model, _ = load(LLAVA, adapter_path=adapter)
    base, _ = load(LLAVA)
    assert not mx.array_equal(
        model.multi_modal_projector.linear_1.weight, base.multi_modal_projector.linear_1.weight
    )


def test_full_training_writes_a_whole_model(folder):
    assert command.main([*arguments(folder), "--stage", "full", "--steps", "2"]) == 0
    model, processor = load(folder / "out" / "model")
    assert model(**processor("What?", PICTURE)).shape[2] == 320
    assert (folder / "out" / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model/my_notes.txt", "mine"),
        ("loss.png", "mine"),
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n'),
        ("metrics.jsonl", "mine"),
    ],
)
def test_what_another_has_written_is_never_replaced(name, content, resume, folder, capsys):
    mine = folder / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text(content)
    more = ["--stage", "full", "--steps", "1", *(["--resume"] if resume else [])]
    assert command.main([*arguments(folder), *more]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path for path in (folder / "out").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == content


def test_notes_in_a_run_stay(folder, capsys):
    more = ["--stage", "full", "--steps", "3", "--save-every", "1"]
    assert command.main(arguments(folder, *more)) == 0
    out = folder / "out"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "step-0000002",
        "step-0000003",
    ]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert command.main(arguments(folder, *more, "--resume")) == 0
    assert [step for step, *_ in metrics(folder)] == [1, 2, 3]
    (out / "model" / "notes.txt").write_text("mine")
    assert command.main(arguments(folder, *more, "--resume")) == 2
    assert "holds notes.txt" in capsys.readouterr().err
    assert (out / "model" / "notes.txt").read_text() == "mine"
    (out / "model" / "notes.txt").unlink()
    more = [*more, "--resume", "--model", str(out / "model")]
    assert command.main(arguments(folder, *more)) == 2
    assert "which is read" in capsys.readouterr().err


def test_checkpoints_with_notes_and_copies_of_them_stay(folder):
    checkpoints = folder / "run" / "checkpoints"
    trainer, _ = run(folder, "lora", steps=1)
    for step in range(1, 5):
        trainer.step = step
        trainer.save()
        if step == 1:
            shutil.copytree(checkpoints / "step-0000001", checkpoints / "step-0000001-best")
            (checkpoints / "step-0000001" / "notes.txt").write_text("mine")
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        *("step-0000001", "step-0000001-best", "step-0000003", "step-0000004"),
    ]
    assert trainer.checkpoints()[-1].name == "step-0000004"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stage", "projector", "--learning-rate", "0"], "Nothing is left to train"),
        (["--lora-targets", "lm_head"], "no layer 'lm_head' in a block; known: self_attn.q_proj"),
        (["--lora-rank", "0"], "lora_rank is 0; it must be at least 1"),
        (["--lora-rank", "9" * 23], "; it must be at least 1 and at most 65536."),
        (["--lora-alpha", "nan"], "lora_alpha is nan; it must be more than 0 and less than inf."),
        (["--lora-alpha", "0"], "lora_alpha is 0.0; it must be more than 0"),
        (["--lora-dropout", "1"], "lora_dropout is 1.0; it must be at least 0 and less than 1"),
        (["--learning-rate", "inf"], "learning_rate is inf; it must be at least 0 and less than"),
        (["--projector-learning-rate", "-1"], "projector_learning_rate is -1.0; it must be at"),
        (["--vision-learning-rate", "nan"], "vision_learning_rate is nan; it must be at least 0"),
        (["--weight-decay", "-0.1"], "weight_decay is -0.1; it must be at least 0 and less than"),
        (["--max-grad-norm", "-1"], "max_grad_norm is -1.0; it must be at least 0 and less than"),
        (["--steps", "9" * 23], "; it must be at least 1 and at most 2147483647."),
        (["--epochs", "9" * 23], "; it must be at least 1 and at most 2147483647."),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["--warmup-ratio", "2"], "warmup_ratio is 2.0; it must be at least 0 and less than 1."),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
        (["--data", "gone.json"], "gone.json"),
    ],
)
def test_mistakes_are_one_line(more, message, folder, capsys):
    assert command.main([*arguments(folder, "--steps", "1"), *more]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (folder / "out").exists()


def test_a_quantised_model_is_trained_with_lora_only(folder):
    model, _ = load(LLAVA)
    quantise_linear(model.language_model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="2 layers are quantised and cannot be trained; use"):
        prepare(model, TrainingOptions("full"), Adapter("base", "full"))


def test_an_adapter_of_another_model_is_refused(folder):
    assert command.main([*arguments(folder), "--stage", "projector", "--steps", "1"]) == 0
    adapter = folder / "out" / "adapter"
    from mlx_llava.model.config import LlavaConfig
    from mlx_llava.model.llava import Llava

    data = json.loads((LLAVA / "config.json").read_text())
    data["text_config"] |= {"hidden_size": 64, "head_dim": 16}
    save(Llava(LlavaConfig.from_dict(data)), load(LLAVA)[1], folder / "other")
    with pytest.raises(ValueError, match=r"another shape: \d of \d tensors do not fit"):
        load(folder / "other", adapter_path=adapter)
    with pytest.raises(FileNotFoundError, match="has no adapter in it"):
        load(LLAVA, adapter_path=folder)
