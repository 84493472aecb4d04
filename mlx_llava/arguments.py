"""What commands share: which model, how to answer, and how they end.

They end well, with one line on a user's mistake, or by Control-C.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from mlx_llava.bars import progress_bar
from mlx_llava.checkpoint.hub import Source, embedded_note
from mlx_llava.files import one_line
from mlx_llava.generation.sampling import MAX_TOKENS, Options
from mlx_llava.interrupts import raise_interrupts
from mlx_llava.model.anyres import MODES
from mlx_llava.model.device import DTYPES
from mlx_llava.model.links import SECONDS
from mlx_llava.model.ranks import rank_here

if TYPE_CHECKING:  # what --help does not wait for
    from mlx_llava import GenerationResponse, Llava, Processor

USER_ERROR = 2
#: How often an answer for people may say the same on end.
MAX_REPEATS = 32
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

_MODEL, *_SOURCE = fields(Source)
_PATHS = {"adapter_path", *(one.name for one in _SOURCE)}

Main: TypeAlias = "Callable[[Sequence[str] | None], None]"


class Parser(argparse.ArgumentParser):
    """A command's arguments, whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, and not all that could be right."""
        self.exit(USER_ERROR, f"error: {message} ({self.prog} --help lists all options)\n")


def add_options(parser: argparse.ArgumentParser, options: Iterable[Field[Any]]) -> None:
    """Adds a flag for each of some fields; see `signatures.option`."""
    for option in options:
        names = [f"--{option.name.replace('_', '-')}"]
        names += ["-m"] if option.name == "max_tokens" else []
        parser.add_argument(*names, **option.metadata["flag"])


def say_if_it_goes_round(last: GenerationResponse) -> None:
    """Says on stderr why an answer that repeats itself was ended."""
    if last.goes_round:
        print(
            "note: the answer repeats itself and was ended; --max-repeats N lets it say the same N "
            "times",
            file=sys.stderr,
        )


def given_options(args: argparse.Namespace, options: Iterable[Field[Any]]) -> dict[str, Any]:
    """What was given for `add_options`, by name."""
    return {option.name: getattr(args, option.name) for option in options}


def named(text: str) -> str:
    """An argument's type: a path or a repository, which an unset variable of a shell is not."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty, expected a name")
    return text


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says where the parts of a checkpoint are, as the fields of `Source`."""
    add_options(parser, _SOURCE)


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given for `add_source_arguments`, as options of `load` and `convert`."""
    return given_options(args, _SOURCE)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds which model to load, and how."""
    add = parser.add_argument
    add("--model", help=f"{_MODEL.metadata['help']} (default: embedded)")
    add_adapter_argument(parser)
    add_loading_arguments(parser)


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """Adds what was trained of the model."""
    trained = "what was trained of the model, here or with PEFT"
    parser.add_argument("--adapter-path", metavar="DIR", help=trained)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how to load a model, wherever it is named."""
    add = parser.add_argument
    add("--template", help="a built-in template instead of the checkpoint's own")
    add("--image-mode", choices=MODES, help="how pictures are cut (default: the checkpoint's)")
    add("--dtype", choices=DTYPES, help="of all weights (default: what the device is fast at)")
    add_source_arguments(parser)


def add_ranks_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how several processes run a command together."""
    parser.add_argument(
        "--rank-timeout",
        type=float,
        default=SECONDS,
        metavar="SECONDS",
        help="under mlx.launch: how long a rank may be silent, or no step end, before all of them "
        "end (default: %(default)g)",
    )


def add_share_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how several processes run a command together, and what of a model each has."""
    add_ranks_arguments(parser)
    add = parser.add_argument
    add(
        "--pipeline",
        action="store_true",
        help="under mlx.launch: each rank has some of the layers, not some of each",
    )
    add(
        "--split",
        type=lambda text: [int(part) for part in text.split(",")],
        metavar="N,N",
        help="of a --pipeline: how many layers each rank has (default: as its memory allows)",
    )


def add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what videos to show, and how many frames of each."""
    add = parser.add_argument
    add(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="a film, an animation, or a folder of frames; may be given several times",
    )
    add_frames_argument(parser)


def add_frames_argument(parser: argparse.ArgumentParser) -> None:
    """Adds how many frames are taken of a video."""
    how_many = "how many frames are taken of a video (default: as the model was trained, or 8)"
    parser.add_argument("--frames", type=_positive, metavar="N", help=how_many)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def load_model(args: argparse.Namespace, **options: Any) -> tuple[Llava, Processor]:
    """Loads what was asked for, by all flags that are named as options of `load`.

    Args:
        args (argparse.Namespace): Of a command that has ``--model``.
        **options: Of `load`, in the place of flags.
    """
    from mlx_llava.checkpoint.load import load

    parameters = inspect.signature(load).parameters
    flags = {name: value for name, value in vars(args).items() if name in parameters} | options
    source = Source(args.model, **source_options(args))
    return load_shared(functools.partial(load, args.model), source, **flags)


def load_shared(
    load: Callable[..., tuple[Llava, Processor]],
    source: Source | str | Path,
    **options: Any,
) -> tuple[Llava, Processor]:
    """Loads a model, or of several processes that run a command, each its share of it.

    Args:
        load (callable): Loads it.
        source (Source or path): What is loaded.
        **options: Of `load`.
    """
    if rank_here() is None:
        if options.get("pipeline") or options.get("split"):
            raise ValueError("--pipeline and --split are for several ranks; see mlx.launch.")
        with progress_bar("loading", "opening", unit="B", unit_scale=True, leave=False) as show:
            return load(**options, progress=show)
    from mlx_llava.launched import load_together

    where = source if isinstance(source, Source) else Source(source)
    told = {name: value for name, value in options.items() if name not in _PATHS}
    return load_together(functools.partial(load, **options), where, told)


def look_at_model(args: argparse.Namespace) -> tuple[Processor, int, int]:
    """What `load_model` would load, but for the weights: their bytes as stored, their number."""
    from mlx_llava.checkpoint.load import count_parameters, make_processor
    from mlx_llava.checkpoint.open import open_checkpoint
    from mlx_llava.json_files import sensible_values
    from mlx_llava.model.device import total_memory

    with sensible_values(args.model or "the embedded model"):
        source = Source(args.model, **source_options(args))
        checkpoint = open_checkpoint(source, total_memory())
        processor = make_processor(checkpoint, args.image_mode, args.template)
    stored = sum(tensor.nbytes for tensor in checkpoint.contents.tensors.values())
    return processor, stored, count_parameters(checkpoint.config)


def say_if_embedded(args: argparse.Namespace) -> None:
    """Says on stderr what answers where no model was named."""
    if args.model is None:
        print(embedded_note(), file=sys.stderr)


def add_answer_arguments(parser: argparse.ArgumentParser, max_tokens: int = MAX_TOKENS) -> None:
    """Adds how to answer, as the fields of `Options`; `max_tokens` is its default."""
    add_options(parser, fields(Options))
    parser.set_defaults(max_tokens=max_tokens)


def answer_options(args: argparse.Namespace) -> Options:
    """What was given for `add_answer_arguments`.

    Raises:
        ValueError: A number makes no sense.
    """
    given = given_options(args, fields(Options))
    if args.json_schema is not None:
        from mlx_llava.generation.json_schema import read_schema

        given["json_schema"] = read_schema(args.json_schema)
    return Options(**given)


def add_image_tokens_argument(parser: argparse.ArgumentParser) -> None:
    """Adds in how many tokens pictures are shown, an option of `Processor`."""
    parser.add_argument(
        "--image-tokens",
        type=_positive,
        metavar="N",
        help="show at most N features of each picture, those that differ most (default: all)",
    )


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


def command(
    main: Main | None = None,
    *,
    led: Callable[[], argparse.ArgumentParser] | None = None,
    is_shared: bool = False,
) -> Callable[..., Any]:
    """Turns ``main(argv)`` into one that returns an exit code and prints no traceback.

    Args:
        main (callable): The command; without it, a decorator is returned.
        led (callable, optional): Makes its parser. Where several processes run it, rank 0 does,
            and the others follow with the same model.
        is_shared (bool): Where several processes run it, all of them do.
    """
    if main is None:
        return functools.partial(command, led=led, is_shared=is_shared)

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        raise_interrupts()
        job = functools.partial(_checked, main, argv)
        if rank_here() is None:
            return attempt(job)[0]
        from mlx_llava import launched

        follow = launched.follower(led, argv) if led else None
        return launched.run(job, follow, is_shared, attempt, _rank_timeout(argv))

    return run


def _rank_timeout(argv: Sequence[str] | None) -> float:
    """What is needed of the arguments before they are read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_ranks_arguments(parser)
    seconds: float = parser.parse_known_args(argv)[0].rank_timeout
    return seconds


def _checked(main: Main, argv: Sequence[str] | None) -> None:
    check_arguments(sys.argv[1:] if argv is None else argv)
    main(argv)


def attempt(job: Callable[[], None]) -> tuple[int, str]:
    """Does what a command does; gives its exit code and the error, which was printed.

    ValueError and OSError are what the library raises for what a user can mend.
    """
    with_source, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        job()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`... | head`): stop, and keep Python from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR, one_line(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED, "interrupted"
    finally:
        warnings.formatwarning = with_source
    return 0, ""
