"""The processes that run one model together, as `mlx.launch` starts them: ranks 0 to size - 1.

Rank 0 reads and speaks. It tells the others in order what to do, all of them do it with the same
code, and where chance or rounding could part them, all take rank 0's token. Where memory or time
decide, rank 0 does, and tells.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import mlx.core as mx

from mlx_llava.interrupts import waiting_interrupts
from mlx_llava.model import links
from mlx_llava.version import __version__

Ended = links.Ended
T = TypeVar("T")

#: By what a launcher says that a process is one of several.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
#: What says where the ranks of a ring are, and where rank 0 is for JACCL.
HOSTFILE = "MLX_HOSTFILE"
COORDINATOR = "MLX_JACCL_COORDINATOR"
#: Where rank 0 is, if the others cannot know.
ADDRESS = "MLX_LLAVA_RANK0"
_HELLO_BYTES = 1024
LONGEST_SECONDS = 86_400
#: What follows from a rank that is gone waits so long for that to be said.
PATIENCE = 1.0
USER_ERROR = 2


class Alone:
    """One process, and what several do where it stands in their place: nothing.

    Attributes:
        rank: the number of this process.
        size: how many there are.
        leads: whether rank 0 tells the others what to do; else they know.
        group: MLX's, if there are several.
    """

    rank, size = 0, 1
    leads = False
    group: mx.distributed.Group | None = None

    @property
    def speaks(self) -> bool:
        """Whether this process reads and prints, and tells the others what to do."""
        return self.rank == 0

    def tell(self, make: Callable[[], bytes]) -> None:
        """Lets rank 0 tell all others something, which is made only where there are any."""

    def decide(self, choose: Callable[[], T]) -> T:
        """What rank 0 chooses: something of JSON."""
        return choose()

    def agreed(self, tokens: mx.array) -> mx.array:
        """Rank 0's tokens, an array."""
        return tokens

    def agreed_each(self, tokens: list[mx.array]) -> list[mx.array]:
        """Rank 0's tokens, arrays of one each, agreed on together."""
        return tokens

    @contextmanager
    def working(self) -> Iterator[None]:
        """Does what all ranks do together; Control-C waits until they have."""
        yield

    def steps(self, items: Iterator[T]) -> Iterator[T]:
        """The same items, each of which all ranks make together."""
        return items

    def read(self, tokens: int) -> None:
        """Says in the midst of working that so many tokens are to be read."""

    def fail(self, why: str) -> None:
        """Ends all ranks where one of them may have parted from the others."""


ALONE = Alone()
_met: list[Alone] = [ALONE]


class Ranks(Alone):
    """Several processes that run one model.

    Attributes:
        stream: on which the model communicates, if not on the usual one.
    """

    group: mx.distributed.Group
    stream: mx.Stream | None = None

    def __init__(self, group: mx.distributed.Group, seconds: float) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self._links = links.Links(self.rank, _connect(group, seconds), seconds)

    def tell(self, make: Callable[[], bytes]) -> None:
        if self.speaks and self.leads:
            with self.working():
                self._links.send(make())
                self._links.begin()

    def orders(self) -> Iterator[bytes]:
        """What rank 0 tells, one after the other; ends with it.

        Raises:
            Ended: Rank 0 has ended.
        """
        while True:
            order = self._links.receive()
            with self.working():
                self._links.begin()
                yield order

    def decide(self, choose: Callable[[], T]) -> T:
        if not self.speaks:
            decision: T = json.loads(self._links.receive())
            return decision
        choice = choose()
        self._links.send(json.dumps(choice).encode())
        return choice

    def agreed(self, tokens: mx.array) -> mx.array:
        self._links.work()
        own = tokens * int(self.speaks)  # the same operations everywhere, in the same order
        return mx.distributed.all_sum(own, group=self.group, stream=self.stream)

    def agreed_each(self, tokens: list[mx.array]) -> list[mx.array]:
        if not tokens:
            return []
        together = self.agreed(mx.concatenate(tokens))
        return [together[i : i + 1] for i in range(len(tokens))]

    @contextmanager
    def working(self) -> Iterator[None]:
        if self._links.works:  # it is a part of something that is done together
            yield
            return
        self._links.work()
        with waiting_interrupts():
            try:
                yield
            finally:
                self._links.rest()

    def steps(self, items: Iterator[T]) -> Iterator[T]:
        none = object()
        while True:
            with self.working():
                item = next(items, none)
            if item is none:
                return
            yield cast("T", item)

    def read(self, tokens: int) -> None:
        self._links.work(tokens)

    def fail(self, why: str) -> None:
        time.sleep(PATIENCE)
        self._links.fail(why)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Compares facts of all ranks, beside the versions of this package and MLX.

        Args:
            facts (mapping): What has to be the same everywhere; ``error`` is why there are none.

        Raises:
            ValueError: They differ, or a rank has an error.
        """
        own = {"mlx_llava": __version__, "mlx": version("mlx"), **facts}
        own["device"] = str(mx.default_device())
        if not self.speaks:
            self._links.send(json.dumps({"rank": self.rank, "facts": own}).encode())
            self._links.receive()
            return
        for _ in range(1, self.size):
            told = json.loads(self._links.receive())
            _compare(told["rank"], told["facts"], own)
        self._links.send(b"")

    def end(self, code: int, error: str = "") -> NoReturn:
        """Ends this process, and rank 0 all of them; others tell it their error."""
        if self.speaks and code in (0, USER_ERROR):  # else a step may have been left half done
            with suppress(RuntimeError), self.working():  # what was queued ahead needs all ranks
                mx.synchronize()
                mx.synchronize(mx.default_stream(mx.cpu))
        with suppress(OSError):  # who listened has gone
            sys.stdout.flush()
        self._links.end(code, error)


def _compare(rank: int, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if error := theirs.get("error"):
        raise ValueError(f"rank {rank}: {error}")
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"The {name} of rank {rank} is {theirs.get(name)}, rank 0 has {ours.get(name)}; "
                "all ranks need the same."
            )


def rank_here() -> int | None:
    """The rank that this process was given; None if it is no one's."""
    hosts = os.environ.get(HOSTFILE)
    if hosts and Path(hosts).is_file() and not Path(hosts).read_text().strip():
        return None  # which `mlx.launch` writes for one process
    given = next((os.environ[name] for name in LAUNCHED if name in os.environ), None)
    return int(given) if given and given.isdigit() else None


def met() -> Alone:
    """The ranks that this process belongs to; `ALONE` if it has met no others."""
    return _met[-1]


def meet(seconds: float) -> Alone:
    """Meets the other ranks, if a launcher says that there are any; from then on, `met`.

    Args:
        seconds (float): How long that may take, and any of them may be silent afterwards.

    Raises:
        OSError: They cannot be met.
        ValueError: The seconds make no sense.
    """
    if not 0 < seconds <= LONGEST_SECONDS:
        raise ValueError(
            f"--rank-timeout is {seconds:g}; it must be more than 0, at most {LONGEST_SECONDS}."
        )
    with _limited(seconds):
        try:
            # MLX prefers MPI, if it is installed, whoever has launched this.
            backend = "jaccl" if COORDINATOR in os.environ else "any"
            group = mx.distributed.init(backend=backend)
            if group.size() > 1:
                _met.append(Ranks(group, seconds))
        except RuntimeError as error:
            raise OSError(f"rank {rank_here()} cannot meet the others: {error}") from error
    return met()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends this process where meeting takes too long, from outside: MLX stops all its threads."""
    line = f"error: rank {rank_here()} has met no others within {seconds:g} s\\n"
    code = f"import os, select; select.select([0], [], [], {seconds})[0] or "
    code += f"(os.write(2, b'{line}'), os.kill({os.getpid()}, 9))"
    with subprocess.Popen([sys.executable, "-IS", "-c", code], stdin=subprocess.PIPE) as watch:
        try:
            yield
        finally:
            watch.kill()


def _connect(group: mx.distributed.Group, seconds: float) -> dict[int, socket.socket]:
    """The sockets between rank 0 and the others.

    Raises:
        OSError: They cannot find it.
    """
    rank, hosts = group.rank(), _hosts()
    if rank == 0:
        is_local = bool(hosts) and {*chain(*hosts)} == {"127.0.0.1"}
        listening = links.listen("127.0.0.1" if is_local else "")
        secret = secrets.token_bytes(links.SECRET_BYTES)
        hello = {"port": listening.getsockname()[1], "name": socket.gethostname()}
        said = _share(group, secret + json.dumps(hello).encode())
        with listening:
            _check_found(group, True)
            return links.accept(listening, secret, group.size(), seconds)
    said = _share(group, b"")
    secret, hello = said[: links.SECRET_BYTES], json.loads(said[links.SECRET_BYTES :])
    launcher = os.environ.get("SSH_CONNECTION", "").split(" ")[0]
    addresses = [os.environ.get(ADDRESS), *chain(*hosts[:1]), launcher, hello["name"]]
    connection = links.connect(filter(None, addresses), hello["port"], secret, rank)
    _check_found(group, connection is not None)
    assert connection is not None
    return {0: connection}


def _share(group: mx.distributed.Group, content: bytes) -> bytes:
    """What rank 0 has, on all ranks."""
    padded = content.ljust(_HELLO_BYTES, b"\0" if group.rank() else b" ")
    shared = mx.distributed.all_sum(mx.array([*padded], mx.uint8), group=group)
    return bytes(cast("list[int]", shared.tolist()))


def _check_found(group: mx.distributed.Group, found: bool) -> None:
    own = mx.arange(group.size()) == group.rank() if found else mx.zeros(group.size(), mx.bool_)
    marks = mx.distributed.all_sum(own.astype(mx.int32), group=group).tolist()
    missing = [rank for rank, mark in enumerate(cast("list[int]", marks)) if not mark]
    if missing:
        raise OSError(
            f"rank {missing[0]} cannot reach rank 0; say where it is: --env {ADDRESS}=ADDRESS"
        )


def _hosts() -> list[list[str]]:
    """The addresses of each rank that the launcher knows."""
    if coordinator := os.environ.get(COORDINATOR):
        return [[coordinator.rpartition(":")[0]]]
    file = os.environ.get(HOSTFILE)
    ranks = json.loads(Path(file).read_text()) if file else []
    return [[address.rpartition(":")[0] for address in addresses] for addresses in ranks]
