"""New pictures of a folder are given once each, when all of each is there."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mlx_llava.captioning.watch import whole_pictures


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 99).convert("RGB").save(file, "PNG")
    return file.getvalue()


def looking(folder: Path, patience: float = 60) -> Callable[[], list[str]]:
    """Looks into a folder once more; what has become whole since."""

    def find() -> list[str]:
        return sorted(str(path) for path in folder.iterdir())

    watching = whole_pictures(find, lambda image: "done" in image, pause=0, patience=patience)
    return lambda: [Path(image).name for image in next(watching)]


@pytest.fixture
def look(tmp_path):
    return looking(tmp_path)


def test_a_file_is_given_once_and_after_a_second_look(tmp_path, look):
    assert look() == []
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "done.png").write_bytes(picture())
    assert look() == []
    (tmp_path / "b.png").write_bytes(picture())
    assert look() == ["a.png"]
    assert look() == ["b.png"]
    assert look() == []


def test_half_written_files_are_waited_for(tmp_path, look):
    data, path = picture(), tmp_path / "a.png"
    for end in (10, len(data) // 2, len(data) * 9 // 10):
        path.write_bytes(data[:end])
        assert look() == []  # has changed
        assert look() == []  # stands still, and cannot be decoded
    path.write_bytes(data)
    assert look() == []
    assert look() == ["a.png"]


def test_times_alone_are_a_change(tmp_path, look):
    path = tmp_path / "a.png"
    for second in range(3):
        path.write_bytes(picture())
        os.utime(path, (second, second))
        assert look() == []
    assert look() == ["a.png"]


def test_what_stays_broken_is_given_in_the_end(tmp_path):
    look = looking(tmp_path, patience=0)
    (tmp_path / "a.png").write_bytes(picture()[:50])
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftyp")
    assert look() == []
    assert look() == ["a.mp4", "a.png"]


def test_what_was_broken_is_given_again_when_it_has_changed(tmp_path):
    look, path = looking(tmp_path, patience=0), tmp_path / "a.png"
    path.write_bytes(picture()[:50])
    assert [look(), look(), look()] == [[], ["a.png"], []]
    path.write_bytes(picture())
    assert [look(), look(), look()] == [[], ["a.png"], []]


def test_what_vanishes_is_forgotten(tmp_path, look):
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    assert look() == []
    path.unlink()
    assert look() == []
    path.write_bytes(picture())
    assert look() == []
    assert look() == ["a.png"]


def test_waiting_takes_no_time(tmp_path):
    (tmp_path / "a.png").write_bytes(picture()[:50])
    watching = whole_pictures(lambda: [str(tmp_path / "a.png")], lambda _: False, pause=0.05)
    began = time.thread_time()
    assert [next(watching) for _ in range(10)] == [[]] * 10
    assert time.thread_time() - began < 0.2
