"""How every command ends: well, with one line on a user's mistake, or by Control-C."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

Main: TypeAlias = "Callable[[Sequence[str] | None], None]"

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class ExitCode(Protocol):
    """A command's ``main``: arguments (default: those of the process) -> exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Runs the command."""
        ...


def command(main: Main) -> ExitCode:
    """Turns ``main(argv)`` into one that returns an exit code and prints no traceback.

    ValueError and OSError are what the library raises for what a user can mend.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            main(argv)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has gone (`... | head`): stop, and keep Python from flushing again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (ValueError, OSError) as error:
            message = " ".join(str(error).split())
            print(f"error: {message}", file=sys.stderr)
            return USER_ERROR
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return INTERRUPTED
        return 0

    return run
