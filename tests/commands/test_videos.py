"""Films in conversations and folders are read as in `generate`."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from PIL import Image

pytest.importorskip("av", reason="videos: pip install '.[video]'")

from mlx_llava import caption, evaluate, generate, load
from mlx_llava.chat import Chat, main
from mlx_llava.generation.session import Session
from mlx_llava.inputs.mentions import missing_paths, split_line
from tests.conftest import ROOT
from tests.films import drawn, film

SHAPES = str(ROOT / "weights" / "tiny-llava" / "examples" / "shapes.png")
QUESTION = "What colour is the square?"


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a film.mp4").write_bytes(film(frames=9))
    for i in range(3):
        (tmp_path / "frames").mkdir(exist_ok=True)
        Image.fromarray(drawn(i)).save(tmp_path / "frames" / f"{i}.png")
    return tmp_path


@pytest.fixture
def chat(embedded):
    return Chat(Session(*embedded, max_tokens=8), frames=2)


def test_a_film_is_shown_by_its_command_and_by_its_path(chat, embedded, folder, capsys):
    path = str(folder / "a film.mp4")
    expected = generate(*embedded, QUESTION, video=path, frames=2, max_tokens=8)
    for lines in ([f"/video {path}", QUESTION], [f"{path} {QUESTION}"], [f"'{path}'", QUESTION]):
        chat.reset("")
        for line in lines:
            chat.take(line)
        out, err = capsys.readouterr()
        assert out.strip() == expected.strip()
        assert "video 64 x 48, 2 frames; ask about it" in err
    chat.take("And its size?")
    assert chat.session.turns[0].pictures[0].kind == "video"


def test_folders_of_frames_and_pictures_beside_them(chat, embedded, folder):
    chat.take(f"/video {folder / 'frames'}")
    chat.take(f"/image {SHAPES}")
    chat.take(QUESTION)
    (turn,) = chat.session.turns
    assert [picture.kind for picture in turn.pictures] == ["video", "image"]
    shown = [{"type": "video", "video": str(folder / "frames")}, {"type": "image", "image": SHAPES}]
    conversation = [{"role": "user", "content": [*shown, {"type": "text", "text": QUESTION}]}]
    expected = generate(*embedded, conversation, frames=2, max_tokens=8)
    assert turn.answer == expected.strip()
    with pytest.raises(ValueError, match="/video needs"):
        chat.take("/video")


def test_a_conversation_about_a_film_is_saved_and_read_again(chat, embedded, folder, tmp_path):
    chat.take(f"/video {folder / 'a film.mp4'}")
    chat.take(QUESTION)
    file = tmp_path / "chat.json"
    chat.take(f"/save {file}")
    (turn,) = json.loads(file.read_text())["turns"]
    assert turn["images"] == [{"video": str(folder / "a film.mp4"), "frames": 2}]
    other = Chat(Session(*embedded, max_tokens=8))
    other.take(f"/load {file}")
    assert other.session.messages() == chat.session.messages()


def test_the_command_begins_with_a_film(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    assert main(["--video", str(folder / "a film.mp4"), "--frames", "2", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()


def test_films_within_a_sentence(folder):
    path = str(folder / "a film.mp4")
    assert split_line(f"What moves in {path}, and how?") == (
        [path],
        "What moves in this video, and how?",
    )
    paths, question = split_line(f"Is {SHAPES} in {path} somewhere?")
    assert (paths, question) == ([SHAPES, path], "Is picture 1 in video 2 somewhere?")
    assert missing_paths("See ./gone.mp4") == ["./gone.mp4"]


def test_questions_about_films_are_answered(folder, embedded, capsys):
    questions = folder / "questions.jsonl"
    names = "a film.mp4", "frames"
    lines = [
        {"question_id": i, "video": name, "text": QUESTION} for i, name in enumerate((*names, "x"))
    ]
    questions.write_text("\n".join(map(json.dumps, lines[:2])))
    answers = folder / "answers.jsonl"
    asked = ["--questions", str(questions), "--answers", str(answers), "--frames", "2"]
    asked += ["--image-folder", str(folder), "--max-tokens", "4"]
    assert evaluate.main(asked) == 0
    for name, line in zip(names, answers.read_text().splitlines(), strict=True):
        video = str(folder / name)
        expected = generate(*embedded, QUESTION, video=video, frames=2, max_tokens=4)
        assert json.loads(line)["text"] == expected.strip()
    questions.write_text("\n".join(map(json.dumps, lines)))
    assert evaluate.main(asked) == 2
    assert "videos of 1 of 1 questions are not in --image-folder" in capsys.readouterr().err


def test_films_of_a_folder_are_captioned_where_they_are_wanted(folder, embedded, capsys):
    shutil.copy(SHAPES, folder)
    out = folder / "captions.jsonl"
    asked = [str(folder), "--out", str(out), "--frames", "2", "--max-tokens", "4"]
    assert caption.main([*asked, "--videos", "--prompt", QUESTION]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    film_line, picture_line = lines
    assert film_line["image"] == str(folder / "a film.mp4")
    expected = generate(*embedded, QUESTION, video=film_line["image"], frames=2, max_tokens=4)
    assert film_line["text"] == expected.strip()
    assert picture_line["image"] == str(folder / "shapes.png")
    out.unlink()
    assert caption.main([*asked, "--prompt", QUESTION]) == 0
    assert "1 .mp4" in capsys.readouterr().err
    named = [film_line["image"], "--out", str(folder / "one.csv"), *asked[3:]]
    assert caption.main([*named, "--prompt", QUESTION]) == 0
    assert expected.strip() in (folder / "one.csv").read_text()
