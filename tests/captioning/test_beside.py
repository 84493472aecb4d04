"""Files beside pictures: which is whose, and nothing of somebody else's is replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlx_llava.captioning.beside import Beside, Sidecars, TextFiles
from mlx_llava.captioning.xmp import read_description, with_description


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pictures_of_one_name_have_a_file_each():
    images = ["1.jpg", "1.png", "2.png", "1.webp", "A.jpg", "a.png", "x/1.jpg"]
    names = ["1.txt", "1.png.txt", "2.txt", "1.webp.txt", "A.txt", "a.png.txt", "x/1.txt"]
    beside = Beside(".txt")
    assert [str(beside.path(image)) for image in images] == names
    assert [str(beside.path(image)) for image in images] == names
    Path("1.jpg.txt").touch()  # in a later run, the first of them has its whole name
    assert [str(Beside(".txt").path(image)) for image in images[:1]] == ["1.jpg.txt"]
    later = Beside(".txt")
    assert [str(later.path(image)) for image in images[:2]] == ["1.jpg.txt", "1.txt"]


@pytest.mark.parametrize(
    ("there", "image", "name"),
    [
        (["1.txt"], "1.jpg", "1.txt"),
        (["1.txt", "1.png"], "1.jpg", "1.jpg.txt"),  # it may be the other's
        (["1.txt", "1.PNG"], "1.jpg", "1.jpg.txt"),
        (["1.txt", "1.png", "1.png.txt"], "1.jpg", "1.txt"),
        (["1.txt", "1.cr2", "1.mov"], "1.jpg", "1.txt"),  # neither of which has texts
        (["1.txt", "1.heic"], "1.mov", "1.mov.txt"),
        (["1.png"], "1.jpg", "1.txt"),
    ],
)
def test_a_file_of_which_nothing_tells_whose_it_is_is_nobodys(there, image, name):
    for other in (*there, image):
        Path(other).touch()
    assert str(Beside(".txt").path(image)) == name
    twins = [other for other in there if other.lower() == "1.png"]
    assert [str(Beside(".txt").path(twin)) for twin in twins] == (
        ["1.txt"] if "1.txt" not in there else [f"{twin}.txt" for twin in twins]
    )
    if "1.txt" in there:
        assert str(Beside(".txt", takes_any=True).path(image)) == "1.txt"


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ([], "a.xmp"),
        (["a.xmp"], "a.xmp"),
        (["a.jpg.xmp"], "a.jpg.xmp"),
        (["a.xmp", "a.jpg.xmp"], "a.jpg.xmp"),
    ],
)
def test_a_sidecar_goes_where_it_is(there, chosen):
    for name in there:
        Path(name).write_bytes(with_description(None, ""))
    Sidecars().write("a.jpg", "x")
    described = {p.name for p in Path().iterdir() if read_description(p.read_bytes())}
    assert described == {chosen}
    assert {p.name for p in Path().iterdir()} == {*there, chosen}


def test_a_description_is_replaced_only_on_demand():
    path = Path("a.xmp")
    Sidecars().write("a.jpg", "mine")
    path.chmod(0o640)
    Sidecars().write("a.jpg", "mine")
    with pytest.raises(ValueError, match=r"a\.xmp has a description already"):
        Sidecars().write("a.jpg", "yours")
    assert read_description(path.read_bytes()) == "mine"
    Sidecars(overwrite=True).write("a.jpg", "yours")
    assert read_description(path.read_bytes()) == "yours"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_protected_sidecar_stays():
    Sidecars().write("a.jpg", "mine")
    Path("a.xmp").chmod(0o444)
    with pytest.raises(ValueError, match=r"a\.xmp is protected from being written"):
        Sidecars(overwrite=True).write("a.jpg", "yours")
    assert read_description(Path("a.xmp").read_bytes()) == "mine"


@pytest.mark.parametrize("content", [b"notes", b"<!DOCTYPE x><x/>", b"\xff\xfe<\0"])
def test_what_is_no_sidecar_stays(content):
    Path("a.xmp").write_bytes(content)
    assert not Sidecars().is_described("a.jpg")
    with pytest.raises(ValueError, match=r"^a\.xmp .*\.$"):
        Sidecars(overwrite=True).write("a.jpg", "x")
    assert Path("a.xmp").read_bytes() == content
    assert [path.name for path in Path().iterdir()] == ["a.xmp"]


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_stays(kind):
    path = Path("a.xmp")
    {
        "folder": path.mkdir,
        "link": lambda: path.symlink_to("gone"),
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    with pytest.raises(ValueError, match=r"a\.xmp"):
        Sidecars(overwrite=True).write("a.jpg", "x")
    assert os.path.lexists(path)
    assert len(list(Path().iterdir())) == 1


def test_texts_are_replaced_only_on_demand():
    Path("a.txt").write_text("theirs")
    with pytest.raises(ValueError, match=r"There is a\.txt already"):
        TextFiles().write("a.jpg", {"text": "mine"})
    assert Path("a.txt").read_text() == "theirs"
    TextFiles(overwrite=True).write("a.jpg", {"text": "mine", "tags": ["red", "round"], "x": None})
    assert Path("a.txt").read_text() == "mine\nred, round\n"
    assert TextFiles().row("a.jpg") == {"text": "mine\nred, round"}
    Path("a.txt").write_text("no line's end")
    assert TextFiles().row("a.jpg") == {"text": "no line's end"}
