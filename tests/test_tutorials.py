"""Every line of the tutorials runs, as for somebody who has installed what they say."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_docs import DOCS, blocks, served
from tests.test_readme import SHAPES, provide_hub, run_with_hub

#: Blocks that are run elsewhere: what installs (test_readme.py), and what never ends.
ELSEWHERE = ("uv tool install", "scripts/try", "python -m mlx_llava.server", "curl", "python3 -c")


@pytest.fixture
def place(hub_cache, tmp_path, monkeypatch) -> Path:
    """In a folder with photographs, a hub in which the embedded model stands for its models."""
    provide_hub(hub_cache)
    (tmp_path / "photos" / "2024").mkdir(parents=True)
    for name in ("photo.jpg", "photos/a.png", "photos/2024/b.png"):
        shutil.copy(SHAPES, tmp_path / name)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return hub_cache


@pytest.mark.parametrize("name", ["photographer", "student", "engineer"])
def test_a_tutorial_runs(name, place, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    page = DOCS / "tutorials" / f"{name}.md"
    codes = [code for code in blocks(page, "sh") if not code.startswith(ELSEWHERE)]
    codes = [code.replace("mlx-llava ", "python -m mlx_llava ") for code in codes]
    said = "".join(run_with_hub(code, place) for code in codes)
    names: dict = {}
    for code in blocks(page, "python"):
        exec(code, names)
    said += capsys.readouterr().out
    if name == "photographer":
        assert Path("photos/2024/b.xmp").exists()
        assert "A small black star" in Path("captions.csv").read_text(encoding="utf-8-sig")
        assert "tags" in Path("tags.csv").read_text(encoding="utf-8-sig").splitlines()[0]
    if name == "student":
        assert Path("report.html").exists()
        assert "(36, 128)" in said
        assert said.endswith("A\n")
    if name == "engineer":
        assert "stop 41" in said or " tokens were known" in said


def test_the_servers_owner_is_answered(place):
    page = DOCS / "tutorials" / "server-owner.md"
    start, ask, key_and_start, health = blocks(page, "sh")
    with served(*start.split()[3:], env=os.environ) as server:
        for code in (ask, health):
            assert run_with_hub(code.replace("http://127.0.0.1:8080", server.url), place)
    make_key, start = key_and_start.splitlines()
    run_with_hub(make_key, place)
    arguments = start.replace("0.0.0.0", "127.0.0.1").split()[3:]
    with served(*arguments, env=os.environ) as server:
        assert (
            b"401"
            in subprocess.run(
                ["curl", "--silent", "--include", f"{server.url}/v1/models"],
                capture_output=True,
                check=True,
            ).stdout
        )
