"""`verify` and ``convert --verify``: what a checkpoint is read as, or the check that fails."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_llava.checkpoint.verify import verify
from tests.conftest import GOLDENS

main = importlib.import_module("mlx_llava.convert").main

NAMES = (
    *("layout", "warnings", "tensors", "dropped", "dtypes", "quantisation", "template", "ends"),
    *("pictures", "features", "prompt", "ids", "forward pass"),
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny LLaVA 1.6 to spoil."""
    return shutil.copytree(GOLDENS / "llava_next", tmp_path / "model")


def change(path: Path, **values) -> None:
    """Changes values of a JSON file; those of text_config by a prefix."""
    data = json.loads(path.read_text())
    for key, value in values.items():
        outer = data["text_config"] if key.startswith("text_") else data
        outer[key.removeprefix("text_")] = value
    path.write_text(json.dumps(data))


def spoil_weight(folder: Path, value: float) -> None:
    path = folder / "model.safetensors"
    arrays = mx.load(str(path))
    name = next(name for name in arrays if name.endswith("layers.1.mlp.up_proj.weight"))
    arrays[name][3, 5] = value
    mx.eval(arrays)
    path.unlink()
    mx.save_safetensors(str(path), arrays, {"format": "pt"})


def test_every_check_says_what_was_found():
    found = dict(verify(GOLDENS / "llava_next"))
    assert tuple(found) == NAMES
    assert found["layout"] == "llava-hf"
    assert found["dtypes"] == "106 float32"
    assert found["ends"] == "2 </s>"
    assert found["pictures"] == "anyres, tiles of 28; 300 x 200 takes 70 tokens"
    assert found["features"].startswith("hidden state 3 of 0 to 4 (vision_feature_layer -2)")
    assert found["prompt"] == r"'USER: <image x 70>\nWhat is in this picture? ASSISTANT:'"
    assert found["ids"].startswith("85: 136 7 50 <4 x 70> 0 137")


def spoil_layout(folder: Path) -> None:
    change(folder / "config.json", model_type="qwen2_vl")


def spoil_shape(folder: Path) -> None:
    change(folder / "config.json", text_intermediate_size=60)


def spoil_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].role }}")


def spoil_vocabulary(folder: Path) -> None:
    """Another tokenizer: its words have ids that the embedding has not."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    spec["model"]["vocab"] = {word: i + 900 * (i > 4) for word, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def spoil_decoder(folder: Path) -> None:
    """Another tokenizer: its words stand for others."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["decoder"] = {"type": "Fuse"}
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize(
    ("spoil", "last", "error"),
    [
        (spoil_layout, None, "layout: .* is no LLaVA"),
        (spoil_shape, "warnings", "tensors: .* 9 tensors have another shape"),
        (spoil_template, "features", "prompt: .*template drops the user's text"),
        (spoil_vocabulary, "prompt", r"ids: the tokenizer gives \d+, but the embedding has 320"),
        (spoil_decoder, "prompt", "ids: they say .* where the question is 'What is"),
        (lambda f: spoil_weight(f, float("nan")), "ids", "forward pass: .* hidden states are NaN"),
        (lambda f: spoil_weight(f, float("inf")), "ids", "forward pass: .* hidden states are NaN"),
    ],
)
def test_the_check_that_fails_is_named(folder, spoil, last, error):
    spoil(folder)
    found = []
    with pytest.raises(ValueError, match=error):
        found += (name for name, _ in verify(folder))
    assert found == [*NAMES][: NAMES.index(last) + 1 if last else 0]


def test_what_a_checkpoint_warns_of_is_a_finding(folder):
    change(folder / "config.json", novelty=3)
    found = dict(verify(folder))
    assert "does not know and does not read: novelty=3" in found["warnings"]


def test_the_command_checks_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["--model", str(folder), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*NAMES]
    spoil_shape(folder)
    assert main(["--model", str(folder), "--verify"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: tensors: The checkpoint does not fit")
    assert captured.out.splitlines()[-1].startswith("warnings:")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_checks_what_it_converted(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quantise = ["-q", "--q-group-size", "32"]
    assert main(["--model", str(folder), "--verify", *quantise]) == 0
    captured = capsys.readouterr()
    assert "quantisation: 20 layers, bits 4, group_size 32" in captured.out
    assert captured.err.splitlines()[-1].startswith("max_difference ")
    assert (tmp_path / "mlx_model" / "config.json").exists()
