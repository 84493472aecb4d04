"""Run `mlx_llava.server` in a process of its own, for other scripts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
def environments(size: int) -> Iterator[list[dict[str, str]]]:
    """What tells so many processes of this machine that they are ranks, as `mlx.launch` does."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bind = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(size)]
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{one.getsockname()[1]}"] for one in bind]))
        stack.pop_all().close()
        yield [{"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} for rank in range(size)]


@contextmanager
def ranked(command: list[str], size: int) -> Iterator[dict[str, str]]:
    """Runs a command's ranks but the first; gives what is to be the environment of that."""
    if size == 1:
        yield {}
        return
    with environments(size) as (first, *others), ExitStack() as stack:
        for one in others:
            stack.enter_context(subprocess.Popen(command, env={**os.environ, **one}))
        yield first


@contextmanager
def served(*arguments: str, env: dict[str, str] | None = None, ranks: int = 1) -> Iterator[Served]:
    """The command on a free port, until the block ends; then it is interrupted.

    Args:
        *arguments: Of the command.
        env: The environment, instead of this process's own.
        ranks: How many processes run it together.
    """
    command = [sys.executable, "-m", "mlx_llava.server", *arguments, "--port", "0"]
    with ExitStack() as stack:
        more = stack.enter_context(ranked(command, ranks))
        options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True}
        process = stack.enter_context(
            subprocess.Popen(command, env={**(env or os.environ), **more}, **options)
        )
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
