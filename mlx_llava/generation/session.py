"""A conversation about pictures: what was said, what was shown, and what fits the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mlx_llava.files import expand_home, lasting_name, whole_file
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.steps import PromptProgress
from mlx_llava.generation.stream import stream_generate
from mlx_llava.inputs.image import data_url, load_image, png
from mlx_llava.inputs.processor import Processor
from mlx_llava.inputs.video import Video, VideoSource
from mlx_llava.json_files import read_json, sensible_values, write_json
from mlx_llava.model.llava import Llava

#: Whether every picture of a conversation is embedded, or only those that were shown last.
SHOWN = ("all", "last")


@dataclass(frozen=True)
class Picture:
    """A picture or a video, and where it came from: a path, a URL, or itself as a data: URL."""

    source: str
    image: Image.Image | Video = field(repr=False)

    @classmethod
    def read(cls, source: str) -> Picture:
        """Reads a path or a URL; see `load_image`."""
        return cls(lasting_name(source), load_image(source))

    @classmethod
    def film(cls, source: str, load_video: Callable[[VideoSource], Video]) -> Picture:
        """Reads a video from a path or a URL; see `Processor.load_video`."""
        return cls(lasting_name(source), load_video(source))

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """A picture that came from nowhere."""
        return cls(data_url(png(image)), image)

    @property
    def kind(self) -> str:
        """As messages name their parts."""
        return "video" if isinstance(self.image, Video) else "image"

    @property
    def saved(self) -> Any:
        """What `Session.save` keeps of it."""
        if isinstance(self.image, Video):
            return {"video": self.source, "frames": len(self.image.frames)}
        return self.source


@dataclass
class Turn:
    """A question, the pictures that were shown with it, and the answer so far."""

    text: str
    pictures: tuple[Picture, ...] = ()
    answer: str = ""


class Session:
    """A conversation that goes on.

    Attributes:
        turns: what was said; the last one may be waiting for its answer.
        system: replaces the template's system text, if it is not None.
        shown: one of `SHOWN`.
        file: where it was saved, or comes from, and may be saved again.
        processor: prepares the prompts.
    """

    def __init__(
        self, model: Llava, processor: Processor, *, system: str | None = None, **options: Any
    ) -> None:
        """Begins a conversation; its options are those of `stream_generate`."""
        self.model, self.processor, self.options = model, processor, options
        self.system = system
        self.shown = SHOWN[0]
        self.file: Path | None = None
        self.turns: list[Turn] = []
        self._cache = PromptCache(model)

    def messages(self, turns: Sequence[Turn] | None = None) -> list[dict[str, Any]]:
        """The conversation, or some turns, in OpenAI's shape, up to the question that waits."""
        turns = self.turns if turns is None else turns
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        last = next((turn for turn in reversed(turns) if turn.pictures), None)
        for turn in turns:
            pictures = turn.pictures if self.shown == "all" or turn is last else ()
            content = [{"type": one.kind, one.kind: one.image} for one in pictures]
            text = {"type": "text", "text": turn.text}
            messages.append({"role": "user", "content": [*content, text]})
            if turn is not turns[-1]:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def ask(self, text: str, pictures: Sequence[Picture] = ()) -> list[Turn]:
        """Adds a question, and drops the oldest turns where the context is too short for all.

        Returns:
            The turns that were dropped, whole, with their pictures.

        Raises:
            ValueError: The question does not fit alone; the conversation is as it was.
        """
        room = self.processor.context_length * 3 // 4  # and the rest is for an answer
        turns = [*self.turns, Turn(text, tuple(pictures))]
        for dropped in range(len(turns)):
            length = self.processor.count_tokens(self.messages(turns[dropped:]))
            if length <= room:
                self.turns = turns[dropped:]
                return turns[:dropped]
        raise ValueError(
            f"The question takes {length} tokens; there is room for {room}, three quarters of the "
            "model's context."
        )

    def answer(
        self, prompt_progress_callback: PromptProgress | None = None
    ) -> Iterator[GenerationResponse]:
        """Answers the last question; what is said is kept also where it is interrupted."""
        turn = self.turns[-1]
        turn.answer = ""
        options = {
            "prompt_cache": self._cache,
            "prompt_progress_callback": prompt_progress_callback,
            **self.options,
        }
        for part in stream_generate(self.model, self.processor, self.messages(), **options):
            turn.answer = part.answer.strip()
            yield part

    def undo(self) -> Turn:
        """Takes the last turn back."""
        if not self.turns:
            raise ValueError("Nothing has been said yet.")
        return self.turns.pop()

    def save(self, path: str | Path) -> None:
        """Writes the conversation; pictures from files as their paths.

        Raises:
            FileExistsError: There is a file that holds something else, or another conversation.
        """
        path = expand_home(path)
        if path.exists() and path.absolute() != self.file:
            what = "another conversation" if _is_conversation(path) else "no conversation"
            raise FileExistsError(f"{path} holds {what}; it stays as it is.")
        turns = [
            {"text": t.text, "images": [p.saved for p in t.pictures], "answer": t.answer}
            for t in self.turns
        ]
        with whole_file(path) as beside:
            write_json(beside, {"system": self.system, "shown": self.shown, "turns": turns})
        self.file = path.absolute()

    def load(self, path: str | Path) -> None:
        """Goes on with what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file, or a picture is gone.
            ValueError: It is something else; the conversation is as it was.
        """
        path = expand_home(path)
        if not path.exists():
            raise FileNotFoundError(f"There is no file {path}.")
        data = read_json(path)
        with sensible_values(path):
            system, shown = data["system"], data["shown"]
            turns = [self._read_turn(turn) for turn in data["turns"]]
        if shown not in SHOWN or not isinstance(system, (str, type(None))):
            raise ValueError(f"{path} is not a conversation that was saved.")
        self.system, self.shown, self.turns = system, shown, turns
        self.file = path.absolute()

    def reset(self) -> None:
        """Forgets what was said, and where that was saved."""
        self.turns, self.file = [], None

    def _read_turn(self, data: dict[str, Any]) -> Turn:
        pictures = tuple(map(self._read_picture, data["images"]))
        if not isinstance(data["text"], str) or not isinstance(data["answer"], str):
            raise TypeError("a text is no text")
        return Turn(data["text"], pictures, data["answer"])

    def _read_picture(self, saved: Any) -> Picture:
        if isinstance(saved, str):
            return Picture.read(saved)
        return Picture.film(
            saved["video"], partial(self.processor.load_video, frames=saved["frames"])
        )


def _is_conversation(path: Path) -> bool:
    try:
        return read_json(path).keys() == {"system", "shown", "turns"}
    except (ValueError, OSError):
        return False
