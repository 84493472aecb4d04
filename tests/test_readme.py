"""Every command and code block of the README runs, and prints what the README says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from mlx_llava import load
from mlx_llava.generation.steps import generate_step
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from served import served

EMBEDDED = ROOT / "weights" / "tiny-llava"
SHAPES = EMBEDDED / "examples" / "shapes.png"

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = [code for language, code in BLOCKS if language == "sh"]
PYTHON = [code for language, code in BLOCKS if language == "python"]
EXPECTED = next(code for language, code in BLOCKS if language == "text")


def test_no_block_is_overlooked():
    languages = [language for language, _ in BLOCKS]
    assert languages == ["sh", "text", *["sh"] * 8, "python", "python"]


def test_install_and_first_answer(tmp_path):
    """In a copy of what git tracks, with a new environment: nothing may be there already."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        ["sh", "-e", "-c", SHELL[0]],
        cwd=tmp_path,
        env={**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == EXPECTED
    # Away from the checkout, it is the installed package that has the embedded model.
    question = ["--image", str(SHAPES), "--prompt", "What is in this picture?"]
    done = subprocess.run(
        [tmp_path / ".venv" / "bin" / "python", "-m", "mlx_llava.generate", *question],
        cwd=tmp_path.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == EXPECTED, done.stderr
    (installed,) = tmp_path.glob(".venv/lib/*/site-packages/mlx_llava")
    assert {path.name for path in (installed / "serving" / "page").iterdir()} == {
        path.name for path in (ROOT / "mlx_llava" / "serving" / "page").iterdir()
    }


def test_the_test_command_is_what_ci_runs():
    assert SHELL[1].strip() in (ROOT / ".ci" / "run").read_text().splitlines()
    assert os.access(ROOT / SHELL[1].strip(), os.X_OK)


@pytest.fixture
def hub(hub_cache, tmp_path, monkeypatch) -> Path:
    """A hub cache in which the embedded model stands for LLaVA 1.5, and a folder of data."""
    snapshot = hub_cache / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "abc"
    shutil.copytree(EMBEDDED, snapshot)
    reference = snapshot.parent.parent / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("abc")
    shutil.copy(SHAPES, tmp_path / "photo.jpg")
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A star."}]
    (tmp_path / "train.json").write_text(json.dumps([{"conversations": turns}] * 4))
    monkeypatch.chdir(tmp_path)
    return hub_cache


def run_with_hub(code: str, hub: Path) -> str:
    """Runs commands of the README on the stand-in; returns what they print."""
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = code.replace("python -m", f"{sys.executable} -m")
    done = subprocess.run(
        ["sh", "-e", "-c", command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_asking_about_a_photograph(hub):
    assert run_with_hub(SHELL[2], hub).startswith(EXPECTED.rstrip("\n"))


def test_converting_and_training(hub):
    assert run_with_hub(SHELL[3], hub).strip()
    assert load("llava-4bit", as_stored=True)[0].language_model.lm_head.bits == 4
    assert run_with_hub(SHELL[4], hub).startswith("trained/adapter\n")
    Path("prompts.jsonl").write_text('{"prompt": "What is this?", "images": ["photo.jpg"]}\n' * 2)
    assert "follow-up question" in run_with_hub(SHELL[5], hub)
    lines = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1]
    assert lines[0]["text"] == lines[1]["text"]
    assert Path("photo.cache").exists()
    Path("photos/2024").mkdir(parents=True)
    shutil.copy(SHAPES, "photos/2024/a.png")
    run_with_hub(SHELL[6], hub)
    assert json.loads(Path("captions.jsonl").read_text())["image"] == "photos/2024/a.png"
    command, module, *arguments = SHELL[7].split()[1:]
    assert (command, module) == ("-m", "mlx_llava.server")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        served(*arguments, env=environment) as server,
        urllib.request.urlopen(f"{server.url}/v1/models") as models,
    ):
        assert json.load(models)["data"][0]["id"] == "llava-4bit"
    assert run_with_hub(SHELL[8], hub).strip()
    assert Path("report.html").exists()


def test_python_blocks(hub, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    names: dict = {}
    exec(PYTHON[0], names)
    out = capsys.readouterr().out
    assert out == EXPECTED + "1 None\n2 None\n3 length\n"
    assert names["logits"].shape[0] == 1
    assert names["logits"].shape[2] == names["model"].config.text_config.vocab_size

    model, processor = load()
    exec(
        PYTHON[1],
        {
            "model": model,
            "processor": processor,
            "generate_step": generate_step,
            "prompt": "What is in this picture?",
            "images": [SHAPES],
        },
    )
    assert capsys.readouterr().out == EXPECTED
