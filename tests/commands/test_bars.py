"""What a terminal shows while something lasts."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress

import pytest

from tests.conftest import GOLDENS, PICTURE, ROOT

SLOWLY = """
import sys, time
def slowly(where, name, seconds, when=lambda *_: True):
    call = getattr(where, name)
    def wait(*args, **kwargs):
        time.sleep(seconds if when(*args) else 0)
        return call(*args, **kwargs)
    setattr(where, name, wait)
"""
#: A model whose first of three layers reads as slowly as those of a large one.
READING = """
from itertools import count
from mlx_llava.model import llama, llava
layers = count()
is_first = lambda _, x, *__: x.shape[1] > 1 and next(layers) % 3 == 0
slowly(llama.DecoderLayer, "__call__", {layer}, is_first)
slowly(llava.VisionTower, "__call__", {tower})
"""
#: A checkpoint far away, and a first tensor that is large.
CONVERTING = """
from mlx_llava.checkpoint import convert, safetensors
slowly(convert, "open_checkpoint", 2.5)
slowly(safetensors, "_write_file", 2.5)
"""
RUN = "from mlx_llava.{command} import main; sys.exit(main({arguments!r}))"
MODEL = ["--model", str(GOLDENS / "llava")]
ASK = [*MODEL, "--image", str(PICTURE), "--prompt", "What is it?", "-m", "4"]


def on_terminal(command, arguments, slow="", said=""):
    """Runs a command whose stderr is a terminal; gives its stdout, and all that stderr shows."""
    code = SLOWLY + slow + RUN.format(command=command, arguments=arguments)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {**os.environ, "NO_COLOR": "1", "MLX_LLAVA_BLAS": "off"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    ) as process:
        os.close(theirs)
        process.stdin.write(said)
        process.stdin.close()
        shown = b""
        with suppress(OSError):  # the other end is closed
            while data := os.read(ours, 4096):
                shown += data
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    return out, shown.decode()


def left_on(shown):
    """The lines that a terminal shows at last."""
    lines = []
    for line in shown.replace("\r\n", "\n").split("\n"):
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part) :]
        lines.append(cells.rstrip())
    return "\n".join(lines)


@pytest.fixture(scope="module")
def quick():
    return on_terminal("generate", ASK)


def test_pictures_and_then_tokens_are_shown_and_go_before_the_answer(quick):
    out, shown = on_terminal("generate", ASK, READING.format(layer=1.3, tower=1.3))
    assert out == quick[0]
    picture, prompt = shown.index("reading the picture [00:01]"), shown.index("reading the prompt")
    assert picture < prompt
    assert re.search(r"reading the prompt: +\d+%\|.*\d+/\d+ \[00:0\d", shown)
    assert "reading" not in left_on(shown)
    assert "prefill" in left_on(shown)


def test_nothing_is_shown_of_what_is_quick(quick):
    assert "reading" not in quick[1]


def test_a_chat_and_a_prompts_file_show_the_same(tmp_path):
    slow = READING.format(layer=1.2, tower=0)
    out, shown = on_terminal("chat", [*MODEL, "-m", "4"], slow, "What?\nWhy?\n")
    assert len(out.splitlines()) == 2
    assert len(re.findall("reading the prompt: +[1-9]", shown)) >= 2
    assert "reading" not in left_on(shown)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "What?"}\n' * 2 + '{"prompt": "Why?"}\n')
    arguments = [*MODEL, "--prompts-file", str(file), "--batch-size", "2", "-m", "4"]
    out, shown = on_terminal("generate", arguments, slow)
    assert len(out.splitlines()) == 3
    assert len(re.findall("reading the prompt: +[1-9]", shown)) >= 2
    assert "reading" not in left_on(shown)


def test_a_conversion_says_that_it_opens_and_that_it_goes_on(tmp_path):
    arguments = [*MODEL, "--mlx-path", str(tmp_path / "out")]
    _, shown = on_terminal("convert", arguments, CONVERTING)
    assert "opening [00:01]" in shown
    assert re.search(r"converting: +0%.*0\.00/\d+k \[00:01", shown)
    assert re.search(r"^converting: 100%.*", left_on(shown), re.MULTILINE)
    assert "opening" not in left_on(shown)
