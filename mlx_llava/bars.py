"""What a terminal shows while something lasts."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(
    desc: str, before: str | None = None, **options: Any
) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal; gives what is to be told (done, total).

    Args:
        desc (str): What is done, and may be done again when all was.
        before (str, optional): What is done until the first is told, as `desc`.
        **options: Of tqdm.
    """
    from tqdm import tqdm

    new = functools.partial(tqdm, disable=None, miniters=0, smoothing=0, **options)
    bar, is_over = new(bar_format=(before or desc) + " [{elapsed}]"), threading.Event()

    def tick() -> None:
        while not is_over.wait(1):
            with bar.get_lock():
                bar.update(0)

    def show(done: int, total: int) -> None:
        nonlocal bar
        with bar.get_lock():
            if bar.total is None or done == 0:
                bar.leave = False
                bar.close()
                bar = new(desc=desc, total=total)
            bar.update(done - bar.n)
            if done == total:
                bar.close()

    ticking = threading.Thread(target=tick, daemon=True)
    ticking.start()
    try:
        yield show
    finally:
        is_over.set()
        ticking.join()
        bar.close()


@contextmanager
def reading_bar() -> Iterator[Callable[[int, int], None] | None]:
    """A bar of what an answer waits for, where that is longer than a second; it leaves no trace.

    Gives what `stream_generate` is to tell, or None where nobody looks.
    """
    if not sys.stderr.isatty():
        yield None
        return
    stages = "reading the prompt", "reading the picture"
    with progress_bar(*stages, unit=" tokens", leave=False, delay=1) as show:
        yield show
