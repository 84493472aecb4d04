"""Several processes of this machine that run one model, as `mlx.launch` would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from served import environments


@dataclass(frozen=True)
class Finished:
    """How a rank has ended, and what it said."""

    code: int
    out: str
    err: str


class Ranks(list["subprocess.Popen[str]"]):
    """Processes that run."""

    def finish(self, said: str = "", seconds: float = 60) -> list[Finished]:
        """What becomes of each, where rank 0 is told something on its standard input."""
        found = []
        for process in self:
            out, err = process.communicate(said if process is self[0] else None, timeout=seconds)
            found.append(Finished(process.returncode, out, err))
        return found


@contextmanager
def launched(
    *command: str, size: int = 2, others: Sequence[str] | None = None, elsewhere: Path | None = None
) -> Iterator[Ranks]:
    """Starts ranks; what is left of them at the end is killed.

    Args:
        *command: What Python runs.
        size: How many there are.
        others: What all but rank 0 run instead.
        elsewhere: The folder in which they do.
    """
    with environments(size) as found, ExitStack() as stack:
        ranks = Ranks()
        for rank, env in enumerate(found):
            process = subprocess.Popen(
                [sys.executable, *(others if rank and others is not None else command)],
                env={**os.environ, "PYTHONPATH": str(ROOT), **env},
                cwd=elsewhere if rank else None,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            ranks.append(process)
            stack.callback(process.communicate)
            stack.callback(process.kill)
        yield ranks
