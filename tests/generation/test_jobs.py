"""A file of prompts: a line that cannot be asked is that line's error, and the rest is answered."""

from __future__ import annotations

import io
import json
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llava.generate import main
from mlx_llava.generation.jobs import read_line
from tests.conftest import GOLDENS

MODEL = str(GOLDENS / "llava")


def lines_of(capsys, *arguments) -> tuple[int, list[dict], str]:
    code = main(["--model", MODEL, "--max-tokens", "6", *arguments])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_broken_lines_of_a_file_are_named_and_the_rest_is_answered(capsys, monkeypatch):
    broken = [
        "no json",
        '{"images": []}',
        '{"prompt": "x", "imagse": []}',
        '{"prompt": "x", "images": ["nowhere.png"]}',
        '{"prompt": "x", "temp": "hot"}',
        '{"prompt": "x", "max_tokens": -1}',
        '{"prompt": "x", "max_tokens": 2.5}',
        '{"prompt": "x", "seed": true}',
        '{"prompt": "x", "stop": [3]}',
        '{"prompt": "x", "stop": 3}',
        '{"prompt": "x", "repetition_penalty": "much"}',
        '{"prompt": 3}',
        "[" * 5000,
        "[]",
        '{"prompt": "x", "id": {}}',
        '{"prompt": "x", "images": [["a.png"]]}',
        '{"prompt": ["x", "y"]}',
        '{"prompt": "x", "prompt": "y"}',
        r'{"prompt": "\ud800"}',
        *(
            json.dumps({"prompt": [{"role": "user", "content": content}]})
            for content in ([{"type": "text"}], [{"type": "image_url"}], [3], 3, None, {"a": 1})
        ),
        '{"prompt": "caf\udce9"}',
    ]
    whole = '\ufeff{"prompt": "hi\u2028"}\r'
    data = "\n".join([whole, *broken, '{"prompt": "hi"}']).encode(errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, lines, err = lines_of(capsys, "--prompts-file", "-")
    assert code == 2
    count = len(broken)
    assert err == f"error: {count} of {count + 2} prompts have no answer; their lines say why.\n"
    errors = {line["index"]: line["error"] for line in lines if "error" in line}
    assert sorted(errors) == list(range(1, count + 1))
    assert [line["index"] for line in lines] == list(range(count + 2))  # though 0 ends last
    assert "text" in lines[0]
    assert "text" in lines[-1]
    assert errors[1].startswith("standard input is not valid JSON (line 2): Expecting value")
    assert errors[count].startswith(f"standard input, line {count + 1} is not UTF-8")


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_line_is_a_prompt_or_an_error(data, loaded):
    words = st.sampled_from(
        ["type", "text", "image", "image_url", "url", "role", "content", "user"]
    )
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | words
    value = st.recursive(
        leaves, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=8
    )
    part = st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image", "image_url"])},
        optional=dict.fromkeys(("text", "image", "image_url", "url"), value),
    )
    message = st.fixed_dictionaries({"role": words, "content": st.lists(part | value) | value})
    prompt = st.lists(message, min_size=1, max_size=2) | value
    line = st.fixed_dictionaries({"prompt": prompt}, optional={"images": value, "id": value})
    with suppress(ValueError, OSError):
        record = read_line("file", (1, json.dumps(data.draw(line | value)).encode()))
        loaded[1](record["prompt"], record.get("images"))


def test_a_file_in_another_encoding_is_named(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hi"}\n', encoding="utf-16")
    code, lines, err = lines_of(capsys, "--prompts-file", str(path))
    assert (code, lines) == (2, [])
    assert err == f"error: {path} is UTF-16, expected UTF-8; save it as UTF-8.\n"
