"""Files are named by captions with all that belongs to them, and get every name back."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_llava.captioning.rename import Move, Renames, clean_name, plan

MANY_SCRIPTS = "\u092e\u0940\u0928\u093e \u4e00\u53ea\u732b"


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(name)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def renamed(folder: Path, captions: dict[str, str], undo: Path) -> dict[str, str]:
    """What is in a folder after its pictures were named: the old name by the new one."""
    for move in plan({str(folder / name): text for name, text in captions.items()}):
        Renames(undo).apply(move)
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def test_what_belongs_together_moves_together(folder, tmp_path):
    own = ["1.JPG", "1.CR2", "1.xmp", "1.JPG.xmp", "1.CR2.pp3", "1_01.CR2.xmp", "1.txt"]
    others = ["1.edited.JPG", "1.edited.xmp", "10.JPG", "1_01.JPG", "1_01.JPG.xmp", "11", ".1.JPG"]
    make(folder, *own, *others)
    before = hashes(folder)
    expected = {name: name for name in others} | {"A dog" + name[1:]: name for name in own}
    assert renamed(folder, {"1.JPG": "A dog.\nMore."}, tmp_path / "undo") == expected
    assert Renames(tmp_path / "undo").undo() == (len(own), [])
    assert hashes(folder) == before
    assert not (tmp_path / "undo").exists()


@pytest.mark.parametrize(
    ("there", "captions", "expected"),
    [
        (["a.png", "b.png", "c.png"], dict.fromkeys(("a.png", "b.png", "c.png"), "x"),
         {"x.png": "a.png", "x 2.png": "b.png", "x 3.png": "c.png"}),
        # Somebody else's file of the name, of another case, accent or ending, stays.
        (["a.png", "X.PNG"], {"a.png": "x"}, {"x 2.png": "a.png", "X.PNG": "X.PNG"}),
        (["a.png", "e\u0301.png"], {"a.png": "\u00c9"},
         {"\u00c9 2.png": "a.png", "e\u0301.png": "e\u0301.png"}),
        (["a.png", "x.txt"], {"a.png": "x"}, {"x 2.png": "a.png", "x.txt": "x.txt"}),
        (["a.png", "x.b.jpg"], {"a.png": "x"}, {"x 2.png": "a.png", "x.b.jpg": "x.b.jpg"}),
        # Nothing takes a name that is only about to become free.
        (["a.png", "b.png"], {"a.png": "b", "b.png": "a"}, {"b 2.png": "a.png", "a.png": "b.png"}),
        # A picture that has its name keeps it, its number too.
        (["x.png", "x 2.png"], {"x.png": "x", "x 2.png": "x"},
         {"x.png": "x.png", "x 2.png": "x 2.png"}),
        (["X.png"], {"X.png": "x"}, {"x.png": "X.png"}),
        # Two pictures of one name are one, and are named by the first.
        (["a.jpg", "a.png"], {"a.jpg": "x", "a.png": "y"}, {"x.jpg": "a.jpg", "x.png": "a.png"}),
        (["a.png"], {"a.png": " \n"}, {"a.png": "a.png"}),
        (["a.png"], {"a.png": "x", "gone.png": "y"}, {"x.png": "a.png"}),
    ],
)  # fmt: skip
def test_names(there, captions, expected, folder, tmp_path):
    make(folder, *there)
    assert renamed(folder, captions, tmp_path / "undo") == expected


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A red/green: circle.", "A red green circle"),
        ('a\\b*c?d"e<f>g|h\ti\x00j\u2028k', "a b c d e f g h i j"),
        ("...hidden", "hidden"),
        ("-rf ~", "rf ~"),
        ("~$lock", "lock"),
        ("CON", "CON_"),
        ("com1.x", "com1.x_"),
        ("console", "console"),
        ("3.5 inches, or so, ", "3.5 inches, or so"),
        ("cafe\u0301", "caf\u00e9"),
        (MANY_SCRIPTS, MANY_SCRIPTS),
        ("word " * 30, " ".join(["word"] * 20)),
        ("\u732b" * 50, "\u732b" * 33),
        ("x" * 300, "x" * 100),
        ("half \ud800", "half"),
        ("...", ""),
    ],
)  # fmt: skip
def test_clean_names(caption, name):
    assert clean_name(caption) == name


@settings(deadline=None)
@given(st.text(), st.integers(0, 120))
def test_any_caption_is_a_name(caption, limit):
    name = clean_name(caption, limit)
    assert len(name.encode()) <= limit
    assert not name or name not in (".", "..")
    assert "/" not in name
    assert "\0" not in name


def test_the_longest_names_fit(folder, tmp_path):
    rest = "." + "e" * 240
    make(folder, "a.png", "a" + rest)
    assert renamed(folder, {"a.png": "some words for it"}, tmp_path / "undo") == {
        "some.png": "a.png",
        "some" + rest: "a" + rest,
    }


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "a disk without them"])
def test_nothing_is_replaced(links, folder, tmp_path, monkeypatch):
    if not links:

        def refuse(*_, **__):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    make(folder, "a.png", "a.xmp", "b.png")
    (move,) = plan({str(folder / "a.png"): "x"})
    make(folder, "x.xmp")  # by somebody, meanwhile
    before = hashes(folder)
    undo = Renames(tmp_path / "undo")
    with pytest.raises(FileExistsError):
        undo.apply(move)
    assert hashes(folder) == before
    (folder / "x.xmp").unlink()
    undo.apply(move)
    make(folder, "a.png")  # by somebody, meanwhile
    restored, (why,) = undo.undo()
    assert restored == 1
    assert why.startswith(f"{folder / 'x.png'}: ")
    assert {p.name: p.read_text() for p in folder.iterdir()} == {
        "a.png": "a.png",
        "x.png": "a.png",
        "a.xmp": "a.xmp",
        "b.png": "b.png",
    }
    (folder / "a.png").unlink()
    assert undo.undo() == (1, [])
    assert {p.name for p in folder.iterdir()} == {"a.png", "a.xmp", "b.png"}


@pytest.mark.parametrize("at", range(8))
def test_a_kill_at_any_step_is_finished_or_undone(at, folder, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    steps = iter(range(99))

    def dying(step):
        def run(*args, **kwargs):
            if next(steps) == at:
                raise Killed
            return step(*args, **kwargs)

        return run

    make(folder, "a.png", "a.xmp", "a.cr2", "b.png")
    before = hashes(folder)
    captions = {"a.png": "x", "b.png": "y"}
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", dying(os.link))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        with pytest.raises(Killed):
            renamed(folder, captions, tmp_path / "undo")
    if at % 2:
        Renames(tmp_path / "undo").finish()
        names = {p.name for p in folder.iterdir()}
        assert {"x.png", "x.xmp", "x.cr2"} <= names
        assert len(names) == 4
    assert Renames(tmp_path / "undo").undo()[1] == []
    assert hashes(folder) == before


WORDS = st.sampled_from(["x", "X", "y", "a b", "a/b", "0", "1"])


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)
@given(rounds=st.lists(st.lists(WORDS, min_size=4, max_size=4), max_size=3))
def test_undo_restores_every_name(rounds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    make(folder, "0.png", "1.png", "1.xmp", "1.png.xmp", "2.jpg", "3.jpg", "x.md")
    before, undo = hashes(folder), Renames(folder / ".." / f"{folder.name}.undo")
    for texts in rounds:
        pictures = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".jpg"))
        for move in plan(dict(zip(map(str, pictures), texts, strict=True))):
            undo.apply(move)
        assert sorted(hashes(folder).values()) == sorted(before.values())
    if undo.path.exists():
        assert undo.undo()[1] == []
    assert hashes(folder) == before


def test_what_cannot_be_undone_now_can_be_later(folder, tmp_path):
    make(folder, "a.png")
    undo = Renames(tmp_path / "undo")
    renamed(folder, {"a.png": "x"}, undo.path)
    renamed(folder, {"x.png": "y"}, undo.path)
    assert undo.names() == [[str(folder / name) for name in ("a.png", "x.png", "y.png")]]
    make(folder, "x.png")  # in the way
    assert undo.undo()[0] == 0
    (folder / "x.png").unlink()
    away = folder.rename(tmp_path / "unmounted")
    assert undo.undo()[0] == 0
    away.rename(folder)
    assert undo.undo() == (2, [])
    assert [path.name for path in folder.iterdir()] == ["a.png"]


def test_a_new_file_of_an_old_name_keeps_it(folder, tmp_path):
    make(folder, "a.png", "a.xmp")
    undo = Renames(tmp_path / "undo")
    renamed(folder, {"a.png": "x"}, undo.path)
    undo.close()
    (folder / "x.png").rename(tmp_path / "archived.png")
    make(folder, "a.png")  # of the camera, which counts from the beginning
    undo.finish()
    assert {path.name for path in folder.iterdir()} == {"a.png", "x.xmp"}


def test_a_group_that_a_kill_has_not_let_begin_is_forgotten(folder, tmp_path):
    make(folder, "a.png", "b.png", "b.xmp")
    undo = Renames(tmp_path / "undo")
    renamed(folder, {"a.png": "x"}, undo.path)
    (kept,) = undo.moves()
    undo.add({"folder": "photos", "from": "b", "to": "y", "files": [".png", ".xmp"]})
    undo.finish()
    assert undo.moves() == [kept]
    assert {path.name for path in folder.iterdir()} == {"x.png", "b.png", "b.xmp"}


def test_what_is_not_there_can_be_undone_later(folder, tmp_path):
    make(folder, "a.png", "b.png")
    first, second = Renames(tmp_path / "first"), Renames(tmp_path / "second")
    renamed(folder, {"a.png": "x", "b.png": "y"}, first.path)
    renamed(folder, {"x.png": "z"}, second.path)
    restored, (why,) = first.undo()
    assert restored == 1
    assert why == f"{folder / 'x.png'}: it is not there"
    assert second.undo() == first.undo() == (1, [])
    assert {path.name for path in folder.iterdir()} == {"a.png", "b.png"}


def test_what_has_come_to_a_picture_goes_back_with_it(folder, tmp_path):
    make(folder, "a.png", "other.png")
    undo = Renames(tmp_path / "undo")
    renamed(folder, {"a.png": "x"}, undo.path)
    make(folder, "x.xmp", "x.png.xmp")
    renamed(folder, {"x.png": "y"}, undo.path)
    make(folder, "y.txt", "y.cr2", "a.cr2")  # which is in the way
    restored, (why,) = undo.undo()
    assert restored == 5 + 4
    assert why.startswith(f"{folder / 'x.cr2'}: ")
    (folder / "a.cr2").unlink()
    assert undo.undo() == (1, [])
    assert {path.name for path in folder.iterdir()} == {
        *("a.png", "a.xmp", "a.png.xmp", "a.txt", "a.cr2", "other.png")
    }


def test_a_moved_folder_can_be_undone(folder, tmp_path):
    make(folder, "a.png")
    renamed(folder, {"a.png": "x"}, tmp_path / "undo")
    there = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name} elsewhere"))
    assert Renames(there / "undo").undo() == (1, [])
    assert [path.name for path in (there / "photos").iterdir()] == ["a.png"]


def test_the_captions_themselves_keep_their_names(folder):
    make(folder, "a.png", "a.csv", "a.errors.jsonl")
    moves = plan({str(folder / "a.png"): "x"}, [folder / "a.csv", folder / "a.errors.jsonl"])
    assert [move.rests for move in moves] == [(".png",)]


def test_what_a_kill_has_left_of_an_undo_file_is_no_part_of_the_next(folder, tmp_path):
    renames = Renames(tmp_path / "undo.jsonl")
    moves = [Move(str(folder), name, name * 2, (".jpg",)) for name in ("a", "b")]
    for move in moves:
        (folder / f"{move.old}.jpg").touch()
        renames.apply(move)
    (tmp_path / ".undo.jsonl.partial").write_bytes(renames.path.read_bytes())
    (folder / "b.jpg").touch()  # so that one stays
    assert renames.undo()[0] == 1
    assert renames.moves() == moves[1:]


def test_two_files_of_one_number_are_not_one(folder, tmp_path, monkeypatch):
    """As some network disks count them."""
    make(folder, "a.png")
    (move,) = plan({str(folder / "a.png"): "x"})
    make(folder, "x.png")
    monkeypatch.setattr(os.path, "samestat", lambda one, other: True)
    with pytest.raises(FileExistsError):
        Renames(tmp_path / "undo").apply(move)
    assert {p.name: p.read_text() for p in folder.iterdir()} == {n: n for n in ("a.png", "x.png")}
    assert Renames(tmp_path / "undo").moves() == []


def test_names_that_are_no_text_and_links(folder, tmp_path):
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_text("x")
    (folder / "link.png").symlink_to("nowhere")
    pictures = sorted(str(path) for path in folder.iterdir())
    for move in plan(dict.fromkeys(pictures, "x")):
        Renames(tmp_path / "undo").apply(move)
    assert {p.name for p in folder.iterdir()} == {"x.png", "x 2.png"}
    assert Renames(tmp_path / "undo").undo() == (2, [])
    assert sorted(str(path) for path in folder.iterdir()) == pictures


@pytest.mark.parametrize(
    "line",
    [
        '{"image": "a.png", "text": "x"}',
        '{"folder": "/", "from": "etc/x", "to": "y", "files": [".png"]}',
        '{"folder": "/", "from": "x", "to": "y", "files": [1]}',
        "notes",
    ],
)
def test_other_files_undo_nothing(line, tmp_path):
    (tmp_path / "undo").write_text(line + "\n")
    with pytest.raises(ValueError, match="undo"):
        Renames(tmp_path / "undo").undo()


def test_many_of_one_name_do_not_take_long(folder):  # a minute, if each looked at all others
    pictures = [folder / f"{number}.png" for number in range(2000)]
    for picture in pictures:
        picture.touch()
    moves = list(plan(dict.fromkeys(map(str, pictures), "x")))
    assert len({move.new for move in moves}) == len(pictures)
