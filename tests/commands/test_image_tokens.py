"""Commands show pictures in as many tokens as they are told."""

from __future__ import annotations

import io
import json
import shutil

import pytest

from mlx_llava import caption, chat, evaluate, generate
from tests.conftest import GOLDENS, PICTURE

MODEL = ("--model", str(GOLDENS / "llava"), "--image-tokens", "3", "-m", "6")


@pytest.fixture
def expected(loaded) -> str:
    """What is said of the picture; shown whole, it is another answer."""
    text = generate(*loaded, "What?", PICTURE, image_tokens=3, max_tokens=6).strip()
    assert text != generate(*loaded, "What?", PICTURE, max_tokens=6).strip()
    return text


def test_chat(expected, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n"))
    assert chat.main([*MODEL, "--image", str(PICTURE)]) == 0
    assert capsys.readouterr().out.strip() == expected


def test_caption(expected, tmp_path):
    shutil.copy(PICTURE, tmp_path / "a.png")
    out = tmp_path / "captions.jsonl"
    assert caption.main([str(tmp_path), *MODEL, "-p", "What?", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["text"] == expected


def test_evaluate(expected, tmp_path):
    shutil.copy(PICTURE, tmp_path / "a.png")
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "image": "a.png", "text": "What?"}))
    files = ("--questions", str(questions), "--answers", str(answers))
    assert evaluate.main([*MODEL, *files, "--image-folder", str(tmp_path)]) == 0
    assert json.loads(answers.read_text())["text"] == expected
