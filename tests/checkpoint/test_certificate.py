"""Every named checkpoint is read right, and the page that says so is current."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT, shared_data

pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
pytest.importorskip("gguf")
certificate = pytest.importorskip("tests.certificate")
ROWS = certificate.ROWS
PAGE = ROOT / "docs" / "certificate.md"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_published_checkpoint_is_read_right(row):
    found = certificate.certify(row)
    assert found.template == row.template
    assert (found.ends, found.mode, found.tokens) == (row.ends, row.mode, row.tokens)
    assert found.layer == (-1 if row.layout == "gguf" else row.layer)  # GGUF's lack the last
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    assert certificate.line(row) in lines, "run scripts/make_certificate.py"


@pytest.mark.parametrize("row", [row for row in ROWS if row.real], ids=lambda row: row.name)
def test_settings_are_those_of_the_published_files(row):
    published = row.read_published(shared_data("published"))
    added = ("_name_or_path", "transformers_version", "image_seq_length")
    for key in added if row.real.startswith("dumps/") else ():
        published.pop(key, None)  # what the version that wrote the dump put there
    assert {key: row.config[key] for key in published if key in row.config} == published
    assert {*row.config} <= {*published, *added}


def test_the_page_has_these_rows():
    text = PAGE.read_text(encoding="utf-8")
    above = certificate.introduction()
    assert text.startswith(above)
    names = [line.split(" | ")[0].removeprefix("| ") for line in text[len(above) :].splitlines()]
    assert names == [row.name for row in ROWS]
