"""Captions where people's tools find them; nothing that is there is lost on the way."""

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
from hashlib import sha256
from pathlib import Path

import pytest

from mlx_llava import generate, load
from mlx_llava.caption import main
from mlx_llava.captioning import watch
from mlx_llava.captioning.questions import PROMPT
from mlx_llava.captioning.run import Run
from mlx_llava.captioning.tables import Lines
from mlx_llava.captioning.xmp import read_description, with_description
from mlx_llava.files import only_writer
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import shapes

COUNT = 4
SCHEMA = {
    "type": "object",
    "properties": {
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 2, "maxItems": 2},
        "sure": {"type": "boolean"},
    },
    "required": ["tags", "sure"],
}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    shapes.write_pictures(folder, shapes.make_scenes("seen", COUNT, 7))
    return folder / "images"


@pytest.fixture(scope="module")
def expected(drawings) -> dict[str, str]:
    """What each picture is said to show, by its name."""
    model, processor = load()
    return {
        path.name: generate(model, processor, PROMPT, str(path))
        for path in sorted(drawings.iterdir())
    }


@pytest.fixture(autouse=True)
def photos(drawings, tmp_path, monkeypatch) -> Path:
    """A folder of pictures in the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(drawings, "photos")
    return Path("photos")


def lines(name: str = "captions.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.iterdir() if path.is_file())
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


def test_sidecars(photos, expected, capsys):
    theirs = with_description(None, "").replace(b"<x:xmpmeta", b"<!-- theirs --><x:xmpmeta")
    first, second, third, fourth = sorted(expected)
    (photos / f"{first}.xmp").write_bytes(theirs)
    (photos / second).with_suffix(".xmp").write_bytes(with_description(None, "By hand."))
    before = hashes(photos)
    assert main(["photos", "--xmp"]) == 2
    assert "There are 1 of 4 pictures with a description already; --skip" in capsys.readouterr().err
    assert hashes(photos) == before
    assert [path.name for path in Path().iterdir()] == ["photos"]
    assert main(["photos", "--xmp", "--skip-existing"]) == 0
    assert "3 written, 0 failed, 1 skipped (1 described)" in capsys.readouterr().err
    described = {p.name: read_description(p.read_bytes()) for p in photos.glob("*.xmp")}
    assert described == {
        f"{first}.xmp": expected[first],
        Path(second).stem + ".xmp": "By hand.",
        Path(third).stem + ".xmp": expected[third],
        Path(fourth).stem + ".xmp": expected[fourth],
    }
    assert b"<!-- theirs -->" in (photos / f"{first}.xmp").read_bytes()
    assert [Path(line["image"]).name for line in lines()] == [first, third, fourth]
    assert main(["photos", "--xmp", "--overwrite"]) == 0
    assert read_description((photos / second).with_suffix(".xmp").read_bytes()) == expected[second]
    assert [Path(line["image"]).name for line in lines()] == [*expected]


def test_sidecars_that_a_kill_has_left_out_are_written_without_the_model(photos, expected, capsys):
    assert main(["photos"]) == 0
    (photos / "000001.xmp").write_bytes(b"<!DOCTYPE x><x/>")
    capsys.readouterr()
    assert main(["photos", "--xmp", "--resume", "--model", "embedded"]) == 2  # asked otherwise
    assert main(["photos", "--xmp", "--resume"]) == 2
    assert "0 written, 3 done before, 1 failed" in capsys.readouterr().err
    names = {name: (photos / name).with_suffix(".xmp") for name in expected if "01" not in name}
    assert {n: read_description(p.read_bytes()) for n, p in names.items()} == {
        name: expected[name] for name in names
    }
    assert lines("captions.errors.jsonl")[0]["error"].endswith("document type, which no XMP needs.")


def test_another_way_of_asking_is_not_gone_on_with(photos, expected, capsys):
    assert main(["photos", "-m", "1"]) == 0
    before = Path("captions.jsonl").read_bytes()
    for path in list(photos.iterdir())[:1]:
        shutil.copy(path, photos / "new.png")
    assert main(["photos", "--resume", "-p", "Which?", "-m", "2", "--temp", "0.5"]) == 2
    error = capsys.readouterr().err
    assert f'--prompt was {{"text": "{PROMPT}"}}, now {{"text": "Which?"}}' in error
    assert "--max-tokens was 1, now 2" in error
    assert "--temp was 0.0, now 0.5" in error
    assert Path("captions.jsonl").read_bytes() == before
    more = ["--batch-size", "1", "--offline", "--recursive"]  # which change no answer
    assert main(["photos", "--resume", "-m", "1", *more]) == 0
    assert [Path(line["image"]).name for line in lines()] == [*expected, "new.png"]
    Path("captions.settings.json").unlink()
    with pytest.warns(UserWarning, match=r"Nothing says how the captions in captions\.jsonl"):
        assert main(["photos", "--resume"]) == 0
    (photos / "new.png").rename(photos / "newer.png")
    assert main(["photos", "--skip-existing", "-m", "3"]) == 0
    assert [Path(line["image"]).name for line in lines()] == [*expected, "new.png", "newer.png"]


def test_texts_of_each_folder_are_asked_for_in_their_way(photos, expected, capsys):
    first, *_ = sorted(expected)
    shutil.copytree(photos, "portraits")
    (photos / "broken.png").write_bytes(b"broken")
    one, other = (["--out", "txt", "-m", "2", "--prefix", prefix] for prefix in ("one ", "other "))
    assert main(["photos", *one]) == 2
    assert main(["portraits", *other]) == 0
    (photos / first).with_suffix(".txt").unlink()
    capsys.readouterr()
    assert main(["photos", *other, "--resume"]) == 2
    said = capsys.readouterr().err
    assert (
        f'captions so far in {photos.absolute()} were asked for otherwise: --prefix was "on' in said
    )
    assert not (photos / first).with_suffix(".txt").exists()
    assert main(["photos", *one, "--resume"]) == 2
    assert "1 written, 3 done before, 1 failed" in capsys.readouterr().err
    assert (photos / first).with_suffix(".txt").read_text().startswith("one ")


def test_flags_of_other_versions_are_passed_over(capsys):
    assert main(["photos", "-m", "1"]) == 0
    path = Path("captions.settings.json")
    settings = json.loads(path.read_text())
    del settings["asked"]["min_p"]
    settings["asked"]["gone"] = 1
    path.write_text(json.dumps(settings))
    assert main(["photos", "-m", "1", "--resume"]) == 0
    assert "0 written, 4 done before" in capsys.readouterr().err


def test_half_a_line_of_each_file_is_mended_before_there_is_another(photos, expected, capsys):
    first, *_ = sorted(expected)
    (photos / "broken.png").write_bytes(b"broken")
    assert main(["photos", "--out", "new/a.jsonl"]) == 2
    (photos / "other.png").write_bytes(b"broken")
    for name in ("new/a.jsonl", "new/a.errors.jsonl"):
        Path(name).write_bytes(Path(name).read_bytes()[:-9])
    (photos / first).with_suffix(".xmp").write_bytes(b"<!DOCTYPE x><x/>")
    assert main(["photos", "--out", "new/a.jsonl", "--resume", "--xmp"]) == 2
    assert [Path(line["image"]).name for line in lines("new/a.jsonl")] == [*expected]
    failed = [Path(line["image"]).name for line in lines("new/a.errors.jsonl")]
    assert sorted(failed) == [first, "broken.png", "other.png"]


def test_somebody_elses_settings_are_not_replaced(capsys):
    Path("captions.settings.json").write_text('{"mine": 1}')
    assert main(["photos"]) == 2
    assert "captions.settings.json exists already" in capsys.readouterr().err
    assert Path("captions.settings.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    "arguments",
    [["photos", "--resume"], ["photos", "--watch"], ["--undo", "captions.renamed.jsonl"]],
)
def test_two_commands_do_not_write_one_file(arguments, capsys):
    Path("captions.renamed.jsonl").touch()
    with only_writer(Path("captions.renamed.jsonl")):
        before = hashes(Path())
        assert main(arguments) == 2
        assert "is being written by another command" in capsys.readouterr().err
        assert hashes(Path()) == before


def test_what_is_replaced_is_there_until_there_is_something_else(expected, capsys):
    Path("captions.csv").write_text("theirs")
    assert (
        main(["photos", "--out", "captions.csv", "--overwrite", "--model", "nowhere/at-all"]) == 2
    )
    assert Path("captions.csv").read_text() == "theirs"
    assert main(["photos", "--out", "captions.csv"]) == 2
    assert main(["photos", "--out", "captions.csv", "--overwrite"]) == 0
    with Path("captions.csv").open(encoding="utf-8-sig", newline="") as file:
        assert [row[1] for row in csv.reader(file)] == ["text", *expected.values()]


@pytest.mark.parametrize("out", ["captions.csv", "captions.jsonl"])
def test_captions_are_not_replaced_by_failures(out, photos, expected, capsys):
    Path(out).write_text("theirs")
    (photos / "broken.png").write_bytes(b"broken")
    assert main(["photos/broken.png", "--out", out, "--overwrite"]) == 2
    assert Path(out).read_text() == "theirs"
    assert main(["photos", "--out", out, "--overwrite"]) == 2
    assert "4 written, 1 failed" in capsys.readouterr().err
    (line,) = lines("captions.errors.jsonl")
    assert line["image"] == "photos/broken.png"


@pytest.mark.parametrize("option", ["--image-tokens", "--frames"])
def test_what_would_fail_for_every_picture_is_one_mistake(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["photos", option, "0"])
    assert f"argument {option}: '0' is no whole number of at least 1" in capsys.readouterr().err


def test_what_has_failed_is_tried_again(photos, expected, capsys):
    first, *_ = sorted(expected)
    good = (photos / first).read_bytes()
    (photos / first).write_bytes(good[:99])
    (photos / "broken.png").write_bytes(b"broken")
    (photos / "000001.xmp").write_bytes(b"<x")
    assert main(["photos", "--xmp"]) == 2
    assert "2 written, 3 failed" in capsys.readouterr().err
    assert len(lines("captions.errors.jsonl")) == 3
    (photos / first).write_bytes(good)
    (photos / "000001.xmp").unlink()
    assert main(["photos", "--xmp", "--resume"]) == 2
    assert "1 written, 3 done before, 1 failed" in capsys.readouterr().err
    assert [line["image"] for line in lines("captions.errors.jsonl")] == ["photos/broken.png"]
    (photos / "broken.png").unlink()
    names = sorted(Path(line["image"]).name for line in lines())
    assert names == [*expected]
    assert {path.stem for path in photos.glob("*.xmp")} == {Path(name).stem for name in expected}


def test_a_picture_is_known_however_its_path_is_spelled(photos, expected, capsys):
    assert main(["photos"]) == 0
    for spelled in (str(photos.absolute()), "photos/../photos", "./photos/*.png"):
        assert main([spelled, "--resume"]) == 0
        assert "0 written, 4 done before" in capsys.readouterr().err


def test_pictures_that_were_renamed_twice_are_known(photos, expected, capsys):
    arguments = ["photos", "--prefix", "Two ", "--rename"]
    assert main(["photos", "--prefix", "One ", "--rename"]) == 0
    assert main([*arguments, "--overwrite"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 0
    said = capsys.readouterr().err
    assert "0 written, 4 done before" in said
    assert "Nothing to rename" in said
    Path("elsewhere").mkdir()
    for name in ("photos", *map(str, Path().glob("captions.*"))):
        Path(name).rename(Path("elsewhere") / name)
    os.chdir("elsewhere")
    assert main([*arguments, "--resume"]) == 0
    assert "0 written, 4 done before" in capsys.readouterr().err
    assert main(["--undo", "captions.renamed.jsonl"]) == 0
    assert {path.name for path in Path("photos").iterdir()} == {*expected}


def test_texts_of_pictures_of_one_name(photos, expected, capsys):
    first, second, *_ = sorted(expected)
    (photos / second).rename(photos / Path(first).with_suffix(".jpg"))
    before = hashes(photos)
    assert main(["photos", "--out", "txt", "--prefix", "zwx, ", "--suffix", " end"]) == 0
    texts = {path.name: path.read_text() for path in photos.glob("*.txt")}
    assert texts[Path(first).stem + ".txt"] == f"zwx, {expected[second]} end\n"  # .jpg comes first
    assert texts[first + ".txt"] == f"zwx, {expected[first]} end\n"
    assert len(texts) == COUNT
    assert (
        main(["photos", "--out", "txt", "--resume", "--prefix", "zwx, ", "--suffix", " end"]) == 0
    )
    assert "0 written, 4 done before, 0 failed" in capsys.readouterr().err
    assert main(["photos", "--out", "txt", "--overwrite", "-m", "1"]) == 0
    assert len({*photos.glob("*.txt")}) == COUNT
    assert {path: before[path] for path in before} == {p: hashes(photos)[p] for p in before}
    (photos / first).with_suffix(".txt").write_text("By hand.")
    assert main(["photos", "--out", "txt"]) == 2
    assert "There are 4 of 4 text files already" in capsys.readouterr().err
    assert main(["photos", "--out", "txt", "--skip-existing"]) == 0
    assert (photos / first).with_suffix(".txt").read_text() == "By hand."


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_several_prompts_are_columns(ending, photos, expected):
    prompts = ["-p", PROMPT, "-p", "count=How many shapes are there?"]
    assert main(["photos", "--out", f"a.{ending}", *prompts]) == 0
    model, processor = load()
    counts = [generate(model, processor, prompts[3][6:], str(photos / name)) for name in expected]
    rows = [[f"photos/{name}", text] for name, text in expected.items()]
    rows = [[*row, count] for row, count in zip(rows, counts, strict=True)]
    if ending == "csv":
        with Path("a.csv").open(encoding="utf-8-sig", newline="") as file:
            assert [*csv.reader(file)] == [["image", "text", "count"], *rows]
    else:
        assert [[*line.values()] for line in lines("a.jsonl")] == rows
        assert [*lines("a.jsonl")[0]] == ["image", "text", "count"]


def test_fields_of_a_schema_are_columns(expected, capsys):
    asked = ["photos", "--json-schema", json.dumps(SCHEMA)]
    assert main(asked) == 0
    (line, *_) = lines()
    assert [*line] == ["image", "tags", "sure"]
    assert {*line["tags"]} <= {"red", "blue"}
    assert main([*asked, "--out", "a.csv"]) == 0
    with Path("a.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = [*csv.reader(file)]
    assert rows[0] == ["image", "tags", "sure"]
    assert rows[1][1:] == [", ".join(line["tags"]), json.dumps(line["sure"])]
    assert main([*asked, "--out", "b.csv", "-m", "3"]) == 2
    assert "4 of 4 pictures failed" in capsys.readouterr().err
    assert "raise --max-tokens" in lines("b.errors.jsonl")[0]["error"]


def test_renaming_is_shown_done_gone_on_with_and_undone(photos, expected, capsys):
    first, *_ = sorted(expected)
    (photos / first).with_suffix(".cr2").write_bytes(b"raw")
    (photos / f"{first}.xmp").write_bytes(with_description(None, ""))
    before = hashes(photos)
    assert main(["photos", "--rename", "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == COUNT + 2
    assert hashes(photos) == before
    assert main(["photos", "--rename", "--resume"]) == 0
    assert "6 files renamed; --undo captions.renamed.jsonl takes" in capsys.readouterr().err
    names = {line.partition(" -> ")[2] for line in shown}
    assert {path.name for path in photos.iterdir()} == names
    assert {Path(name).stem.partition(".")[0] for name in names} >= {expected[first].rstrip(".")}
    assert sorted(hashes(photos).values()) == sorted(before.values())
    # Nothing is captioned or named again, and a new picture of an old name is new.
    assert main(["photos", "--rename", "--resume"]) == 0
    said = capsys.readouterr().err
    assert "0 written, 4 done before, 0 failed" in said
    assert "Nothing to rename." in said
    (picture,) = [path for path in photos.glob("*.png") if path.stem == expected[first].rstrip(".")]
    shutil.copy(picture, photos / first)
    for count in (1, 0):
        assert main(["photos", "--resume"]) == 0
        assert f"{count} written, {5 - count} done before" in capsys.readouterr().err
    (photos / first).unlink()
    assert main(["--undo", "captions.renamed.jsonl"]) == 0
    assert "6 files have their old names again" in capsys.readouterr().err
    assert hashes(photos) == before
    assert not Path("captions.renamed.jsonl").exists()


def test_a_renaming_that_was_cut_off_is_finished_before_anything(photos, expected, capsys):
    first, second, *others = sorted(expected)
    (photos / second).rename(photos / Path(first).with_suffix(".jpg"))
    for name in others:
        (photos / name).unlink()
    assert main(["photos", "--rename"]) == 0
    after = hashes(photos)
    move, _ = Path("captions.renamed.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(move)["files"] == [".jpg", ".png"]
    (photos / f"{json.loads(move)['to']}.png").rename(photos / first)
    Path("captions.renamed.jsonl").write_text(move)  # as if this one were still to come
    capsys.readouterr()
    assert main(["photos", "--resume"]) == 0
    assert "0 written, 2 done before, 0 failed" in capsys.readouterr().err
    assert hashes(photos) == after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name folders, files or patterns"),
        (["photos", "--dry-run"], "--dry-run shows what --rename would do"),
        (["photos", "--watch", "--rename"], "--watch goes with neither"),
        (["photos/*.png", "--watch"], "--watch looks into folders, and photos/*.png is none"),
        (["photos", "--skip-existing", "--overwrite"], "choose one of them"),
        (["--undo", "nowhere"], "There is no undo file nowhere"),
        (["photos", "-p", "a=x", "-p", "a=y"], "Two prompts are named a"),
        (["photos", "--out", "txt", "--overwrite", "--resume"], "cannot tell what is done"),
    ],
)
def test_flags_that_make_no_sense(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["photos"]


def test_control_c_ends_with_a_summary(expected, monkeypatch, capsys):
    kept = []

    def interrupted(self, image: str, values: dict) -> None:
        kept.append(image)
        keep(self, image, values)
        if len(kept) == 2:
            raise KeyboardInterrupt

    keep = Run.keep
    monkeypatch.setattr(Run, "keep", interrupted)
    assert main(["photos"]) == 130
    assert "2 written, 0 failed, 2 left, 0 skipped; --resume goes on" in capsys.readouterr().err
    assert [line["text"] for line in lines()] == [*expected.values()][:2]


def test_control_c_waits_for_the_sidecar_of_a_caption(photos, monkeypatch, capsys):
    write = Lines.write

    def pressed(self, image: str, values: dict) -> None:
        write(self, image, values)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Lines, "write", pressed)
    assert main(["photos", "--xmp"]) == 130
    assert "1 written, 0 failed, 3 left, 0 skipped; --resume goes on" in capsys.readouterr().err
    (line,), (sidecar,) = lines(), photos.glob("*.xmp")
    assert read_description(sidecar.read_bytes()) == line["text"]


def test_watching_in_one_process(photos, expected, monkeypatch, capsys):
    """An empty folder at first; then whole pictures and half of one, and Control-C."""
    photos.rename("later")
    photos.mkdir()
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            for name in expected:
                shutil.copy(Path("later") / name, photos)
            (photos / "half.png").write_bytes(
                (Path("later") / next(iter(expected))).read_bytes()[:99]
            )
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert main(["photos", "--watch"]) == 0
    assert "4 written, 0 failed, 1 left, 0 skipped" in capsys.readouterr().err
    assert [line["text"] for line in lines()] == [*expected.values()]
    assert min(looks) >= watch.PAUSE


@pytest.mark.parametrize(
    ("count", "kills"), [(6, 1), pytest.param(200, 10, marks=pytest.mark.slow)]
)
def test_kills_of_a_watch_lose_nothing_and_double_nothing(count, kills, photos, drawings):
    sources, out = sorted(drawings.iterdir()), Path("captions.jsonl")
    chance, deaths = random.Random(0), [count * n // (kills + 1) for n in range(1, kills + 1)]
    command = [sys.executable, "-m", "mlx_llava.caption", "photos", "--watch", "--xmp", "-m", "9"]
    shutil.rmtree(photos)
    photos.mkdir()

    def start() -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)

    def wait_for(number: int) -> None:
        deadline = time.monotonic() + 300
        while not out.exists() or len(out.read_bytes().splitlines()) < number:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    process = start()
    try:
        for number in range(count):
            if number in deaths:
                wait_for(chance.randint(number // 2, number - 1))
                time.sleep(chance.random() / 20)
                process.kill()
                process.communicate()
                process = start()
            data = sources[number % COUNT].read_bytes()
            with (photos / f"{number:03}.png").open("wb") as file:  # slowly
                file.write(data[:200])
                file.flush()
                time.sleep(0.02)
                file.write(data[200:])
        wait_for(count)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert b" 0 failed, 0 skipped" in said
    names = [line["image"] for line in lines()]
    assert sorted(names) == [f"photos/{number:03}.png" for number in range(count)]
    texts = {Path(line["image"]).stem: line["text"] for line in lines()}
    found = {p.stem: read_description(p.read_bytes()) for p in photos.glob("*.xmp")}
    assert found == texts
    assert not list(Path().rglob("*.partial"))
