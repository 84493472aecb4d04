"""Token ids -> text as they come, whole characters only."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_llava.inputs.tokenizer import Tokenizer


class StreamingDecoder:
    """Turns ids into text as they come, never half a character.

    The text of an id depends on its neighbours (bytes that make up one character, a space
    that is dropped at the start), so each id is decoded after those of the last word.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Sequence[int] = ()) -> None:
        """Begins after some ids whose text is out."""
        self._tokenizer = tokenizer
        self._shown = [*shown]
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes, or ``""`` while a character is unfinished."""
        self._waiting.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """What is left at the end, even if it is not a whole character."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._tokenizer.decode(self._shown)
        text = self._tokenizer.decode(self._shown + self._waiting)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return ""
        self._shown, self._waiting = self._waiting, []
        return text[len(before) :]
