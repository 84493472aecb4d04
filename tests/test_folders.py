"""A folder is replaced only where all of it is known to be ours, and nothing is ever half there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_llava.folders import MANIFEST, _swap, check_target, new_folder, remove_folder
from tests.conftest import GOLDENS, ROOT, shared_data


def write(target: Path, content: str = "new", **options) -> None:
    with new_folder(target, "model", **options) as beside:
        (beside / "config.json").write_text(content)
        (beside / "examples").mkdir()
        (beside / "examples" / "a.png").write_text(content)


def snapshot(folder: Path) -> dict[str, object]:
    """Every path below a folder with what it holds."""
    return {
        str(path.relative_to(folder)): path.readlink().name
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def add_note(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def add_nothing_but_a_folder(folder: Path) -> None:
    (folder / "album").mkdir()


def add_git(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")


def add_below(folder: Path) -> None:
    (folder / "examples" / "b.png").write_text("mine")


def add_link(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)


def link_a_file_of_ours(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "kept.json")
    (folder / "config.json").symlink_to(folder.parent / "kept.json")


def edit(folder: Path) -> None:
    (folder / "config.json").write_text("wen")


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("[")


def list_nothing(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"kind": "model", "files": null}')


def be_of_another_kind(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(data | {"kind": "adapter"}))


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    "change",
    [
        add_note,
        add_nothing_but_a_folder,
        add_git,
        add_below,
        add_link,
        link_a_file_of_ours,
        edit,
        break_manifest,
        list_nothing,
        be_of_another_kind,
        lose_the_manifest,
    ],
)
def test_what_is_a_users_is_never_replaced(change, tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    change(target)
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="not written by mlx_llava"):
        write(target, force=True)
    assert snapshot(tmp_path) == before


def test_what_is_ours_is_replaced(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    for name in ("._config.json", ".DS_Store", "examples/._a.png"):
        (target / name).write_text("macOS's own")
    with pytest.raises(FileExistsError, match="exists already; --force replaces it"):
        write(target)
    write(target, force=True)
    assert snapshot(tmp_path).keys() == {
        *("out", "out/config.json", "out/examples", "out/examples/a.png", f"out/{MANIFEST}")
    }
    assert (target / "config.json").read_text() == "new"


def test_an_empty_folder_is_nobodys(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", force=True)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_model_of_other_programs_is_replaced(name, tmp_path):
    target = tmp_path / "out"
    shutil.copytree(GOLDENS / name, target)
    (target / "README.md").write_text("a card")
    write(target, force=True)
    assert (target / "config.json").read_text() == "new"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("photo.jpg", ""),
        ("model.gguf", ""),
        ("adapter_model.safetensors", ""),
        ("pytorch_model.bin", ""),
        ("config.json", None),
        ("model.safetensors", None),
        ("tokenizer.json/notes.txt", ""),
    ],
)
def test_what_only_looks_like_a_model_is_not(name, content, tmp_path):
    target = tmp_path / "out"
    shutil.copytree(GOLDENS / "llava", target)
    for parent in (target / name).relative_to(target).parents:
        if parent.name:
            (target / parent).unlink()
            (target / parent).mkdir()
    if content is None:
        (target / name).unlink()
    else:
        (target / name).write_text(content)
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="not written by mlx_llava"):
        write(target, force=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("target", "read"),
    [
        ("out", "out"),
        ("out", "out/examples"),
        ("out", "out/config.json"),
        ("out", "link"),
        ("link/../out", "out"),
        ("x/../out", "link/examples"),
        ("out", "."),
    ],
)
def test_what_is_read_is_never_replaced(target, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("out"), "old")
    Path("x").mkdir()
    Path("link").symlink_to("out")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="choose another folder"):
        write(Path(target), force=True, keep=["none/such", None, read])
    assert snapshot(tmp_path) == before


def test_links_files_and_the_folder_one_is_in_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "out" / "examples")
    before = snapshot(tmp_path)
    for name, message in (
        ("link", "is a link to out"),
        ("nowhere", "is a link to gone"),
        ("loop", "is a link to loop"),
        ("file", "is no folder"),
        ("out", "is where this command runs"),
    ):
        with pytest.raises(FileExistsError, match=message):
            check_target(tmp_path / name, "model", force=True)
    with pytest.raises(FileExistsError, match="is no folder that can be replaced"):
        check_target(Path("/"), "model", force=True)
    with pytest.raises(OSError, match="loop"):
        write(tmp_path / "loop" / "out")
    assert snapshot(tmp_path) == before


def test_what_comes_while_a_folder_is_filled_stays(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    filling = new_folder(target, "model", force=True)
    (filling.__enter__() / "config.json").write_text("new")
    add_note(target)
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        filling.__exit__(None, None, None)
    assert (target / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_comes_at_the_last_moment_is_left_aside(tmp_path):
    target, beside, aside = (tmp_path / name for name in ("out", "new", ".out.replaced"))
    write(target, "old")
    write(beside)
    add_note(target)
    with pytest.raises(FileExistsError, match=r"\.out\.replaced is in the way, and holds notes"):
        _swap(beside, target, "model")
    assert (target / "config.json").read_text() == "new"
    assert (aside / "notes.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="move it away"):
        write(target, force=True)
    assert (aside / "notes.txt").read_text() == "mine"


def test_a_swap_that_fails_gives_the_old_folder_its_name_back(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    with pytest.raises(FileNotFoundError):
        _swap(tmp_path / "gone", target, "model")
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_hidden_folders_of_others_are_left_alone(tmp_path):
    for ending in ("partial", "replaced"):
        aside = tmp_path / f".out.{ending}"
        aside.mkdir()
        add_note(aside)
        with pytest.raises(FileExistsError, match="is in the way, and holds notes.txt"):
            write(tmp_path / "out")
        aside.rename(tmp_path / ending)
        aside.symlink_to(tmp_path / ending)
        with pytest.raises(FileExistsError, match="is in the way, and holds a link"):
            write(tmp_path / "out")
        aside.unlink()
    write(tmp_path / "out")


def test_what_is_left_of_a_removed_folder_is_not_put_back(tmp_path):
    """A kill while the old was removed, after which somebody removed the new."""
    for name in ("config.json", "examples/a.png"):
        aside = tmp_path / ".out.replaced"
        write(tmp_path / "out", "old")
        (tmp_path / "out").rename(aside)
        (aside / name).unlink()
        check_target(tmp_path / "out", "model")
        assert not (tmp_path / "out").exists()
        write(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(tmp_path / "out")


def test_two_commands_do_not_write_one_folder(tmp_path):
    with new_folder(tmp_path / "out", "model") as beside:
        (beside / "config.json").write_text("first")
        with pytest.raises(FileExistsError, match="is being written by another command"):
            write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "config.json").read_text() == "first"


def test_a_long_name_has_room(tmp_path):
    target = tmp_path / ("x" * 250)
    write(target)
    write(target, force=True)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_folder_with_somebodys_notes_is_not_removed(tmp_path):
    write(tmp_path / "out")
    add_note(tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError):
        remove_folder(tmp_path / "out", "model")
    assert snapshot(tmp_path) == before


KILLS = """
import os, sys
from pathlib import Path
from mlx_llava.folders import new_folder
from tests.test_folders import snapshot, write

root = Path(sys.argv[1])
root.mkdir()
target = root / "out"
write(target, "old")
old = snapshot(target)
write(target, "new", force=True)
new = snapshot(target)
done, kills = False, 0
while not done:
    write(target, "old", force=True)
    if not os.fork():  # one that was killed before
        with new_folder(target, "model", force=True) as beside:
            (beside / "config.json").write_text("begun")
            os._exit(9)
    os.wait()
    if not (child := os.fork()):
        left = kills
        def kill(event, arguments):
            global left
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"):
                left -= 1
                if left < 0:
                    os._exit(9)
        sys.addaudithook(kill)
        write(target, "new", force=True)
        os._exit(0)
    done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    whole = [path.name for path in root.iterdir() if snapshot(path) in (old, new)]
    assert whole and (not target.exists() or "out" in whole), (kills, whole)
    kills += 1
    write(target, "new", force=True)
    assert [path.name for path in root.iterdir()] == ["out"], kills
    assert snapshot(target) == new
print(kills)
"""


def test_a_kill_at_any_moment_loses_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path / "root")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) > 20


def test_a_reported_folder_of_photos_stays(tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(shared_data("reports/force_deletes_folder/photos"), photos)
    before = snapshot(photos)
    with pytest.raises(FileExistsError, match=r"photos holds dog\.jpeg and 1 more"):
        write(photos, force=True)
    assert snapshot(photos) == before
