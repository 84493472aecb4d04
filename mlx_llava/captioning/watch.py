"""New pictures of folders, each when all of it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_llava.inputs.image import load_image
from mlx_llava.inputs.video import is_film, video_pixels

#: Seconds between two looks, and how long a file that stands still may be broken.
PAUSE = 1.0
PATIENCE = 60.0


@dataclass
class _File:
    """A file that may still be written: its size and time, since when, and when to look into it."""

    state: tuple[int, int]
    since: float
    next_look: float


def whole_pictures(
    find: Callable[[], Iterable[str]],
    is_done: Callable[[str], bool],
    pause: float = PAUSE,
    patience: float = PATIENCE,
) -> Iterator[list[str]]:
    """The pictures of folders as they come, without end.

    A picture is whole when neither its size nor its time has changed between two looks and it can
    be decoded; one that stands still and cannot is given after a while, to become an error, and
    again when it has changed.

    Args:
        find (callable): Gives the pictures that are there.
        is_done (callable): Whether a picture needs no look, however it changes.
        pause (float): Seconds between two looks, at least.
        patience (float): Seconds after which what cannot be decoded is given.

    Yields:
        list[str]: Pictures that have become whole; maybe none.
    """
    done, given = set[str](), dict[str, tuple[int, int]]()
    waiting: dict[str, _File] = {}
    while True:
        began = time.monotonic()
        new = [image for image in dict.fromkeys(find()) if image not in done]
        new = [image for image in new if image not in given or _state(image) != given[image]]
        done.update(image for image in new if is_done(image))
        new = [image for image in new if image not in done]
        waiting = {image: _looked_at(image, waiting.get(image), began) for image in new}
        ready = [image for image in new if _is_ready(image, waiting[image], began, patience)]
        given |= {image: waiting[image].state for image in ready}
        looked = time.monotonic() - began
        yield ready
        time.sleep(max(pause, 30 * looked))  # where looking takes long, more rarely


def _looked_at(image: str, before: _File | None, now: float) -> _File:
    state = _state(image)
    return before if before and before.state == state else _File(state, now, now)


def _state(image: str) -> tuple[int, int]:
    with suppress(OSError):
        status = Path(image).stat()
        return status.st_size, status.st_mtime_ns
    return -1, -1


def _is_ready(image: str, file: _File, now: float, patience: float) -> bool:
    still = now - file.since
    if still == 0 or now < file.next_look:
        return False
    if still >= patience or _can_be_decoded(image):
        return True
    file.next_look = now + still  # ever more rarely
    return False


def _can_be_decoded(image: str) -> bool:
    try:
        _ = video_pixels(image, 1) if is_film(image) else load_image(image)
    except (ValueError, OSError):
        return False
    return True
