"""What a client wants answered, whatever API it speaks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import takewhile
from typing import Any, TypeAlias

from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.messages import Message
from mlx_llava.inputs.processor import Processor
from mlx_llava.serving.errors import ApiError, context_error

#: The part of a context that an answer has where turns are dropped, if it may be so long.
ANSWER_PART = 4


class VideoUrl(str):
    """The URL of a video, among those of images."""

    __slots__ = ()


#: A conversation, or a text as the model reads it.
Prompt: TypeAlias = "str | Sequence[Message]"


@dataclass(frozen=True)
class Request:
    """What is to be answered, and how.

    Attributes:
        model: the model's name.
        prompts: conversations, or texts as the model reads them; none asks for nothing.
        options: how to answer.
        images: the URLs of the images and videos of a conversation, in reading order.
        frames: how many frames are taken of each video; None for as many as the model knows.
        image_tokens: how many features of each the model is shown at most; None for all.
        n: how many answers each prompt gets.
        prefill: how the answers to conversations begin.
        top_logprobs: how many of the likeliest tokens are reported at the position of each, or
            None for no tokens at all.
        stream: whether the answers are sent as they are made.
        keep_alive: for how many seconds the model then stays loaded; None for as the server does.
        truncate: whether the oldest turns of a conversation that does not fit are dropped.
    """

    model: str
    prompts: Sequence[Prompt]
    options: Options
    images: Sequence[str] = ()
    frames: int | None = None
    image_tokens: int | None = None
    prefill: str = ""
    n: int = 1
    top_logprobs: int | None = None
    stream: bool = False
    keep_alive: float | None = None
    truncate: bool = False

    @property
    def answers(self) -> int:
        """How many there are to be."""
        return self.n * len(self.prompts)

    def check_length(self, processor: Processor) -> None:
        """Refuses a text that cannot fit, before anything is made of it.

        Raises:
            ApiError: It has more characters than the model's context can hold.
        """
        shortest = [self._ends(prompt)[-1] for prompt in self.prompts]
        characters = max(map(self._characters, shortest), default=0)
        if characters > _most_characters(processor):
            raise context_error(
                f"The text has {characters:,} characters, more than the model's context of "
                f"{processor.context_length} tokens can hold."
            )

    def seeded(self) -> list[Options]:
        """The options of each of the `n` answers, which a seed must not make equal."""
        if self.options.seed is None:
            return [self.options] * self.n
        seeds = [as_seed(self.options.seed + i) for i in range(self.n)]
        return [replace(self.options, seed=seed) for seed in seeds]

    def prepare(self, processor: Processor, images: Sequence[Any]) -> list[tuple[Inputs, Options]]:
        """The prompts as the model reads them, each as often as it is to be answered.

        Args:
            processor (Processor): Makes them.
            images (list): What the URLs of its images stand for.
        """
        inputs = [self._inputs(processor, prompt, images) for prompt in self.prompts]
        return [(one, options) for one in inputs for options in self.seeded()]

    def _ends(self, prompt: Prompt) -> Sequence[Prompt]:
        """A prompt, and if it may be cut what is left of it, turn by turn, to the last question."""
        if isinstance(prompt, str) or not self.truncate:
            return [prompt]
        first = int(prompt[0].role == "system")
        return [[*prompt[:first], *prompt[at:]] for at in range(first, len(prompt), 2)]

    def _inputs(self, processor: Processor, prompt: Prompt, images: Sequence[Any]) -> Inputs:
        """A prompt as the model reads it; what is cut leaves room for an answer."""
        ends = self._ends(prompt)

        @cache  # preparing pictures takes the longest
        def read(cut: int) -> Inputs:
            end = ends[cut]
            shown = 0 if isinstance(end, str) else sum(message.images for message in end)
            return processor(
                end,
                images if isinstance(end, str) else images[len(images) - shown :],
                raw=isinstance(end, str),
                prefill=self.prefill,
                image_tokens=self.image_tokens,
            )

        def fits(cut: int, room: int) -> bool:
            is_short = self._characters(ends[cut]) <= _most_characters(processor)
            return is_short and read(cut).positions + room <= processor.context_length

        if len(ends) == 1 or fits(0, 1):
            return read(0)
        room = max(1, min(self.options.max_tokens, processor.context_length // ANSWER_PART))
        cuts = range(len(ends))
        return read(bisect_left(cuts, True, hi=cuts[-1], key=partial(fits, room=room)))

    def _characters(self, prompt: Prompt) -> int:
        texts = [prompt] if isinstance(prompt, str) else [message.text for message in prompt]
        return sum(map(len, texts)) + len(self.prefill)


def _most_characters(processor: Processor) -> int:
    return processor.context_length * processor.tokenizer.longest_piece


def as_seed(number: int) -> int:
    """Takes any whole number, where MLX takes those of 64 bits."""
    return number % 2**64


#: The role (system, user, assistant), texts and number of images of a turn.
Turn: TypeAlias = "tuple[str, list[str], int]"


def begun(turns: Sequence[Turn]) -> tuple[list[Turn], str]:
    """Turns without an answer at their end that has begun, and its text so far."""
    answers = [*takewhile(lambda turn: turn[0] == "assistant" and not turn[2], reversed(turns))]
    before = [*turns[: len(turns) - len(answers)]]
    if not any(role == "user" for role, _, _ in before):
        return [*turns], ""
    return before, "\n".join(text for _, texts, _ in reversed(answers) for text in texts if text)


def arrange(turns: Sequence[Turn]) -> list[Message]:
    """Turns in any order -> messages in the order that every template has.

    All system texts become one message at the beginning. Turns of one role that follow each other
    are joined, and before an assistant's greeting stands a user's turn that says nothing. Images
    are shown to the model by a user: those of other turns go to the user's turn that follows, or
    to the last. An answer that has not begun is left out.

    Args:
        turns (list): What was said.

    Raises:
        ApiError: The last turn is not the user's.
    """
    while turns and turns[-1][0] == "assistant" and not (any(turns[-1][1]) or turns[-1][2]):
        turns = turns[:-1]
    speakers = [role for role, _, _ in turns if role != "system"]
    if speakers[-1:] != ["user"]:
        found = speakers[-1] if speakers else "none"
        raise ApiError(400, f"The last turn must be the user's; found {found}.", param="messages")
    system: list[str] | None = None
    joined: list[tuple[str, list[str]]] = []
    shown: list[int] = []
    waiting = 0
    for role, texts, images in turns:
        waiting += images
        if role == "system":
            system = [*(system or ()), *texts]
            continue
        if not joined or joined[-1][0] != role:
            joined.append((role, []))
            shown.append(0)
        joined[-1][1].extend(texts)
        if role == "user":
            shown[-1], waiting = shown[-1] + waiting, 0
    shown[-1] += waiting
    messages = [Message(role, "\n".join(t), n) for (role, t), n in zip(joined, shown, strict=True)]
    if messages[0].role == "assistant":
        messages.insert(0, Message("user", ""))
    return messages if system is None else [Message("system", "\n".join(system)), *messages]
