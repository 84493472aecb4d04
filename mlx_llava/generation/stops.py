"""Where an answer ends: at an end-of-answer id, a stop text (none of it shows), or a length."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mlx_llava.generation.detokenizer import StreamingDecoder
from mlx_llava.inputs.tokenizer import Tokenizer


class StopMatcher:
    """Withholds text that is, or could become, one of the stop texts.

    Attributes:
        found: the one that has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = self.found = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Takes new text; returns what may be shown, and whether a stop has come."""
        self._held += text
        found = [(i, stop) for stop in self._stops if (i := self._held.find(stop)) >= 0]
        if found:
            start, self.found = min(found)
            return self._held[:start], True
        starts = (stop[:n] for stop in self._stops for n in range(1, len(stop)))
        withheld = max((len(start) for start in starts if self._held.endswith(start)), default=0)
        safe = len(self._held) - withheld
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown, False

    def flush(self) -> str:
        """What was withheld, once nothing more comes."""
        shown, self._held = self._held, ""
        return shown


class Answer:
    """One answer as it grows: ids -> text, up to an end-of-answer id, a stop text or a length.

    Attributes:
        text: all of it so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_ids: Collection[int],
        stops: Sequence[str],
        max_tokens: int,
        begun: Sequence[int] = (),
    ) -> None:
        """Goes on after ids that it begins with, which are no part of its text."""
        self._decoder = StreamingDecoder(tokenizer, begun)
        self._matcher = StopMatcher(stops)
        self._eos_ids = eos_ids
        self._remaining = max_tokens
        self.text = ""

    @property
    def stop(self) -> str:
        """The stop text that ended it, if one did."""
        return self._matcher.found

    def add(self, token: int) -> tuple[str, str | None]:
        """The text that became readable, and ``stop`` or ``length`` if this is the end."""
        self._remaining -= 1
        is_end = token in self._eos_ids
        text = "" if is_end else self._decoder.add(token)
        finish_reason = "stop" if is_end else None if self._remaining else "length"
        if finish_reason:
            text += self._decoder.flush()
        text, stopped = self._matcher.add(text)
        if stopped:
            finish_reason = "stop"
        elif finish_reason:
            text += self._matcher.flush()
        self.text += text
        return text, finish_reason
