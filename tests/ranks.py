"""Several processes of this machine that run one model, as `mlx.launch` would start them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.conftest import ROOT


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def launched(
    *command: str, size: int = 2, others: Sequence[str] | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """The ranks, all with one command or all but rank 0 with another; what is left is killed."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_HOSTFILE": str(hosts)}
        ranks = []
        for rank in range(size):
            process = subprocess.Popen(
                [sys.executable, *(others if rank and others is not None else command)],
                env={**env, "MLX_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            ranks.append(process)
            stack.callback(process.communicate)
            stack.callback(process.kill)
        yield ranks


def finish(ranks: Sequence[subprocess.Popen[str]], said: str = "") -> list[tuple[int, str, str]]:
    """The exit code, output and errors of each rank, when rank 0 has been told what to say."""
    found = []
    for process in ranks:
        out, err = process.communicate(said if process is ranks[0] else None, timeout=60)
        found.append((process.returncode, out, err))
    return found
