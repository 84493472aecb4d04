"""Folders of pictures are captioned once each, in order, whatever interrupts it."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_llava import generate, load
from mlx_llava.caption import main
from mlx_llava.captioning.questions import PROMPT
from mlx_llava.generation.jobs import in_order
from mlx_llava.inputs.image_paths import find_images
from tests.conftest import ROOT, shared_data

sys.path.insert(0, str(ROOT / "scripts"))
import shapes

COUNT = 24


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    """A folder of pictures, one of them broken, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("drawings")
    shapes.write_pictures(folder, shapes.make_scenes("seen", COUNT, 4))
    (folder / "images" / "000005.png").write_bytes(b"broken")
    (folder / "images" / "notes.md").write_text("no picture")
    (folder / "images" / "._000001.png").write_bytes(b"macOS's own")
    return folder


@pytest.fixture(scope="module")
def expected(drawings) -> dict[str, str]:
    """What one picture after the other is said to show."""
    model, processor = load()
    paths = [str(path) for path in sorted((drawings / "images").glob("0*.png"))]
    return {
        path: generate(model, processor, PROMPT, path) for path in paths if "000005" not in path
    }


def read_csv(path: Path) -> list[tuple[str, ...]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


@pytest.mark.usefixtures("machine")
def test_lines(drawings, expected, tmp_path, capsys):
    out = tmp_path / "new" / "captions.jsonl"
    assert main([str(drawings), "--recursive", "--out", str(out)]) == 2
    assert f"1 of {COUNT} pictures failed" in capsys.readouterr().err
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(line["image"], line["text"]) for line in lines] == [*expected.items()]
    (error,) = (tmp_path / "new" / "captions.errors.jsonl").read_text().splitlines()
    assert json.loads(error)["image"].endswith("000005.png")
    assert "is not an image" in json.loads(error)["error"]


def test_a_table_goes_on_where_it_was_left(drawings, expected, tmp_path, capsys):
    out = tmp_path / "captions.csv"
    arguments = [str(drawings / "images"), "--out", str(out)]
    main(arguments)
    whole = out.read_bytes()
    assert read_csv(out) == [("image", "text"), *expected.items()]
    assert main(arguments) == 2
    assert "already; --resume goes on" in capsys.readouterr().err
    out.write_bytes(whole[: len(whole) // 2])
    main([*arguments, "--resume"])
    assert out.read_bytes() == whole


def test_text_files_beside(drawings, expected, capsys):
    arguments = [str(drawings / "images" / "00*.png"), "--out", "txt", "--max-tokens", "128"]
    main(arguments)
    for path, text in expected.items():
        assert Path(path).with_suffix(".txt").read_text(encoding="utf-8") == text + "\n"
    assert not list(drawings.rglob("*.partial"))
    assert main(arguments) == 2
    assert "--resume goes on" in capsys.readouterr().err
    for path in [*drawings.rglob("*.txt"), Path("captions.errors.jsonl")]:
        path.unlink()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_kills_lose_nothing_and_double_nothing(drawings, expected, tmp_path):
    out = tmp_path / "captions.jsonl"
    command = [sys.executable, "-m", "mlx_llava.caption", str(drawings / "images"), "--resume"]
    command += ["--out", str(out), "--batch-size", "2"]
    chance, kills = random.Random(0), 0
    while kills < 4:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = out.read_bytes() if out.exists() else b""
        while process.poll() is None and (out.read_bytes() if out.exists() else b"") == before:
            time.sleep(0.01)
        time.sleep(chance.random() / 20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert main(command[3:]) == 2  # for the broken one
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(line["image"], line["text"]) for line in lines] == [*expected.items()]
    assert len(out.with_suffix(".errors.jsonl").read_text().splitlines()) == 1


@given(st.permutations(range(8)))
def test_answers_come_in_order(order):
    lines = [{"index": index} for index in order]
    assert [line["index"] for line in in_order(iter(lines))] == list(range(8))


def test_a_folder_that_is_closed_is_not_called_empty(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir(mode=0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    user = os.geteuid()
    if user == 0:  # to whom nothing is closed
        os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match="The folder closed cannot be read"):
            find_images(["closed"])
    finally:
        os.seteuid(user)


def test_pictures_are_found_once_and_in_order(tmp_path):
    names = (
        "b.JPG",
        "a.png",
        "c/d.webp",
        "c/e/f.heic",
        "[1].gif",
        "x.txt",
        ".hidden.png",
        "c/.png",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(["."]) == ["[1].gif", "a.png", "b.JPG"]
    assert find_images([str(tmp_path)]) == [
        str(tmp_path / n) for n in ("[1].gif", "a.png", "b.JPG")
    ]
    found = find_images(["[1].gif", "c/**/*", "*.png", "a.png"])
    assert found == ["[1].gif", "c/d.webp", "c/e/f.heic", "a.png"]
    assert len(find_images([str(tmp_path)], recursive=True)) == 5


def test_links_are_followed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/2024/a.png", "photos/2025/b.png", "elsewhere/c.png", "photos/b.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    for link, target in {
        "photos/2024/all": "..",
        "photos/2025/all": "../../photos",
        "photos/1": "../elsewhere",
        "photos/first": "../elsewhere",
        "photos/a.png": "2024/a.png",
        "photos/2025/twice.png": "../2024/a.png",
        "photos/2024/itself": "itself",
        "photos/2024/gone.png": "nowhere",
    }.items():
        Path(link).symlink_to(target)
    own = ["photos/2024/a.png", "photos/2025/b.png", "photos/b.png"]
    skipped: set[Path] = set()
    assert find_images(["photos"], True, skipped) == ["photos/1/c.png", *own]
    assert {str(path) for path in skipped} == {"photos/2024/gone.png", "photos/2024/itself"}
    for pattern in ("photos/**/*.png", "photos/**", "**/photos/**/**/*"):
        assert sorted(find_images([pattern])) == ["photos/1/c.png", *own]
    assert find_images(["photos"]) == ["photos/a.png", "photos/b.png"]
    assert find_images(["photos/2024/all/a.png", "photos/2024"]) == ["photos/2024/all/a.png"]


def test_a_reported_loop_is_one_picture():
    photos = shared_data("reports/caption_link_loop/photos")
    assert find_images([str(photos)], True) == [str(photos / "2024" / "a.png")]


def test_one_text_that_cannot_be_written_is_one_error(drawings, capsys):
    picture = drawings / "images" / "000001.png"
    names = ["a.png", "x" * 251 + ".png", "\N{OX}" * 62 + ".jpeg", "z.png"]
    for name in names:
        shutil.copy(picture, name)
    for name in ("clip.mov", "photo.raw", "other.mov", "README"):
        Path(name).touch()
    Path("a.txt").symlink_to("nowhere")
    Path("txt").mkdir()
    assert main([".", "--out", "txt", "-m", "2"]) == 2
    *_, counts, error = capsys.readouterr().err.splitlines()
    assert counts == "3 written, 1 failed, 4 skipped (2 .mov, 1 .raw, 1 without ending)"
    assert error == "error: 1 of 4 pictures failed; captions.errors.jsonl says why."
    line = json.loads(Path("captions.errors.jsonl").read_text())
    assert line == {"image": "a.png", "error": "There is a.txt already."}
    assert Path("a.txt").readlink() == Path("nowhere")
    for name in names[1:]:
        Path(name).with_suffix(".txt").unlink()
    assert main([".", "--out", "txt", "-m", "2", "--resume"]) == 2
    assert "3 written, 1 failed" in capsys.readouterr().err
    assert main([".", "--out", "txt", "-m", "2", "--resume"]) == 2
    assert "0 written, 3 done before, 1 failed" in capsys.readouterr().err
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("their.jsonl", '[{"image": "a.png", "text": "no end"}]'),
        ("their.jsonl", '{"question_id": 1, "image": "a.png", "text": "What is it?"}\n'),
        ("their.jsonl", '{"image": "a.png", "text": "mine", "split": "train"}\n'),
        ("their.jsonl", '{"image":"a.png","text":"mine"}\n'),
        ("their.jsonl", "notes without an end"),
        ("their.csv", "image,text\na.png,mine\n"),
        ("their.csv", "image,text"),
        ("their.csv", '"image","text"\na.png,mine\n'),
        ("their.csv", '"image","caption"\n'),
        ("captions.errors.jsonl", '{"image": "a.png", "text": "mine"}\n'),
    ],
)
def test_what_somebody_else_wrote_is_not_gone_on_with(name, content, drawings, capsys):
    Path(name).write_text(content)
    out = name if name.startswith("their") else "captions.csv"
    arguments = [str(drawings / "images" / "000001.png"), "--out", out]
    for more in ([], ["--resume"]):
        assert main([*arguments, *more]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert Path(name).read_text() == content
    assert [path.name for path in Path().iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "There is no picture in nowhere"),
        (["."], "--recursive looks into its folders"),
        (["in/a.png", "--out", "captions.json"], "must end in .jsonl or .csv, or be txt"),
        (["in/a.png", "--batch-size", "0"], "The batch size is 0"),
        (["in/a.png", "--temp", "-1", "--model", "never read"], "temp is -1.0"),
        (["in/a.png", "--out", "other.csv"], "holds rows that this command did not write"),
        (
            ["in/a.png", "--out", "theirs.csv"],
            "theirs.csv holds rows that this command did not write",
        ),
        (["in/a.png", "--out", "other.jsonl"], "lines that this command did not write"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys):
    Path("in").mkdir()
    for name in ("a.png", "a.jpg"):
        (Path("in") / name).touch()
    Path("other.csv").write_text("x,y\n1,2\n")
    Path("other.jsonl").write_text("nothing\n")
    Path("theirs.csv").write_text("image,text\nA,no end")
    assert main([*arguments]) == 2
    assert Path("theirs.csv").read_text() == "image,text\nA,no end"
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith("error: ")
