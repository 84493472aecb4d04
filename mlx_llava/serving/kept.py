"""Answers that are kept for a while, to be gone on with by their names; nothing is written."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.requests import Turn

#: Of all that is kept, texts and images as they were sent.
MAX_BYTES = 200_000_000
MAX_ANSWERS = 1000


@dataclass(frozen=True)
class Answered:
    """A conversation up to an answer.

    Attributes:
        turns: what was said, the answer included.
        images: the URLs of its images.
        body: what was told of the answer.
    """

    turns: Sequence[Turn]
    images: Sequence[str]
    body: Mapping[str, Any]

    def items(self) -> Mapping[str, Mapping[str, Any]]:
        """What was answered, item by item."""
        return {item["id"]: item for item in self.body.get("output", ())}

    def size(self) -> int:
        """About how many bytes it takes."""
        texts = sum(len(text) for _, texts, _ in self.turns for text in texts)
        return texts + sum(map(len, self.images)) + len(str(self.body))


class Kept:
    """What is kept of all answers: those that were made or asked for last."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_answers: int = MAX_ANSWERS) -> None:
        self._max_bytes, self._max_answers = max_bytes, max_answers
        self._answers: OrderedDict[str, tuple[Answered, int]] = OrderedDict()
        self._items: dict[str, str] = {}  # the answers that have them
        self._bytes = 0
        self._lock = threading.Lock()  # requests are read in threads of their own

    def fits(self, answered: Answered) -> bool:
        """Whether there is room for it, if that of all others is taken."""
        return answered.size() <= self._max_bytes

    def add(self, name: str, answered: Answered) -> None:
        """Keeps one that fits; the others make room."""
        with self._lock:
            self._answers[name] = answered, answered.size()
            self._bytes += self._answers[name][1]
            self._items.update(dict.fromkeys(answered.items(), name))
            while self._bytes > self._max_bytes or len(self._answers) > self._max_answers:
                self._forget(next(iter(self._answers)))

    def get(self, name: str) -> Answered:
        """One that is kept, and from now on the last to go.

        Raises:
            ApiError: There is none.
        """
        with self._lock:
            if name not in self._answers:
                raise _not_found(name)
            self._answers.move_to_end(name)
            return self._answers[name][0]

    def remove(self, name: str) -> None:
        """Forgets one.

        Raises:
            ApiError: There is none.
        """
        with self._lock:
            if name not in self._answers:
                raise _not_found(name)
            self._forget(name)

    def item(self, name: str) -> Mapping[str, Any]:
        """One of the items of an answer that is kept.

        Raises:
            ApiError: There is none.
        """
        with self._lock:
            if name in self._items:
                return self._answers[self._items[name]][0].items()[name]
        message = f"There is no item {name[:80]!r} here; it was not stored, or is gone."
        raise ApiError(404, message, "item_not_found", param="input")

    def _forget(self, name: str) -> None:
        answered, size = self._answers.pop(name)
        self._bytes -= size
        for item in answered.items():
            del self._items[item]


def _not_found(name: str) -> ApiError:
    message = f"There is no response {name[:80]!r} here; it was not stored, or is gone."
    return ApiError(404, message, "response_not_found", param="response_id")
