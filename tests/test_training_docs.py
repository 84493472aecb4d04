"""The commands of docs/training.md run, and do what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_llava.tuner.samples import read_samples
from tests.conftest import PICTURE, ROOT

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
FUSE, LAUNCH, PINK = SHELL


def run(commands: str, folder: Path) -> list[dict]:
    """Runs commands in a folder; returns the JSON objects that they print."""
    commands = commands.replace("python ", f"{sys.executable} ")
    commands = commands.replace("scripts/", f"{ROOT}/scripts/")
    done = subprocess.run(
        ["sh", "-e", "-c", commands],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(text) for text in re.findall(r"^\{.*?^\}", done.stdout, re.M | re.S)]


def test_the_commands_run(tmp_path):
    """On fewer pictures and for fewer steps."""
    short = re.sub(r"--pictures \d+", "--pictures 8", PINK)
    before, after = run(re.sub(r"--steps \d+", "--steps 2", short), tmp_path)
    assert before["questions"] == after["questions"] == 8
    fuse = FUSE.replace("--model BASE ", "").replace("trained/adapter", "pink/trained/adapter")
    run(fuse, tmp_path)
    assert (tmp_path / "fused" / "config.json").exists()
    assert LAUNCH.startswith("mlx.launch -n 2 -- python -m mlx_llava.train ")  # as in test_tuner


@pytest.mark.slow
def test_a_new_colour_is_learned(tmp_path):
    before, after = run(PINK, tmp_path)
    assert before["accuracy, colour"] < 0.1
    assert min(after["accuracy, colour"], after["accuracy"]) > 0.9


def test_the_data_of_the_page_is_read(tmp_path):
    (data,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "train.json").write_text(data)
    (tmp_path / "dog.jpg").write_bytes(PICTURE.read_bytes())
    (sample,), left_out, unread = read_samples(tmp_path / "train.json", tmp_path, lambda text: text)
    assert [message.text for message in sample.messages] == ["What is this?", "A dog."]
    assert not left_out
    assert not unread
