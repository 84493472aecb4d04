"""Control-C ends a command that is still being imported, without a word, or waits a moment."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = ("mlx_llava", "mlx-llava")


def is_command() -> bool:
    """Whether this process was started as a command of this package."""
    first = sys.argv[0] if sys.argv else ""
    # Python says so while it looks for the module.
    started = sys.orig_argv if first == "-m" else [os.path.basename(first)]  # noqa: PTH119
    return any(argument.startswith(_NAMES) for argument in started)


def end_by_interrupt() -> None:
    """Lets Control-C end this process as a shell expects it, unless somebody else minds it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_interrupts() -> None:
    """Lets Control-C be a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def waiting_interrupts() -> Iterator[None]:
    """Lets Control-C wait until all that is done within is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed and callable(before):
        before(signal.SIGINT, None)
