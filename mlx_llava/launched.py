"""A command that several processes run together, as `mlx.launch` starts them.

Rank 0 does what the command does, and alone reads and speaks. The others load the same model and
follow; of commands that every rank knows what to do in, they do the same without a word.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mlx_llava.checkpoint.hub import Source
from mlx_llava.checkpoint.tensors import PROJECTOR
from mlx_llava.files import one_line
from mlx_llava.model.ranks import PATIENCE, USER_ERROR, Alone, Ended, Ranks, meet, met, rank_here

if TYPE_CHECKING:
    from mlx_llava import Llava, Processor
    from mlx_llava.checkpoint.open import Checkpoint

_INTERRUPTED = 130
#: So many numbers of a tensor tell it from another.
SAMPLE = 64

#: Does something, and gives the exit code and the error, which was printed.
Attempt = Callable[[Callable[[], None]], tuple[int, str]]


def run(
    main: Callable[[], None],
    follow: Callable[[], None] | None,
    is_shared: bool,
    attempt: Attempt,
    seconds: float,
) -> int:
    """Runs a command in this process, which is one of several.

    Args:
        main (callable): The command.
        follow (callable, optional): What other ranks than 0 do in its place.
        is_shared (bool): They do the same.
        attempt (callable): Turns a user's errors into one line.
        seconds (float): See `meet`.
    """
    if rank_here():
        sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all
    try:
        ranks = meet(seconds)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.__stderr__)
        return USER_ERROR
    except KeyboardInterrupt:
        return _INTERRUPTED
    if not isinstance(ranks, Ranks):
        if rank := rank_here():  # which nobody would hear
            print(f"error: rank {rank} has nobody to meet: no hostfile", file=sys.__stderr__)
            return USER_ERROR
        return attempt(main)[0]
    ranks.leads = follow is not None
    job = main if is_shared or ranks.speaks or follow is None else follow
    if not is_shared and follow is None:
        job = _refuse
    if ranks.speaks:
        signal.signal(signal.SIGTERM, _terminate)
    _end(ranks, *_outcome(job, attempt))


def _end(ranks: Ranks, code: int, error: str) -> NoReturn:
    if error and not ranks.speaks:
        time.sleep(PATIENCE)  # rank 0 may have it too
    ranks.end(code, error)


def _outcome(job: Callable[[], None], attempt: Attempt) -> tuple[int, str]:
    try:
        return attempt(job)
    except Ended as ended:
        return ended.code, ""
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
        return code, "its arguments make no sense" if code else ""
    except BaseException as error:
        time.sleep(PATIENCE)
        traceback.print_exc(file=sys.__stderr__)
        return 1, one_line(Exception(f"{type(error).__name__}: {error}"))


def _refuse() -> None:
    raise ValueError("This command is for one process; start it without mlx.launch.")


def _terminate(number: int, _: Any) -> NoReturn:
    raise SystemExit(128 + number)


def follower(
    build_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None
) -> Callable[[], None]:
    """What other ranks do where rank 0 does what a command's arguments say."""

    def follow_command() -> None:
        from mlx_llava.arguments import load_model
        from mlx_llava.generation.follow import follow

        ranks = met()
        assert isinstance(ranks, Ranks)
        follow(*load_model(build_parser().parse_args(argv)), ranks)

    return follow_command


def load_together(
    load: Callable[..., tuple[Llava, Processor]],
    source: Source,
    options: Mapping[str, Any],
) -> tuple[Llava, Processor]:
    """Loads a model on every rank, where all have the same.

    Args:
        load (callable): Loads it; where it can share it, with all ranks as ``group``.
        source (Source): What is loaded.
        options (mapping): How, and what else has to be the same.

    Raises:
        ValueError: They have not, or `load` raises it.
    """
    ranks = met()
    if isinstance(ranks, Ranks):
        told = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        ranks.agree({**_facts(source, ranks), **told})
    shares = "pipeline" in options and ranks.size > 1
    model, processor = load(group=ranks.group) if shares else load()
    model.ranks = ranks
    return model, processor


def _facts(source: Source, ranks: Alone) -> dict[str, str]:
    """What tells a model from others: its config, what tensors there are, and some of them.

    Of rank 0 alone an error is raised; others have it as ``error``.
    """
    from mlx_llava.checkpoint.open import open_checkpoint

    try:
        checkpoint = open_checkpoint(source)
    except (ValueError, OSError) as error:
        if ranks.speaks:
            raise
        return {"error": one_line(error)}
    tokenizer = checkpoint.tokenizer
    says = [tokenizer.spec, tokenizer.config, tokenizer.chat_template, checkpoint.eos_ids]
    return {
        "model": _digest([checkpoint.config.to_dict(), *_sampled(checkpoint)]),
        "tokenizer": _digest(says),
    }


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _sampled(checkpoint: Checkpoint) -> Iterator[str]:
    """Names, shapes and kinds of all tensors; of the last block's and the projector's, numbers."""
    last = checkpoint.config.text_config.num_hidden_layers - 1
    read = (PROJECTOR, f"language_model.model.layers.{last}.")
    for name, tensor in sorted(checkpoint.contents.tensors.items()):
        yield f"{name} {tensor.shape} {tensor.dtype}"
        if name.startswith(read):
            flat = tensor.read().reshape(-1)
            yield str(flat[:: max(1, flat.size // SAMPLE)].tolist())
