"""Every notebook runs from top to bottom on the embedded model, and shows what it was kept with."""

from __future__ import annotations

import base64
import io
import re
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image

from mlx_llava import load

nbformat = pytest.importorskip("nbformat", reason="pip install '.[test]'")
pytest.importorskip("nbclient")
pytest.importorskip("torch")

from tests.conftest import ROOT  # noqa: E402

sys.path.insert(0, str(ROOT / "scripts"))
import run_notebooks  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: What is right in each notebook's exercise, and what is not.
EXERCISES = {
    "1_quickstart": ("86", "85"),
    "2_clip_encoder": ("576", "577"),
    "3_projection": ("[[0.5, 0.5], [0.5, 0.5]]", "[[1, 1], [1, 1]]"),
    "4_inside_llava": ("0.67", "0.5"),
    "5_two_stages": ("4_198_400", "4_194_304"),
    "6_finetune": ("4096", "16384"),
    "7_convert_and_quantise": ("4.5", "4"),
}
#: What is neither, in any of them.
ODD = ("np.array([1, 2])", "[[1, 2, 3], [4, 5, 6]]", "[1, [2, 3]]", "'two'", "processor")


def figures(notebook) -> list[list[bytes]]:
    """The pictures that each cell shows."""
    return [
        [
            base64.b64decode(output.data["image/png"])
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        for cell in notebook.cells
    ]


def is_empty(png: bytes) -> bool:
    """Whether a figure has nothing but one colour in it."""
    return Image.open(io.BytesIO(png)).convert("RGB").getcolors(maxcolors=7) is not None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_a_short_story_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= 25
    assert path.stat().st_size < 300_000
    assert "MODEL = None" in notebook.cells[0].source
    assert "image/png" in path.read_text(encoding="utf-8")
    assert "/tmp" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_exercise_knows_the_answer(path, capsys):
    cells = nbformat.read(path, as_version=4).cells
    assert "## Exercise" in cells[-2].source
    given, first = cells[-1].source.partition("\n")[::2]
    assert given == "answer = None"
    examples = ROOT / "weights" / "tiny-llava" / "examples"
    known = {"np": np, "mx": mx, "nn": nn, "processor": load()[1]}
    known |= {"PICTURE": examples / "shapes.png", "SECOND": examples / "pair.png"}
    for answer, said in zip(
        ("None", *EXERCISES[path.stem]), ("Your turn.", "Right.", "Not yet"), strict=True
    ):
        exec(f"answer = {answer}\n{first}", dict(known))
        assert capsys.readouterr().out.startswith(said)
    for answer in ODD:
        exec(f"answer = {answer}\n{first}", dict(known))
        assert capsys.readouterr().out.endswith(" please.\n")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_it_was_kept_with(path, tmp_path):
    """With two steps where it trains for many."""
    short = tmp_path / path.name
    short.write_text(re.sub(r"\bsteps=\d+", "steps=2", path.read_text("utf-8")), "utf-8")
    kept, new = nbformat.read(path, as_version=4), run_notebooks.run(short)
    for cell, fresh in zip(kept.cells, new.cells, strict=True):
        assert [output.output_type for output in fresh.get("outputs", [])] == [
            output.output_type for output in cell.get("outputs", [])
        ], cell.source
        assert not any(output.get("name") == "stderr" for output in fresh.get("outputs", []))
    assert list(map(len, figures(new))) == list(map(len, figures(kept)))
    assert not any(is_empty(png) for cell in figures(new) + figures(kept) for png in cell)


def test_all_are_here():
    assert [path.stem[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5", "6", "7"]
