"""Control-C while a command is still being imported ends it, without a word."""

from __future__ import annotations

import os
import signal
import sys

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
