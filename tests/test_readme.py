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
from tests.conftest import ROOT, SHAPES

sys.path.insert(0, str(ROOT / "scripts"))
from served import served

EMBEDDED = ROOT / "weights" / "tiny-llava"

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = [code for language, code in BLOCKS if language == "sh"]
PYTHON = [code for language, code in BLOCKS if language == "python"]
(INSTALL,) = (code for code in SHELL if code.startswith("uv tool install"))
EXPECTED = next(code for language, code in BLOCKS if language == "text")


def test_no_block_is_overlooked():
    languages = [language for language, _ in BLOCKS]
    assert languages == ["sh", "text", *["sh"] * 8, "python", "sh", "python"]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what git tracks."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name in filter(Path.exists, map(ROOT.joinpath, names)):
        target = tmp_path / "checkout" / name.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, target)
    return tmp_path / "checkout"


def run_alone(command: str, folder: Path, home: Path) -> subprocess.CompletedProcess:
    """Runs what a newcomer types, who has nothing yet."""
    names = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    path = f"{home}/.local/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", command],
        cwd=folder,
        env={**environment, "PATH": path, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_install_and_first_answer(checkout, tmp_path):
    done = run_alone(SHELL[0], checkout, tmp_path)
    assert done.stdout == EXPECTED
    assert done.stderr.startswith("Installing into .venv, which takes")


def test_installed_away_from_the_checkout_it_has_its_model_and_its_page(checkout, tmp_path):
    run_alone(INSTALL, checkout, tmp_path)
    question = f'generate --quiet --image {SHAPES} --prompt "What is in this picture?"'
    assert run_alone(f"mlx-llava {question}", tmp_path, tmp_path).stdout == EXPECTED
    (installed,) = tmp_path.glob(".local/share/uv/tools/*/lib/*/site-packages/mlx_llava")
    assert {path.name for path in (installed / "serving" / "page").rglob("*")} == {
        path.name for path in (ROOT / "mlx_llava" / "serving" / "page").rglob("*")
    }


def test_the_test_command_is_what_ci_runs():
    assert SHELL[1].strip() in (ROOT / ".ci" / "run").read_text().splitlines()
    assert os.access(ROOT / SHELL[1].strip(), os.X_OK)


def provide_hub(cache: Path) -> None:
    """Makes the embedded model stand for those of the hub that pages name."""
    for name in ("llava-hf--llava-1.5-7b-hf", "mlx-community--llava-1.5-7b-4bit"):
        snapshot = cache / f"models--{name}" / "snapshots" / "abc"
        shutil.copytree(EMBEDDED, snapshot)
        reference = snapshot.parent.parent / "refs" / "main"
        reference.parent.mkdir()
        reference.write_text("abc")


@pytest.fixture
def hub(hub_cache, tmp_path, monkeypatch) -> Path:
    """A hub cache in which the embedded model stands for LLaVA 1.5, and a folder of data."""
    provide_hub(hub_cache)
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
    once = SHELL[5].replace("--batch 1,2", "--batch 1,2 --repeats 1")
    assert "follow-up question" in run_with_hub(once, hub)
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
