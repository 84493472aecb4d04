"""Files are there whole or not at all, whoever else writes them."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from mlx_llava.files import size_said, whole_file
from tests.conftest import ROOT

#: Writes a file, and waits to be told to end in the middle.
WRITER = """
import sys
from pathlib import Path
from mlx_llava.files import whole_file
with whole_file(Path(sys.argv[1])) as beside, beside.open("w") as file:
    file.write("half")
    file.flush()
    print(beside.name, flush=True)
    input()
    file.write(" and " + sys.argv[2])
"""


@pytest.fixture
def writer(tmp_path) -> Iterator[object]:
    """Starts processes that write one file; gives each, and its hidden path."""
    running = []

    def start(what):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "out"), what],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process, tmp_path / process.stdout.readline().strip()

    yield start
    for process in running:
        process.kill()
        process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_processes_write_one_file_without_disturbing_each_other(tmp_path, writer):
    (one, its), (other, others) = writer("one"), writer("other")
    assert its != others
    other.communicate("\n")
    assert (other.returncode, (tmp_path / "out").read_text()) == (0, "half and other")
    one.communicate("\n")
    assert (one.returncode, (tmp_path / "out").read_text()) == (0, "half and one")
    assert names(tmp_path) == ["out"]


def test_what_kills_have_left_goes_and_what_is_being_written_stays(tmp_path, writer):
    writers = [writer(str(number)) for number in range(3)]
    for number in (0, 2):
        os.kill(writers[number][0].pid, signal.SIGKILL)
        writers[number][0].wait()
    assert len(names(tmp_path)) == 3
    with whole_file(tmp_path / "out") as beside:
        assert beside == writers[0][1]
        assert beside.read_text() == ""
        assert sorted([beside.name, writers[1][1].name]) == names(tmp_path)
        beside.write_text("whole")
    assert (tmp_path / "out").read_text() == "whole"
    writers[1][0].communicate("\n")
    assert (tmp_path / "out").read_text() == "half and 1"
    assert names(tmp_path) == ["out"]


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "out").write_text("before")
    with suppress(ZeroDivisionError), whole_file(tmp_path / "out") as beside:
        beside.write_text("half")
        _ = 1 / 0
    assert (tmp_path / "out").read_text() == "before"
    assert names(tmp_path) == ["out"]


def test_a_disk_without_locks_is_written_as_well(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.partial").write_text("left")
    with whole_file(tmp_path / "out") as beside:
        beside.write_text("whole")
    assert (tmp_path / "out").read_text() == "whole"
    assert names(tmp_path) == ["out"]


def test_many_writers_at_once_never_fail(tmp_path):
    code = (
        "import sys; from pathlib import Path; from mlx_llava.files import whole_file\n"
        "for n in range(60):\n"
        "    with whole_file(Path(sys.argv[1])) as beside: beside.write_text(sys.argv[2] * 5000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    running = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    text = (tmp_path / "out").read_text()
    assert text in [str(number) * 5000 for number in range(4)]
    assert names(tmp_path) == ["out"]


def test_a_size_below_a_gigabyte_is_said_in_megabytes():
    assert [*map(size_said, (3.9e6, 0.99e9, 1e9, 13.5e9))] == [
        "3.9 MB",
        "990.0 MB",
        "1.0 GB",
        "13.5 GB",
    ]
