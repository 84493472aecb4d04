"""data: URLs in the spellings that clients send."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest

from mlx_llava.inputs.image import decode_data_url, is_data_url

CONTENTS = [bytes(range(256)) * 3 + bytes(extra) for extra in range(3)]
PNG = "data:image/png;base64,"


def of_urls(text):
    return text.replace("+", "-").replace("/", "_")


SPELLINGS = {
    "as RFC 2397 has it": lambda text: f"data:image/png;base64,{text}",
    "lines": lambda text: PNG + "\n".join(text[i:][:76] for i in range(0, len(text), 76)),
    "lines of Windows": lambda text: f"data:image/png;base64,{text[:9]}\r\n{text[9:]}\r\n",
    "a blank after the comma": lambda text: f"data:image/png;base64, {text}",
    "blanks around": lambda text: f" \n data:image/png;base64,{text}\t ",
    "no padding": lambda text: f"data:image/png;base64,{text.rstrip('=')}",
    "too much padding": lambda text: f"data:image/png;base64,{text}==",
    "base64 of URLs": lambda text: PNG + of_urls(text),
    "that without padding": lambda text: PNG + of_urls(text).rstrip("="),
    "percent-encoded": lambda text: PNG + quote(text, safe=""),
    "percent-encoded lines": lambda text: f"data:image/png;base64,{text[:8]}%0D%0A{text[8:]}",
    "capitals": lambda text: f"DATA:IMAGE/PNG;BASE64,{text}",
    "a wrong kind": lambda text: f"data:image/jpg;base64,{text}",
    "any kind": lambda text: f"data:image/*;base64,{text}",
    "no kind": lambda text: f"data:;base64,{text}",
    "no picture's kind": lambda text: f"data:application/octet-stream;base64,{text}",
    "a name": lambda text: f"data:image/png;name=x.png;base64,{text}",
    "a name with a comma": lambda text: f'data:image/png;name="a, b;c.png";base64,{text}',
    "parameters after it": lambda text: f"data:image/png;charset=utf-8; base64;name=x.png,{text}",
}  # fmt: skip


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spellings_of_clients(spell):
    for content in CONTENTS:
        url = spell(base64.b64encode(content).decode())
        assert is_data_url(url)
        assert decode_data_url(url) == content


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png,abc", "must look like"),
        ("data:image/png;base64", "must look like"),
        ("data:base64,AAAA", "must look like"),
        ("data:image/png;notbase64,AAAA", "must look like"),
        ("data:" + "x" * 1_000_000, "must look like"),
        ('data:"' * 1_000_000, "must look like"),
        ("data:image/png;base64,!", "not valid base64"),
        ("data:image/png;base64,AAAAA", "not valid base64"),
        ("data:image/png;base64,AA=A", "not valid base64"),
        ("data:image/png;base64,AAAé", "other letters"),
        ("data:image/png;base64,AAA\ud800", "other letters"),
        ("data:image/png;base64,b'AAAA'", "not valid base64"),
        ("data:image/png;base64,data:image/png;base64,AAAA", "not valid base64"),
        ("data:image/png;base64,AA%ZZ", "not valid base64"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_none(url, words):
    with pytest.raises(ValueError, match=words):
        decode_data_url(url)


@pytest.mark.parametrize("text", ["", "data", "database.png", "./data:x", "http://a/data:"])
def test_what_names_a_file(text):
    assert not is_data_url(text)
