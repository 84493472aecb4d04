"""Run `mlx_llava.server` in a process of its own, for other scripts."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Served:
    """A running server; `log` is complete when it has ended.

    Attributes:
        url: where it listens.
        pid: its process.
        log: what it printed.
    """

    url: str
    pid: int
    log: str = ""


@contextmanager
def served(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """The command on a free port, until the block ends; then it is interrupted.

    Args:
        *arguments: Of the command.
        env: The environment, instead of this process's own.
    """
    command = [sys.executable, "-m", "mlx_llava.server", *arguments, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        line = next((line for line in process.stderr if line.startswith("page: ")), None)
        if line is None:
            raise RuntimeError(f"{' '.join(command)} does not start.")
        running = Served(url=line.split()[1], pid=process.pid)
        with ThreadPoolExecutor(1) as pool:
            rest = pool.submit(process.stderr.read)  # a full pipe would stop the server
            try:
                yield running
            finally:
                process.send_signal(signal.SIGINT)
                running.log = rest.result()
