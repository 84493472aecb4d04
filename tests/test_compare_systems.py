"""scripts/compare_systems.py: systems answer the same rows in turn, each in its own process."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest

from mlx_llava.analysis.measure import draw_pictures
from mlx_llava.analysis.random_model import write_random_model
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from compare_systems import Peer, compare_apart, main

SMALL = ["--shape", "tiny", "--batch", "1,2", "--images", "1,2", "--repeats", "1", "-m", "4"]


@pytest.mark.slow
def test_it_takes_turns_with_transformers(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    out = tmp_path / "against.json"
    assert main([*SMALL, "--against", "transformers", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["against"]
    assert len(rows) == 4
    for row in rows:
        assert row["ratios"]["transformers"]["same_tokens"]
        assert row["ratios"]["transformers"]["throughput"]["median"] > 0
        assert row["systems"]["transformers"]["peak_gb"] > 0
        assert ("first" in row["ratios"]["transformers"]) == (row["batch"] == 1)
    assert "against transformers: first token takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "ollama"], "no system ['ollama']; known: transformers, mlx-vlm, llama.cpp"),
        (["--against", "mlx-vlm", "--peer-python", "x"], "--peer-python is SYSTEM=PYTHON"),
        (["--against", "mlx-vlm", "--repeats", "0"], "--repeats at least 1"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_system_that_cannot_load_says_so(tmp_path):
    with pytest.raises(ValueError, match="mlx_llava cannot do this: .*no.such"):
        Peer("mlx_llava", tmp_path / "no.such", "float32")


def test_our_own_process_answers_rows(tmp_path):
    write_random_model("tiny", tmp_path / "tiny", "float32")
    peer = Peer("mlx_llava", tmp_path / "tiny", "float32")
    (path,) = draw_pictures(tmp_path, 1)
    row = ["USER: <image> What? ASSISTANT:", [path]]
    one, two = peer.answer([row], 5), peer.answer([row, row], 5)
    with pytest.raises(ValueError, match="marks but 0 images"):
        peer.answer([["<image>", []]], 5)
    peer.close()
    assert two["tokens"] == one["tokens"] * 2
    assert len(one["tokens"][0]) == 5
    assert 0 < one["first"] <= one["seconds"]


def test_systems_that_run_apart_are_compared(tmp_path):
    write_random_model("tiny", tmp_path / "tiny", "float32")
    start = partial(Peer, "mlx_llava", tmp_path / "tiny", "float32")
    row = ("USER: <image> What? ASSISTANT:", draw_pictures(tmp_path, 1))
    starts = {"ours": start, "again": start, "llama.cpp": start}
    compared = compare_apart(starts, [row, row], 5, 1)
    assert [*compared["systems"]] == ["ours", "again"]
    assert compared["ratios"]["again"]["same_tokens"]
    assert compared["batch"] == 2
    assert compared["versions"]["again"] == compared["versions"]["ours"]
