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
from mlx_llava.chat import Chat, main, run
from mlx_llava.generation.session import Picture, Session
from mlx_llava.inputs.mentions import image_names, missing_paths, pasted_files, split_line
from tests.conftest import ROOT, shared_data

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


def test_only_a_conversation_is_written_over(session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    say(session, "What is it?", SHAPES)
    for name in ("my chat.json", "'my chat.json'", "my\\ chat.json"):
        Chat(session).take(f"/save {name}")
    assert [path.name for path in tmp_path.iterdir()] == ["my chat.json"]
    chat_of_another_day = (tmp_path / "my chat.json").read_text()
    for content in ("my notes", "{}", '{"turns": []}', chat_of_another_day):
        (tmp_path / "notes.txt").write_text(content)
        with pytest.raises(FileExistsError, match="stays as it is"):
            session.save(tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == content
    session.reset()
    with pytest.raises(FileExistsError, match="another conversation; it stays"):
        session.save("my chat.json")
    session.load("my chat.json")
    session.save("my chat.json")


@pytest.mark.parametrize("word", ["exit", "Quit", "/bye"])
def test_whoever_wants_to_leave_leaves(monkeypatch, capsys, word):
    assert (
        chat(monkeypatch, word, "How many objects are there?", arguments=("--image", SHAPES)) == 0
    )
    assert capsys.readouterr().out == ""


def test_a_question_may_have_several_lines(monkeypatch, session):
    asked = []
    monkeypatch.setattr(Chat, "ask", lambda self, text: asked.append(text))
    lines = ['"""one line"""', '"""', "How many", "objects?", '"""', '"""Where', 'is it?"""', "So"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    run(Chat(session))
    assert asked == ["one line", "How many\nobjects?", "Where\nis it?", "So"]


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
        ("/image loop.png", "loop.png"),
        ("/images", "known: all, last"),
        ("/undo", "Nothing has been said yet"),
        ("/regenerate", "Nothing has been asked yet"),
        ("/template none", "There is no template 'none'"),
        ("/save", "/save needs a file"),
        ("/load none.json", "There is no file none.json"),
    ],
)
def test_mistakes_are_one_line_and_the_chat_goes_on(tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    Path("loop.png").symlink_to("loop.png")
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

    def interrupted(*told):
        for number, part in enumerate(answer(*told)):
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
    def interrupted(*_):
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
    assert pasted_files("./word") == ["./word"]
    assert pasted_files(f"b.png {shlex.quote(str(spaced))}") == ["b.png", str(spaced)]
    for text in ("word", "What is in b.png?", "", "/help", "it's", "/" * 5000, "\x00"):
        assert pasted_files(text) == []


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """A folder with files of all names that people give pictures, and the home folder."""
    for name in (
        *("plain.png", "b.PNG", "My Photos/red star.png", "Mike's star.png", "a b.jpg", "x,y.png"),
        *("word", "notes.txt", "At 1.00\u202fPM.png", "100%.png", "\u65e5\u672c.png", "scan"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


STAR = "My Photos/red star.png"


@pytest.mark.parametrize(
    ("line", "paths", "question"),
    [
        ("What is in ./plain.png?", ["./plain.png"], "What is in this picture?"),
        ("What is in plain.png", ["plain.png"], "What is in this picture"),
        ("What is in this image? ./plain.png", ["./plain.png"], "What is in this image?"),
        ("./plain.png what colour is it?", ["./plain.png"], "what colour is it?"),
        ("plain.png: what colour is it?\r", ["plain.png"], "what colour is it?"),
        (
            "Compare plain.png and b.PNG.",
            ["plain.png", "b.PNG"],
            "Compare picture 1 and picture 2.",
        ),
        ("b.PNG plain.png which is better?", ["b.PNG", "plain.png"], "which is better?"),
        ("Is plain.png as plain.png is?", ["plain.png"], "Is this picture as this picture is?"),
        ("plain.png, b.PNG", ["plain.png", "b.PNG"], ""),
        ("What is in My Photos/red star.png?", [STAR], "What is in this picture?"),
        ("What is in My\\ Photos/red\\ star.png?", [STAR], "What is in this picture?"),
        ('Look at "My Photos/red star.png" please', [STAR], "Look at this picture please"),
        ("Look at \u201cMy Photos/red star.png\u201d!", [STAR], "Look at this picture!"),
        ("Is Mike's star.png red?", ["Mike's star.png"], "Is this picture red?"),
        ("Is 'Mike's star.png' red?", ["Mike's star.png"], "Is this picture red?"),
        ("Is 'Mike'\\''s star.png' red?", ["Mike's star.png"], "Is this picture red?"),
        ("Is plain.png's star red?", ["plain.png"], "Is this picture's star red?"),
        ("a b.jpg and x,y.png", ["a b.jpg", "x,y.png"], "picture 1 and picture 2"),
        ("At 1.00\u202fPM.png", ["At 1.00\u202fPM.png"], ""),
        ("(100%.png)", ["100%.png"], ""),
        ("\u770b\uff1a\u65e5\u672c.png\u3002", ["\u65e5\u672c.png"], "\u770b\uff1a"),
    ],
)
def test_pictures_are_found_in_a_question(line, paths, question, pictures):
    assert split_line(line) == (paths, question)


def test_home_and_urls_of_files_are_paths(pictures):
    star, mike = str(pictures / STAR), str(pictures / "Mike's star.png")
    uri = (pictures / STAR).as_uri()
    assert split_line(f"{uri} what is it?") == ([star], "what is it?")
    assert split_line(f"Is file://localhost{pictures}/Mike's%20star.png red?") == (
        [mike],
        "Is this picture red?",
    )
    assert split_line("~/plain.png?") == ([str(pictures / "plain.png")], "")
    assert pasted_files(f"{shlex.quote(mike)} {uri} ") == [mike, star]


@pytest.mark.parametrize(
    "line",
    [
        *(
            "word",
            "see notes.txt",
            "plain.pngs",
            "plain.png.bak",
            "it.plain.png",
            "gone.png",
            "./scan",
        ),
        *("~nobody/plain.png", "", "???", "a" * 33000 + " plain.png", "plain\x00.png", "'", '"a'),
    ],
)
def test_what_is_no_picture_stays_text(line, pictures):
    assert split_line(line) == ([], line)


def test_a_path_that_leads_nowhere_is_noted(pictures):
    line = "gone.png or './gone.png', ~/none.jpg? Not ./x nor ../notes.txt, http://x/y.png, .png"
    assert missing_paths(line) == ["gone.png", "./gone.png", "~/none.jpg"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (STAR, [STAR]),
        ("Mike's star.png", ["Mike's star.png"]),
        (
            "plain.png My Photos/red star.png Mike's star.png",
            ["plain.png", STAR, "Mike's star.png"],
        ),
        ("'a b.jpg' scan a\\ b.jpg", ["a b.jpg", "scan", "a b.jpg"]),
        ("My Photos/none.png", ["My Photos/none.png"]),
        ("plain.png 'none.png' b.PNG", ["plain.png", "none.png", "b.PNG"]),
        ("http://x/y.png clipboard plain.png", ["http://x/y.png", "clipboard", "plain.png"]),
        ("file:///no%20where/plain.png", ["/no where/plain.png"]),
        ("", []),
    ],
)
def test_image_takes_names_as_people_write_them(arguments, names, pictures):
    assert image_names(arguments) == names


@pytest.mark.parametrize(
    "line", ["gone.png", "What is in ./gone.png?", f"{SHAPES} and ~/gone.png?"]
)
def test_a_question_about_a_file_that_is_not_there_is_not_asked(line, monkeypatch, capsys):
    chat(monkeypatch, f"What colour is the star in {SHAPES}?", line)
    said = capsys.readouterr()
    assert "gone.png; nothing was asked." in said.err
    assert len(said.out.split()) == 1


def test_a_picture_in_a_question_is_shown_with_it(monkeypatch, capsys):
    code = chat(
        monkeypatch,
        f"What colour is the star in {SHAPES}?",
        f"{SHAPES} What colour is the star?",
        f"/image {SHAPES} {PAIR}",
        "/undo",
        "/nowhere.png what is it?",
        "/gone/nowhere.png what is it?",
        f"/imge {SHAPES}",
        "/bye",
        "Never asked",
    )
    out, err = capsys.readouterr()
    assert code == 0
    assert out.splitlines()[1] == "black"
    assert len(out.splitlines()) == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [line.partition("; ")[0] for line in errors] == [
        "error: There is no command /nowhere.png",
        "error: There is no picture /gone/nowhere.png",
        "error: There is no command /imge",
    ]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_text_spoils_only_itself(errors, monkeypatch, capsys):
    lines = [b"\xef\xbb\xbf/image %s" % SHAPES.encode(), b"what \xff byte"]
    lines += [b"How many objects are there?", b"/exit", b"More"]
    content = io.BytesIO(b"\r\n".join(lines))
    stdin = io.TextIOWrapper(content, encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", stdin)
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out == "three\n"
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: The line is not UTF-8: byte 0xff."
    ]


def test_a_broken_picture_in_a_question_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_bytes(Path(PAIR).read_bytes()[:200])
    Path("notes.txt").write_text("no picture")
    lines = ["What is in ./broken.png?", "notes.txt", f"/image\t{SHAPES}"]
    assert chat(monkeypatch, *lines, "How many objects are there?") == 0
    out, err = capsys.readouterr()
    assert out == "three\n"
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 2


def test_a_picture_that_cannot_be_asked_about_leaves_the_conversation(session, monkeypatch):
    def failing(*_):
        raise ValueError("no room")
        yield

    say(session, "What is in this picture?", SHAPES)
    talk = Chat(session)
    answer = session.answer
    monkeypatch.setattr(session, "answer", failing)
    with pytest.raises(ValueError, match="no room"):
        talk.take(f"{PAIR} What is it?")
    monkeypatch.setattr(session, "answer", answer)
    assert len(session.turns) == 1
    assert not talk.pending


def test_reported_lines_are_understood(monkeypatch, capsys):
    folder = shared_data("reports/chat_lines")
    monkeypatch.chdir(folder)
    assert chat(monkeypatch, *(folder / "lines.txt").read_text().splitlines()) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err.count("error: ") == 1
    assert "error: There is no image /path/to/plain.png." in err


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
