"""Kill a rank of a server at random points, again and again: nothing may be left of the others.

python scripts/kill_ranks.py                       # 20 times, one of two ranks

Each time the command `mlx_llava.server` starts anew on several ranks of this machine, clients
ask, and after a random time, from its very start on, one rank gets SIGKILL. Prints a line of JSON;
exits 1 where a process or the port is left after the deadline, or an exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from typing import Any

from served import environments

BODY = {
    "model": "tiny-llava",
    "messages": [{"role": "user", "content": "Describe the picture."}],
    "max_tokens": 400,
}


#: A rank that has not started yet counts from then on.
START_SECONDS = 5


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


def ask_on(port: int, until: threading.Event) -> None:
    """Asks until the server is gone."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(
        url, json.dumps(BODY).encode(), {"Content-Type": "application/json"}
    )
    while not until.is_set():
        with suppress(OSError), urllib.request.urlopen(request, timeout=60) as reply:
            reply.read()
        time.sleep(0.05)


def run(size: int, deadline: float, random_: random.Random) -> dict[str, Any]:
    """Starts a server, kills a rank, and sees what is left."""
    port, over = free_port(), threading.Event()
    command = [sys.executable, "-m", "mlx_llava.server", "--port", str(port)]
    command += ["--rank-timeout", str(deadline)]
    with environments(size) as found:
        ranks = [
            subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)
            for env in found
        ]
        clients = [threading.Thread(target=ask_on, args=(port, over)) for _ in range(3)]
        for client in clients:
            client.start()
        after, victim = random_.uniform(0, 8), random_.randrange(size)
        time.sleep(after)
        ranks[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        try:
            said = [rank.communicate(timeout=deadline + 40)[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            said = ["hangs"]
        seconds = time.monotonic() - killed
        for rank in ranks:
            rank.kill()
        over.set()
        for client in clients:
            client.join()
    errors = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    with socket.socket() as probe:
        is_open = probe.connect_ex(("127.0.0.1", port)) == 0
    codes = [rank.wait() for rank in ranks]
    return {
        "after": round(after, 2),
        "killed": victim,
        "seconds": round(seconds, 2),
        "codes": codes,
        "said": errors,
        "fails": is_open or 0 in codes or said == ["hangs"] or seconds > deadline + START_SECONDS,
    }


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank-timeout", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random_ = random.Random(args.seed)
    failed = 0
    for _ in range(args.times):
        found = run(args.ranks, args.rank_timeout, random_)
        failed += found["fails"]
        print(json.dumps(found), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
