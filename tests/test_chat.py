"""A conversation remembers what was shown where, and reads nothing twice."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_llava import generate, load
from mlx_llava.chat import Chat, main, pasted_files
from mlx_llava.session import Picture, Session
from tests.conftest import ROOT

EXAMPLES = ROOT / "weights" / "tiny-llava" / "examples"
SHAPES, PAIR = str(EXAMPLES / "shapes.png"), str(EXAMPLES / "pair.png")


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.fixture
def session(embedded):
    return Session(*embedded, max_tokens=40)


@pytest.fixture
def encoded(embedded, monkeypatch) -> list[int]:
    """How many tiles the vision tower was given, call by call."""
    calls: list[int] = []
    encode = type(embedded[0]).encode_images

    def counted(self, pixel_values, image_sizes=None):
        calls.append(len(pixel_values))
        return encode(self, pixel_values, image_sizes)

    monkeypatch.setattr(type(embedded[0]), "encode_images", counted)
    return calls


def say(session: Session, text: str, *pictures: str) -> str:
    session.ask(text, [Picture.read(picture) for picture in pictures])
    *_, last = session.answer()
    session.last = last
    return session.turns[-1].answer


def test_a_picture_is_encoded_once_and_only_what_is_new_is_read(session, encoded):
    assert say(session, "What is in this picture?", SHAPES).startswith("A small black star")
    first = session.last
    assert say(session, "What colour is the star?") == "black"
    assert say(session, "Where is the triangle?") == "right"
    assert encoded == [1]
    assert first.cached_tokens == 0
    assert session.last.prompt_tokens - session.last.cached_tokens < 20


def test_answers_are_those_of_a_fresh_conversation(session, embedded):
    for text, *pictures in (
        ("What is in this picture?", SHAPES),
        ("What colour is the star?",),
        ("And what is in this picture?", PAIR),
        ("How many objects are there?",),
    ):
        given = say(session, text, *pictures)
        assert given == generate(*embedded, session.messages(), max_tokens=40)


def test_another_picture_is_not_answered_from_the_old_one(session, embedded, encoded):
    session.shown = "last"
    assert say(session, "What colour is the triangle?", SHAPES) == "red"
    assert say(session, "What colour is the triangle?", PAIR) == "blue"
    assert encoded == [1, 1]
    marks = [len(message["content"]) - 1 for message in session.messages()[::2]]
    assert marks == [0, 1]
    session.shown = "all"
    assert [len(message["content"]) - 1 for message in session.messages()[::2]] == [1, 1]


def test_whole_turns_are_dropped_when_the_context_is_full(embedded, monkeypatch):
    model, processor = embedded
    monkeypatch.setattr(processor, "context_length", 160)  # 120 of them for the prompt
    session = Session(model, processor)
    say(session, "What is in this picture?", SHAPES)
    say(session, "What colour is the star?")
    dropped = session.ask("What is in this picture?", [Picture.read(PAIR)])
    assert [turn.text for turn in dropped] == ["What is in this picture?"]
    assert len(dropped[0].pictures) == 1
    assert [len(turn.pictures) for turn in session.turns] == [0, 1]
    before = list(session.turns)
    with pytest.raises(ValueError, match="there is room for 120"):
        session.ask("and " * 200)
    assert session.turns == before


def test_a_conversation_is_saved_and_goes_on(session, embedded, tmp_path, encoded):
    copied = Picture.of(Image.open(PAIR).convert("RGB"))
    say(session, "What is in this picture?", SHAPES)
    session.ask("And here?", [copied])
    list(session.answer())
    session.system, session.shown = "Be kind.", "last"
    session.save(tmp_path / "chat.json")
    other = Session(*embedded)
    other.load(tmp_path / "chat.json")
    assert (other.system, other.shown) == ("Be kind.", "last")
    assert [(t.text, t.answer) for t in other.turns] == [(t.text, t.answer) for t in session.turns]
    for mine, yours in zip(other.turns, session.turns, strict=True):
        for a, b in zip(mine.pictures, yours.pictures, strict=True):
            assert (np.asarray(a.image) == np.asarray(b.image)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        "{}",
        '{"system": 1, "shown": "all", "turns": []}',
        '{"system": null, "shown": "all", "turns": [{"text": 1, "images": [], "answer": ""}]}',
        '{"system": null, "shown": "all", "turns": [{"text": "", "images": ["no"], "answer": ""}]}',
    ],
)
def test_what_is_no_conversation_changes_nothing(session, tmp_path, content):
    say(session, "What is it?", SHAPES)
    before = list(session.turns)
    (tmp_path / "chat.json").write_text(content)
    with pytest.raises((ValueError, OSError)):
        session.load(tmp_path / "chat.json")
    assert session.turns == before


def chat(monkeypatch, *lines: str, arguments: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main([*arguments])


def test_the_command(monkeypatch, capsys, tmp_path):
    saved = tmp_path / "chat.json"
    code = chat(
        monkeypatch,
        "What colour is the star?",
        f"/image {shlex.quote(PAIR)}",
        "/images last",
        "What colour is the triangle?",
        "/regenerate",
        "/undo",
        "Where is the star?",
        f"/save {saved}",
        "/reset",
        f"/load {saved}",
        "/template vicuna_v1",
        "/system",
        "/help",
        "",
        arguments=("--image", SHAPES),
    )
    out, err = capsys.readouterr()
    assert code == 0
    assert out.splitlines() == ["black", "blue", "blue", "bottom right"]
    assert "taken back: What colour is the triangle?" in err
    assert "> What colour is the star?" in err
    for name in ("/image FILE ...", "/images all|last", "/regenerate", "/undo", "/save FILE"):
        assert name in err
    turns = json.loads(saved.read_text())["turns"]
    assert [turn["images"] for turn in turns] == [[SHAPES], [PAIR]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "There is no command /nothing"),
        ("/image", "needs a file"),
        ("/image none.png", "There is no image none.png"),
        ("/images", "known: all, last"),
        ("/undo", "Nothing has been said yet"),
        ("/regenerate", "Nothing has been asked yet"),
        ("/template none", "There is no template 'none'"),
        ("/save", "/save needs a file"),
        ("/load none.json", "There is no file none.json"),
    ],
)
def test_mistakes_are_one_line_and_the_chat_goes_on(monkeypatch, capsys, line, message):
    assert (
        chat(monkeypatch, line, "How many objects are there?", arguments=("--image", SHAPES)) == 0
    )
    out, err = capsys.readouterr()
    assert out == "three\n"
    errors = [text for text in err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_control_c_stops_the_answer_and_not_the_chat(session, monkeypatch, capsys):
    answer = session.answer

    def interrupted():
        for number, part in enumerate(answer()):
            yield part
            if number == 2:
                raise KeyboardInterrupt

    talk = Chat(session, [Picture.read(SHAPES)])
    monkeypatch.setattr(session, "answer", interrupted)
    talk.take("What is in this picture?")
    monkeypatch.setattr(session, "answer", answer)
    assert session.turns[0].answer == "A small black"
    talk.take("What colour is the star?")
    assert capsys.readouterr().out == "A small black\nblack\n"


def test_nothing_said_is_taken_back(session, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt
        yield

    talk = Chat(session, [Picture.read(SHAPES)])
    monkeypatch.setattr(session, "answer", interrupted)
    talk.take("What is in this picture?")
    assert not session.turns
    assert len(talk.pending) == 1


def test_files_are_taken_as_terminals_paste_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spaced = tmp_path / "a picture.png"
    for path in (spaced, tmp_path / "b.png", tmp_path / "word"):
        path.touch()
    assert pasted_files(shlex.quote(str(spaced))) == [str(spaced)]
    assert pasted_files(str(spaced).replace(" ", "\\ ")) == [str(spaced)]
    assert pasted_files(f"{spaced} ") == [str(spaced)]
    assert pasted_files(spaced.as_uri()) == [str(spaced)]
    assert pasted_files("b.png") == ["b.png"]
    assert pasted_files(f"b.png {shlex.quote(str(spaced))}") == ["b.png", str(spaced)]
    for text in ("word", "What is in b.png?", "", "/help", "it's", "/" * 5000, "\x00"):
        assert pasted_files(text) == []


def test_the_clipboard_is_a_picture(session, monkeypatch, capsys):
    found = Image.open(SHAPES)
    monkeypatch.setattr("PIL.ImageGrab.grabclipboard", lambda: found)
    talk = Chat(session)
    talk.take("clipboard")
    talk.take("What colour is the star?")
    monkeypatch.setattr("PIL.ImageGrab.grabclipboard", lambda: [PAIR])
    talk.take("/image clipboard")
    talk.take("/images last")
    talk.take("What colour is the triangle?")
    assert capsys.readouterr().out == "black\nblue\n"
    assert session.turns[0].pictures[0].source.startswith("data:image/png;base64,")
    monkeypatch.setattr("PIL.ImageGrab.grabclipboard", lambda: None)
    with pytest.raises(ValueError, match="no picture in the clipboard"):
        talk.take("clipboard")
    assert Path(SHAPES).exists()
