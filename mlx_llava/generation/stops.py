"""Where an answer ends: at an end-of-answer id, a stop text (none of it shows), or a length.

If asked for, also where it goes round in circles, as models do on what they do not know.
"""

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


class Circles:
    """Finds that the same few tokens come again and again.

    Attributes:
        found: whether a group of up to `LONGEST` has come `times` times, one after the other.
    """

    LONGEST = 8

    def __init__(self, times: int | None) -> None:
        """With None, it never finds any."""
        self._times, self._tokens = times, list[int]()
        self._same = [0] * (self.LONGEST + 1)  # how many were as the one so far before
        self.found = False

    def add(self, token: int) -> None:
        """Takes the next token."""
        if self._times is None:
            return
        for distance, before in enumerate(reversed(self._tokens), 1):
            self._same[distance] = self._same[distance] + 1 if before == token else 0
            self.found |= self._same[distance] >= distance * (self._times - 1)
        self._tokens = [*self._tokens[1 - self.LONGEST :], token]


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
        max_repeats: int | None = None,
    ) -> None:
        """Goes on after ids that it begins with, which are no part of its text."""
        self._decoder = StreamingDecoder(tokenizer, begun)
        self._matcher = StopMatcher(stops)
        self._eos_ids = eos_ids
        self._remaining = max_tokens
        self._circles = Circles(max_repeats)
        self.text = ""

    @property
    def stop(self) -> str:
        """The stop text that ended it, if one did."""
        return self._matcher.found

    @property
    def goes_round(self) -> bool:
        """Whether it was ended because it repeated itself."""
        return self._circles.found

    def add(self, token: int) -> tuple[str, str | None]:
        """The text that became readable, and ``stop`` or ``length`` if this is the end."""
        self._remaining -= 1
        self._circles.add(token)
        if self.goes_round:
            self._remaining = 0
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
