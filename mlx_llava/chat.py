"""Chat about pictures in a terminal.

    python -m mlx_llava.chat --model mlx-community/llava-1.5-7b-4bit --image photo.jpg

Only what the model says goes to stdout.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from PIL import Image

from mlx_llava.arguments import (
    MAX_REPEATS,
    Parser,
    add_answer_arguments,
    add_image_tokens_argument,
    add_model_arguments,
    add_share_arguments,
    add_video_arguments,
    answer_options,
    command,
    load_model,
    say_if_embedded,
    say_if_it_goes_round,
)
from mlx_llava.bars import reading_bar
from mlx_llava.files import one_line
from mlx_llava.generation.session import SHOWN, Picture, Session
from mlx_llava.inputs.image import from_clipboard
from mlx_llava.inputs.mentions import (
    file_name,
    image_names,
    missing_paths,
    pasted_files,
    split_line,
)
from mlx_llava.inputs.video import Video, is_film

CLIPBOARD = "clipboard"
#: What is meant as a command without looking like one.
_PLAIN = {CLIPBOARD: f"/image {CLIPBOARD}", "exit": "/exit", "quit": "/exit", "bye": "/exit"}
#: Between two of these a question may have several lines.
_QUOTES = '"""'
COMMANDS = (
    *("/image", "/images", "/video", "/system", "/template", "/regenerate", "/undo"),
    *("/save", "/load", "/reset", "/help", "/exit", "/quit", "/bye"),
)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.chat",
        description="Chat with a LLaVA model about pictures. /help lists what can be typed.",
    )
    add_model_arguments(parser)
    add_share_arguments(parser)
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="to begin with; repeatable")
    add_video_arguments(parser)
    add("--system", help="replaces the template's system text")
    add_image_tokens_argument(parser)
    add_answer_arguments(parser)
    parser.set_defaults(max_repeats=MAX_REPEATS)
    return parser


class Chat:
    """What can be typed, and what comes of it.

    A command is the method of that name; its docstring is what /help shows: arguments, a colon,
    what it does.
    """

    def __init__(
        self, session: Session, pictures: Sequence[Picture] = (), frames: int | None = None
    ) -> None:
        self.session, self.frames = session, frames
        self.pending = list(pictures)
        self.has_ended = False

    def take(self, line: str) -> None:
        """Does what a line says: a command, pictures to show, or a question, perhaps with some."""
        line = _checked(line).strip()
        line = _PLAIN.get(line.lower(), line)
        name = (line.split() or [""])[0]
        if name in COMMANDS:
            getattr(self, name[1:])(line.removeprefix(name).strip())
            return
        files = pasted_files(line)
        paths, question = (files, "") if files else split_line(line)
        if name.startswith("/") and (question == line or question.startswith(name)):
            kind = "picture" if "/" in name[1:] else "command"
            raise ValueError(f"There is no {kind} {name}; /help lists what can be typed.")
        for path in missing_paths(question):
            if path == question or "/" in path:
                raise ValueError(f"There is no file {path}; nothing was asked.")
            note(f"note: there is no file {path}")
        self.show([self.film(path) if is_film(path) else Picture.read(path) for path in paths])
        if question:
            self.ask(question)

    def ask(self, text: str) -> None:
        """Asks, and says what had to be dropped for it."""
        dropped = self.session.ask(text, self.pending)
        self.pending = []
        if dropped:
            images = sum(len(turn.pictures) for turn in dropped)
            note(f"the context is full: dropped the first {len(dropped)} turns, {images} pictures")
        self.answer()

    def answer(self) -> None:
        """Says the answer; Control-C ends it, and what was said stays."""
        turn = self.session.turns[-1]
        try:
            with reading_bar() as show:
                for part in self.session.answer(show):
                    print(part.text, end="", flush=True)
        except KeyboardInterrupt:
            note("stopped")
        except (ValueError, OSError):
            if turn.answer:
                print(flush=True)
            else:
                self.session.undo()
            raise
        print(flush=True)
        if turn.answer:
            say_if_it_goes_round(part)
        else:  # a conversation cannot go on from nothing
            self.undo()

    def show(self, pictures: Sequence[Picture]) -> None:
        """Keeps pictures for the next question."""
        self.pending += pictures
        for picture in pictures:
            note(f"{_described(picture.image)}; ask about it")

    def image(self, rest: str) -> None:
        """FILE ...: show pictures with the next question; or clipboard"""
        names = image_names(rest)
        if not names:
            raise ValueError("/image needs a file, a URL, or clipboard.")
        self.show(
            [Picture.of(from_clipboard()) if n == CLIPBOARD else Picture.read(n) for n in names]
        )

    def video(self, rest: str) -> None:
        """FILE ...: show frames of films, GIFs or folders with the next question"""
        names = image_names(rest)
        if not names:
            raise ValueError("/video needs a file, a folder, or a URL.")
        self.show([self.film(name) for name in names])

    def film(self, name: str) -> Picture:
        """Frames of a video."""
        return Picture.film(name, partial(self.session.processor.load_video, frames=self.frames))

    def images(self, rest: str) -> None:
        """all|last: let the model see all pictures, or only those shown last"""
        if rest not in SHOWN:
            raise ValueError(f"/images is {rest or 'nothing'!r}; known: {', '.join(SHOWN)}.")
        self.session.shown = rest

    def system(self, rest: str) -> None:
        """TEXT: replace the system text; without a text, the template's own again"""
        self.session.system = rest or None

    def template(self, rest: str) -> None:
        """NAME: write prompts in another built-in form"""
        self.session.processor = self.session.processor.with_template(rest)

    def regenerate(self, _: str) -> None:
        """: answer the last question again"""
        if not self.session.turns:
            raise ValueError("Nothing has been asked yet.")
        self.answer()

    def undo(self, _: str = "") -> None:
        """: take the last question and its answer back"""
        turn = self.session.undo()
        self.pending = [*turn.pictures, *self.pending]
        note(f"taken back: {turn.text}")

    def save(self, rest: str) -> None:
        """FILE: write the conversation"""
        name = _file(rest, "/save")
        self.session.save(name)
        note(f"saved {len(self.session.turns)} turns in {name}")

    def load(self, rest: str) -> None:
        """FILE: go on with a conversation that was saved"""
        self.session.load(_file(rest, "/load"))
        self.pending = []
        for turn in self.session.turns:
            note(f"> {turn.text}\n{turn.answer}")

    def reset(self, _: str) -> None:
        """: forget everything that was said and shown"""
        self.session.reset()
        self.pending = []

    def help(self, _: str) -> None:
        """: this"""
        for name in COMMANDS:
            arguments, _, job = (getattr(self, name[1:]).__doc__ or "").partition(": ")
            note(f"{name + ' ' + arguments:<20} {job}")
        note(f"{'a path':<20} as /image; also dragged into the terminal, or in a question")
        note(f"{_QUOTES:<20} begins and ends a question of several lines")
        note("Control-C stops an answer, Control-D ends")

    def exit(self, _: str) -> None:
        """: end, as Control-D"""
        self.has_ended = True

    quit = bye = exit


def _described(image: Image.Image | Video) -> str:
    if isinstance(image, Video):
        first = image.frames[0]
        return f"video {first.width} x {first.height}, {len(image.frames)} frames"
    return f"picture {image.width} x {image.height}"


def _file(rest: str, command: str) -> str:
    if not rest:
        raise ValueError(f"{command} needs a file.")
    return file_name(rest)


def note(text: str) -> None:
    """Says something that the model did not say; on a terminal, fainter."""
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        text = f"\x1b[2m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)


def _checked(line: str) -> str:
    bad = next((letter for letter in line if "\ud800" <= letter <= "\udfff"), None)
    if bad is not None:
        raise ValueError(f"The line is not UTF-8: byte 0x{ord(bad) & 0xFF:02x}.")
    return line.removeprefix("\ufeff")


def read_entry() -> str:
    """What is typed next: a line, or all that stands between quotes."""
    prompts = ("> ", "  ") if sys.stdin.isatty() else ("", "")
    text = input(prompts[0])
    if text.startswith(_QUOTES):
        while text == _QUOTES or not text.endswith(_QUOTES):
            text += "\n" + input(prompts[1])
        text = text.removeprefix(_QUOTES).removesuffix(_QUOTES)
    return text


def run(chat: Chat) -> None:
    """Takes line after line until there is no more."""
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history in input()
    if isinstance(sys.stdin, io.TextIOWrapper):  # so that one bad byte spoils only its line
        sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stdin.isatty():
        note("/help lists what can be typed, Control-D ends")
    while not chat.has_ended:
        try:
            line = read_entry()
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\nControl-D ends")
            continue
        try:
            chat.take(line)
        except KeyboardInterrupt:
            note("stopped")
        except (ValueError, OSError) as error:
            note(f"error: {one_line(error)}")


@command(led=build_parser)
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    pictures = [Picture.read(image) for image in args.image]
    say_if_embedded(args)
    model, processor = load_model(args)
    options = {"image_tokens": args.image_tokens, **vars(answer_options(args))}
    session = Session(model, processor, system=args.system, **options)
    chat = Chat(session, pictures, args.frames)
    chat.pending += map(chat.film, args.video)
    run(chat)


if __name__ == "__main__":
    sys.exit(main())
