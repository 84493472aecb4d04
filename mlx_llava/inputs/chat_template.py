"""Conversations -> the text that a checkpoint was trained on.

A template is one of the original LLaVA's (templates.py) or the checkpoint's own in Jinja,
rendered as transformers does it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_llava.inputs.messages import Message, check_turns
from mlx_llava.inputs.tokenizer import IM_END, IM_START, IMAGE_TOKEN, VIDEO_TOKEN

if TYPE_CHECKING:
    import jinja2

#: Words that no template has in itself, to see what stands around them.
_QUESTION, _ANSWER = "Six times seven?", "Forty-two"
#: What looks like an end mark, as text.
_TEXT_MARK = r"(?:<[^\s<>]+>|\[[^\s\[\]]+\]|#{2,})"
_REWRITES = (
    "The checkpoint's chat template rewrites earlier turns, so its answers cannot be told from "
    "the rest; choose another with --template."
)
_IMAGE_TOKENS = {IMAGE_TOKEN, IM_START, IM_END}


class Segment(NamedTuple):
    """A part of a conversation's text.

    Attributes:
        answer: the assistant wrote it, its end mark included, and training learns it.
    """

    text: str
    answer: bool = False


class ChatTemplate:
    """Anything that writes a conversation as the text that a model reads.

    Attributes:
        name: what the template is called.
        stops: texts that end an answer.
        image_joint: what stands between an image and the text of its turn.
    """

    name: str
    stops: tuple[str, ...]
    image_joint: str

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The conversation's text, cut where the assistant begins and ends.

        After a last turn of the user's, it ends where the answer begins.

        Raises:
            ValueError: The turns do not alternate, or the template cannot write them.
        """
        raise NotImplementedError

    def render(self, messages: Sequence[Message], prefill: str = "") -> str:
        """The prompt: the text of `segments`, ending where the assistant's answer begins.

        With `prefill` it has the beginning of that answer too, as `segments` writes it. Blanks at
        its end are left out where the template does so (transformers' `continue_final_message`).

        Raises:
            ValueError: As `segments`, or the user does not have the last word.
        """
        if messages and messages[-1].role == "assistant":
            raise ValueError("A prompt must be user, assistant, ..., user; the last is assistant.")
        if not (said := prefill.strip()):
            return "".join(segment.text for segment in self.segments(messages))
        before, answer = self._answered(messages, prefill)
        start = answer.index(said)
        kept = prefill if answer.startswith(prefill, start) else said
        return before + answer[: start + len(kept)]

    def _answered(self, messages: Sequence[Message], text: str) -> tuple[str, str]:
        """What is read before an answer, and the answer as it is written."""
        segments = self.segments([*messages, Message("assistant", text)])
        last = max(i for i, segment in enumerate(segments) if segment.answer)
        return "".join(segment.text for segment in segments[:last]), segments[last].text

    def images_first(self, message: Message) -> str:
        """The text of a turn with its unmarked images and videos before it."""
        images = (IMAGE_TOKEN + self.image_joint) * message.images
        return images + (VIDEO_TOKEN + self.image_joint) * message.videos + message.text

    def images_last(self, message: Message) -> Message:
        """A turn with marks for its unmarked images and videos after its text."""
        marks = (self.image_joint + IMAGE_TOKEN) * message.images
        marks += (self.image_joint + VIDEO_TOKEN) * message.videos
        return Message(message.role, message.text + marks)


@dataclass(frozen=True)
class JinjaTemplate(ChatTemplate):
    """A checkpoint's own chat_template, rendered in Jinja's sandbox."""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token and the like
    name: str = "the checkpoint's own"
    stops: tuple[str, ...] = ()
    image_joint: str = "\n"

    @cached_property
    def _template(self) -> jinja2.Template:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """Transformers' {% generation %} block, which only marks the answers."""

            tags = {"generation"}  # noqa: RUF012 - jinja2's own convention

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(
            x, ensure_ascii=False, indent=indent
        )
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ValueError(f"The checkpoint's chat template is broken: {error}") from error

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """Writes the conversation; see `ChatTemplate`.

        In a conversation that ends with an answer, to be learned, what the template adds to a
        prompt when its answer is given is that answer. Where it writes no end mark behind it
        (llava-hf's do not), the tokenizer's is put there. Where the prompt has other spaces than
        the conversation (OneVision's has), the prompt's are learned from.

        Raises:
            ValueError: The template rejects the conversation or drops a part of it.
        """
        check_turns(messages)
        if messages[-1].role == "user":
            return [Segment(self._write(messages, prompting=True))]
        segments: list[Segment] = []
        written = lent = ""
        for i, message in enumerate(messages, 1):
            if message.role != "assistant":
                continue
            prompt, whole, start = self._told_apart(messages[:i])
            if not prompt.startswith(written):
                raise ValueError(_REWRITES)
            segments.append(Segment(prompt[len(written) :].removeprefix(lent)))
            text, written = message.text.strip(), whole
            end = whole.index(text, start) + len(text)
            answer, after = whole[start:end], whole[end:]
            ends = [after.index(stop) + len(stop) for stop in self.stops if stop in after]
            mark = after[: min(ends)] if ends else after.rstrip()
            lent = "" if mark else next(iter(self.stops), self.tokens.get("eos_token", ""))
            segments.append(Segment(answer + (mark or lent), answer=message.learned))
            segments.append(Segment(after[len(mark) :]))
        return segments

    def _answered(self, messages: Sequence[Message], text: str) -> tuple[str, str]:
        prompt, whole, start = self._told_apart([*messages, Message("assistant", text)])
        return prompt, whole[start:]

    def _told_apart(self, messages: Sequence[Message]) -> tuple[str, str, int]:
        """The prompt before a last answer, the whole text, and where the answer begins in it."""
        prompt, whole = self._write(messages[:-1], prompting=True), self._write(messages)
        start = _end_of(prompt, whole)
        if start is None:
            raise ValueError(_REWRITES)
        return prompt, whole, start

    def find_ends(self, special_tokens: Collection[str]) -> tuple[str, ...]:
        """The mark that the template writes after an answer: it ends one, whatever eos is.

        One that is no special token looks like one, as ``</s>``, ``[EOS]`` and ``###`` do.
        """
        turns = [Message("user", _QUESTION), Message("assistant", _ANSWER)]
        tokens = sorted(map(re.escape, {*special_tokens} - _IMAGE_TOKENS), key=len, reverse=True)
        mark = re.compile(rf"\s*({'|'.join([*tokens, _TEXT_MARK])})")
        try:
            _, _, after = self._write(turns).rpartition(_ANSWER)
            if match := mark.match(after):
                return (match[1],)
            # Some templates write it only where a question follows; what begins that is no mark.
            text = self._write([*turns, turns[0]])
        except ValueError:  # it wants other turns than these
            return ()
        before, _, rest = text.partition(_QUESTION)
        between = rest.rpartition(_ANSWER)[2].partition(_QUESTION)[0]
        opening = next(i for i in range(len(between) + 1) if before.endswith(between[i:]))
        match = mark.match(between[:opening])
        return (match[1],) if match else ()

    def _write(self, messages: Sequence[Message], prompting: bool = False) -> str:
        """The template's own text, up to where an answer begins if `prompting`."""
        text = self._render([*map(self._as_dict, messages)], prompting)
        for message in messages:
            if message.text.strip() not in text:
                raise ValueError(
                    f"The checkpoint's chat template drops the {message.role}'s text; choose "
                    "another with --template."
                )
        return text

    def _render(self, turns: Sequence[Mapping[str, Any]], prompting: bool = False) -> str:
        """As transformers does it."""
        import jinja2

        tokens = {"bos_token": "", "eos_token": "", **self.tokens}
        variables = {"tools": None, "documents": None, "add_generation_prompt": prompting}
        try:
            return self._template.render(messages=turns, **variables, **tokens)
        except (jinja2.TemplateError, TypeError, OverflowError) as error:
            raise ValueError(f"The checkpoint's chat template fails: {error}") from error

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether a turn is read in parts; in templates of text, tools may have a type."""
        if not re.search(r"""['"]type['"]|\.type\b""", self.source):
            return False
        parts = [{"type": "text", "text": _QUESTION}]
        for content in (parts, _QUESTION):
            try:
                text = self._render([{"role": "user", "content": content}])
            except ValueError:
                continue
            if _QUESTION in text and str(parts) not in text:
                return content is parts
        return True

    def _as_dict(self, message: Message) -> dict[str, Any]:
        if not self._reads_parts:
            return {"role": message.role, "content": self.images_first(message)}
        shown = [{"type": "image"}] * message.images + [{"type": "video"}] * message.videos
        return {"role": message.role, "content": [*shown, {"type": "text", "text": message.text}]}


def _end_of(prompt: str, whole: str) -> int | None:
    """Where a prompt ends in the conversation that goes on, which may have other spaces."""
    if whole.startswith(prompt):
        return len(prompt)
    words = r"\s+".join(map(re.escape, prompt.split()))
    match = re.match(rf"\s*{words}\s*", whole)
    return match.end() if match else None
