"""Files of captions: completed wherever they were cut, and shown as they are by spreadsheets."""

from __future__ import annotations

import csv
import resource

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_llava.captioning.questions import TEXT
from mlx_llava.captioning.tables import Lines, Table

RECORDS = st.lists(
    st.tuples(
        st.text(min_size=1).filter(lambda t: "\x00" not in t),
        st.text().map(lambda t: t.replace("\x00", "")),
    ),
    max_size=5,
    unique_by=lambda record: record[0],
)


@pytest.mark.parametrize("kind", [Lines, Table])
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
@given(records=RECORDS, data=st.data())
def test_a_file_cut_anywhere_is_completed(kind, tmp_path, records, data):
    records = [tuple(t.encode("utf-8", "replace").decode() for t in record) for record in records]
    records = list(dict(records).items())
    path = tmp_path / "cut"
    path.unlink(missing_ok=True)
    kept = kind(path)
    for record in records:
        kept.write(record[0], {TEXT: record[1]})
    whole = path.read_bytes() if path.exists() else b""
    if whole:
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    rows = kept.rows()
    kept.mend()
    assert rows == [(name, {TEXT: text}) for name, text in records[: len(rows)]]
    for record in records[len(rows) :]:
        kept.write(record[0], {TEXT: record[1]})
    assert (path.read_bytes() if path.exists() else b"") == whole


FORMULAS = [
    "=cmd|' /C calc'!A0",
    "+1",
    "-x.png",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\uff1d1",
    "'=1",
    "''@",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_is_computed(text, tmp_path):
    table = Table(tmp_path / "a.csv")
    table.write(text, {TEXT: text})
    assert table.rows() == [(text, {TEXT: text})]
    with table.path.open(encoding="utf-8-sig", newline="") as file:
        (_, cells) = csv.reader(file)
    assert cells == ["'" + text] * 2


@pytest.mark.parametrize("text", ["a = b", "'tis", "1-2", ""])
def test_other_cells_are_as_they_are(text, tmp_path):
    table = Table(tmp_path / "a.csv")
    table.write("a.png", {TEXT: text})
    assert table.path.read_bytes().decode("utf-8") == f'\ufeff"image","text"\n"a.png","{text}"\n'


def test_tables_without_a_mark_are_gone_on_with(tmp_path):
    table = Table(tmp_path / "a.csv")
    table.path.write_text('"image","text"\n"a.png","x"\n')
    table.write("b.png", {TEXT: "y"})
    assert table.path.read_text() == '"image","text"\n"a.png","x"\n"b.png","y"\n'
    assert [name for name, _ in table.rows()] == ["a.png", "b.png"]


@pytest.mark.parametrize("kind", [Lines, Table])
def test_columns(kind, tmp_path):
    kept = kind(tmp_path / "a", ("caption", "tags"))
    kept.write("a.png", {"caption": "x", "tags": ["red", "round"]})
    tags = ["red", "round"] if kind is Lines else "red, round"
    assert kept.rows() == [("a.png", {"caption": "x", "tags": tags})]
    with pytest.raises(ValueError, match="or of other columns"):
        kind(tmp_path / "a").rows()


@pytest.mark.parametrize("kind", [Lines, Table])
def test_a_full_disk_leaves_no_half_of_a_line(kind, tmp_path):
    kept, (soft, hard) = kind(tmp_path / "captions"), resource.getrlimit(resource.RLIMIT_FSIZE)
    kept.write("a.jpg", {TEXT: "first"})
    whole = kept.path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
    try:
        with pytest.raises(OSError, match="captions cannot be written: File too large"):
            kept.write("b.jpg", {TEXT: "second"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept.path.read_bytes() == whole
