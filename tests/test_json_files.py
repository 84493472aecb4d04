"""JSON and JSON lines are read as people's files hold them, or named with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llava.json_files import (
    JsonLines,
    field,
    numbered_lines,
    parse,
    read_json,
    read_records,
)

RECORDS = [{"text": "one\u2028two\u2029\x85\x0b\x0c\x1c"}, {"text": "three"}]
LINES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
BOM = "\ufeff"


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(LINES),
        BOM + "\r\n".join(LINES) + "\r\n\r\n",
        BOM + LINES[0] + "\n \t\n" + BOM + LINES[1] + "\n",  # two files put together
        json.dumps(RECORDS, indent=2),
        BOM + "\n " + json.dumps(RECORDS),
    ],
    ids=["lines", "BOM and CRLF", "BOMs", "list", "BOM and list"],
)
def test_records_are_read_from_lines_and_lists(text, tmp_path):
    path = tmp_path / "records"
    path.write_bytes(text.encode())
    found = list(read_records(path))
    assert [value for _, value in found] == RECORDS
    places = [str(place).removeprefix(f"{path}, ") for place, _ in found]
    last = "line 3" if " \t" in text else "line 2"
    assert places == (["index 0", "index 1"] if "[" in text else ["line 1", last])


BROKEN = {
    "not json": (b'{"a": 1}\n{"a": 1', r"x is not valid JSON \(line 2\): Expecting ',' delimiter"),
    "old Mac line ends": (b'{"a": 1}\r{"a": 2}', r"line 1\): Extra data, column 10"),
    "NULs": (b'{"a": 1}\n\0\0\0', r"line 2\): Expecting value, column 1"),
    "Latin-1": (b'{"a": 1}\n{"a": "caf\xe9"}', r"x, line 2 is not UTF-8 \(its byte 11 is 0xe9\)"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "x is UTF-16, expected UTF-8; save it as UTF-8"),
    "UTF-16, no BOM": ('{"a": 1}'.encode("utf-16-le"), "x is UTF-16-LE, expected UTF-8"),
    "UTF-32": ('{"a": 1}'.encode("utf-32"), "x is UTF-32, expected UTF-8"),
    "gzip": (b"\x1f\x8b\x08", "x is gzip, expected text; unpack it first"),
    "ZIP": (b"PK\3\4", "x is a ZIP archive, expected text"),
    "Parquet": (b"PAR1", "x is Parquet, expected text"),
    "depth": (b"[" * 100_000, "it is nested too deeply"),
    "digits": (
        b'{"a": 1}\n{"a": %s}' % (b"9" * 5000),
        r"line 2\): Exceeds the limit \(4300 digits",
    ),
    "surrogate": (
        rb'{"a": "\ud83d\ude00"}' + b"\n" + rb'{"a": "\uDC80"}',
        r"line 2\): '\\udc80' is half of a",
    ),
    "key twice": (b'{"a": 1}\n{"a": 1, "a": 2}', r"line 2\): an object has the key 'a' twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named_with_its_place(name, tmp_path):
    data, message = BROKEN[name]
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        list(read_records(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    if data.startswith(b"{") and data.count(b"\n"):
        path.write_bytes(data.partition(b"\n")[2])
    with pytest.raises(ValueError, match="x is|x, line"):
        read_json(path)


def test_what_only_looks_like_half_a_pair_is_read():
    text = r'{"a": "\ud83d\ude00\uD83D\uDE00", "b": "\\ud800", "c": "\u00e9"}'
    assert parse(text, "x") == {"a": "😀😀", "b": r"\ud800", "c": "é"}


def test_a_settings_file_is_an_object(tmp_path):
    path = tmp_path / "config.json"
    assert read_json(path) == {}
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0"
    for text, message in (
        ("", "is empty, expected JSON"),
        ("[1]", "holds a list, expected an"),
        (pointer, "is only Git LFS's pointer to the file: run git lfs pull"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    path.write_text(BOM + '{"a": [NaN, Infinity], "b": 1, "b": 1.0}\n', encoding="utf-8")
    assert str(read_json(path)) == "{'a': [nan, inf], 'b': 1.0}"


@given(text=st.text())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_text_is_json_or_an_error_of_one_line(text):
    complaint = ""
    try:
        parse(text, "it")
    except ValueError as error:
        complaint = str(error)
    assert "\n" not in complaint


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "q, line 3 holds a list, expected an object with id"),
        ({}, "q, line 3 has no id; it has nothing"),
        ({"question": 1}, "q, line 3 has no id; it has question"),
        ({"id": True}, r"q, line 3 has true or false \(true\) as id, expected a text or a whole"),
        ({"id": None}, "q, line 3 has null as id"),
        ({"id": float("inf")}, r"q, line 3 has a number \(Infinity\) as id"),
    ],
)
def test_a_field_that_is_not_there_is_named(record, message):
    assert field({"id": "7"}, "id", (str, int), "q, line 3") == "7"
    with pytest.raises(ValueError, match=message):
        field(record, "id", (str, int), "q, line 3")


def test_own_lines_go_on_after_a_kill_and_nothing_else_is_lost(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = JsonLines(path, '{"step": ')
    assert lines.read() == []
    lines.mend()
    assert not path.exists()
    whole = '{"step": 1}\n{"step": 2, "é": "\u2028"}\n'.encode()
    for data, mended in (
        (whole, whole),
        (whole + b'{"st', whole),  # cut off
        (whole + '{"step": 3, "é'.encode()[:-1], whole),  # within a character
        (whole[:-1], whole),  # only its end is missing
    ):
        path.write_bytes(data)
        assert [line["step"] for _, line in lines.read()] == [1, 2]
        assert path.read_bytes() == data
        lines.mend()
        assert path.read_bytes() == mended
    path.write_bytes(b"Dear diary")
    lines.mend()
    assert path.read_bytes() == b"Dear diary"
    with pytest.raises(ValueError, match=r"own.jsonl is not valid JSON \(line 1\)"):
        lines.read()


def test_a_device_is_not_read_for_ever():
    with pytest.raises(ValueError, match="/dev/zero is a device, expected a file"):
        JsonLines(Path("/dev/zero"), "{").read()
    with pytest.raises(ValueError, match="/dev/zero is a device, expected a file"):
        read_json(Path("/dev/zero"))
    assert JsonLines(Path("/dev/null"), "{").read() == []


def test_lines_of_a_stream_are_numbered(tmp_path):
    lines = [b"\xef\xbb\xbf\n", b"{}\n", b" \n", b"caf\xe9\r\n", b"{}"]
    assert [number for number, _ in numbered_lines(lines, "it")] == [2, 4, 5]
    with pytest.raises(ValueError, match="it is UTF-16-BE"):
        list(numbered_lines(["{}\n".encode("utf-16-be")], "it"))
