"""What all commands share: where a checkpoint is, and how they end.

They end well, with one line on a user's mistake, or by Control-C.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

from mlx_llava.files import one_line

Main: TypeAlias = "Callable[[Sequence[str] | None], None]"

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says where the other parts of a checkpoint are."""
    add = parser.add_argument
    add("--base", help="the model that a delta, a LoRA or a projector belongs to")
    add("--vision-tower", help="CLIP, for checkpoints without a vision tower inside")
    add("--mmproj", help="the second file of a GGUF pair")
    add("--revision", help="branch, tag or commit of a hub repository")
    add("--offline", action="store_true", help="use only what was downloaded before")


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given for `add_source_arguments`, as options of `load` and `convert`."""
    names = ("base", "vision_tower", "mmproj", "revision", "offline")
    return {name: getattr(args, name) for name in names}


@contextmanager
def progress_bar(desc: str, **options: Any) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal; gives what is to be told (done, total)."""
    from tqdm import tqdm

    with tqdm(desc=desc, disable=None, **options) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises ValueError for an argument that is not text.

    Python hands over bytes that are not the locale's as lone surrogates, which no tokenizer and
    no JSON takes. The name of a file may hold them all the same (PEP 383).
    """
    for argument in arguments:
        value = argument.partition("=")[2] if argument.startswith("--") else argument
        is_text = not any("\ud800" <= character <= "\udfff" for character in argument)
        if not is_text and not os.path.lexists(value):
            encoding = sys.getfilesystemencoding().upper()
            raise ValueError(
                f"The argument {argument!a:.200} is neither {encoding} text nor a file's name."
            )


def _format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning for people, who do not ask which line of which file it comes from."""
    return f"warning: {' '.join(str(message).split())}\n"


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
        with_source, warnings.formatwarning = warnings.formatwarning, _format_warning
        try:
            check_arguments(sys.argv[1:] if argv is None else argv)
            main(argv)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has gone (`... | head`): stop, and keep Python from flushing again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (ValueError, OSError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return USER_ERROR
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return INTERRUPTED
        finally:
            warnings.formatwarning = with_source
        return 0

    return run
