"""Plain sockets between rank 0 and each other rank: what it says, and signs of life of all.

They stand beside `mx.distributed`, which waits for ever for a rank that is gone or hangs, with a
core at its full speed (its backends poll). What crosses here is bytes in frames, which nothing
executes; who connects has to know a secret that only ranks can have.
"""

from __future__ import annotations

import hmac
import json
import os
import queue
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import NoReturn, cast

#: A rank that is silent for so long, or in which nothing moves, ends all of them.
SECONDS = 30.0
FAILED = 1
#: So long a rank may take to end when it is told.
GRACE_SECONDS = 2.0
#: Between signs of life at most, and how many there are within the deadline at least.
BEAT_SECONDS, BEATS = 1.0, 10
#: So many tokens are read within the deadline on any machine that is worth it.
TOKENS = 256
SECRET_BYTES = 32
#: What a frame is, and how many bytes follow.
_HEAD = struct.Struct(">cQ")
_BEAT, _MESSAGE, _END = b"b", b"m", b"e"
#: How far a rank has come, and whether it is overdue, or waits.
_LIFE = struct.Struct(">Q?")
#: What rank 0 tells is done in fewer steps than these.
_PULSES = 1 << 32


class Ended(BaseException):
    """Rank 0 has ended, and so does this one."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Link:
    """One connection, and what is known of the rank at its other end."""

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self.rank, self.socket = rank, connection
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.seen = time.monotonic()
        self.pulses, self.is_overdue = 0, False
        self._lock = threading.Lock()
        self._received = bytearray()

    def send(self, kind: bytes, content: bytes) -> None:
        with self._lock:
            self.socket.sendall(_HEAD.pack(kind, len(content)) + content)

    def beat(self, life: bytes) -> None:
        """Gives a sign of life, unless something is being sent, which is one."""
        if self._lock.acquire(blocking=False):
            try:
                self.socket.send(_HEAD.pack(_BEAT, len(life)) + life, socket.MSG_DONTWAIT)
            except BlockingIOError:  # it does not read; its silence will tell
                pass
            finally:
                self._lock.release()

    def receive(self) -> Iterable[tuple[bytes, bytes]]:
        """The frames that are whole; raises ConnectionError where the other rank is gone."""
        part = self.socket.recv(1 << 20)
        if not part:
            raise ConnectionResetError
        self.seen = time.monotonic()
        self._received += part
        frames = []
        while len(self._received) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._received)
            end = _HEAD.size + length
            if len(self._received) < end:
                break
            frames.append((kind, bytes(self._received[_HEAD.size : end])))
            del self._received[:end]
        return frames


class Links:
    """What one rank has to the others: rank 0 to all of them, each of them to rank 0.

    A thread gives and takes signs of life. Where a rank is gone, is silent for longer than
    `seconds`, or where nothing moves in any of them for so long, it ends the process with one
    line; and with it, all of them.

    Attributes:
        seconds: the deadline.
        works: whether this rank does something that has to end within it, and
        waits: whether it has nothing to do until another says something.
    """

    def __init__(
        self, rank: int, sockets: Mapping[int, socket.socket], seconds: float = SECONDS
    ) -> None:
        self.rank, self.seconds = rank, seconds
        self._links = [_Link(other, one) for other, one in sockets.items()]
        self._inbox: queue.SimpleQueue[bytes | int] = queue.SimpleQueue()
        self._parent = os.getppid()
        self._pulses, self._due, self.works, self.waits = 0, 0.0, False, False
        self._ending = threading.Lock()
        self._told: int | None = None
        self._alone = threading.Event()
        self._selector = selectors.DefaultSelector()
        for link in self._links:
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        threading.Thread(target=self._watch, name="mlx_llava ranks", daemon=True).start()

    def send(self, message: bytes) -> None:
        """Says something to all others, in order."""
        for link in self._links:
            try:
                link.send(_MESSAGE, message)
            except OSError:
                self.fail(f"rank {link.rank} has ended")

    def receive(self) -> bytes:
        """The next that another has said.

        Raises:
            Ended: Rank 0 has ended.
        """
        self.waits = True
        message = self._inbox.get()
        self.waits = False
        if isinstance(message, int):
            raise Ended(message)
        return message

    def begin(self) -> None:
        """Begins what rank 0 has told, after which all have come as far."""
        self._pulses = (self._pulses // _PULSES + 1) * _PULSES

    def work(self, tokens: int = 1) -> None:
        """Begins, or goes on with, what takes longer the more tokens it reads."""
        self._pulses += 1
        self._due = max(self._due, time.monotonic() + self.seconds * max(1, tokens / TOKENS))
        self.works = True

    def rest(self) -> None:
        """Has nothing to do, for however long."""
        self.works = False

    def end(self, code: int, error: str = "") -> NoReturn:
        """Ends this process; rank 0 ends all others with it, and they tell it why, if they err."""
        if self.rank and not error:
            self._await_end()
        if self._ending.acquire(blocking=False):
            self._say_end(code, error)
            self._alone.wait(2 * GRACE_SECONDS)
        elif self._told is None:
            time.sleep(GRACE_SECONDS)  # another thread is about to say why
        os._exit(code if self._told is None else self._told)

    def _await_end(self) -> None:
        with suppress(Ended):
            while self._told is None:
                self.receive()

    def _say_end(self, code: int, error: str) -> None:
        for link in self._links:
            try:
                link.socket.settimeout(GRACE_SECONDS)
                link.send(_END, json.dumps({"code": code, "error": error}).encode())
                link.socket.shutdown(socket.SHUT_WR)
            except OSError:
                continue

    def fail(self, why: str, code: int = FAILED) -> None:
        """Ends this process from whatever thread, with one line, unless it is ending."""
        if self._ending.acquire(blocking=False):
            with suppress(OSError):  # who listened has gone
                # In one write: MLX writes there too, and may come between a line and its end.
                print(f"error: {why}\n", end="", file=sys.__stderr__, flush=True)
            self._say_end(code, why)
            os._exit(code)

    def _watch(self) -> None:
        last = 0.0
        while True:
            every = min(BEAT_SECONDS, self.seconds / BEATS)
            for key, _ in self._selector.select(every):
                self._read(key.data)
            now = time.monotonic()
            if now - last >= every:
                last = now
                self._beat(now)
                self._judge(now)

    def _read(self, link: _Link) -> None:
        try:
            for kind, content in link.receive():
                if kind == _MESSAGE:
                    self._inbox.put(content)
                elif kind == _END:
                    self._take_end(link, **json.loads(content))
                else:
                    link.pulses, link.is_overdue = _LIFE.unpack(content)
        except OSError:
            self._selector.unregister(link.socket)
            if not self._selector.get_map():
                self._alone.set()
            self.fail(f"rank {link.rank} has ended")

    def _take_end(self, link: _Link, code: int, error: str) -> None:
        if self.rank == 0:
            self.fail(f"rank {link.rank}: {error}", code)
        elif self._ending.acquire(blocking=False):
            self._told = code
            self._inbox.put(code)  # the thread that works ends in order, if it comes to it
            timer = threading.Timer(GRACE_SECONDS, os._exit, [code])
            timer.daemon = True
            timer.start()

    def _beat(self, now: float) -> None:
        is_overdue = self.waits or self._is_overdue(now)
        for link in self._links:
            try:
                link.beat(_LIFE.pack(self._pulses, is_overdue))
            except OSError:
                continue  # its end will be read

    def _is_overdue(self, now: float) -> bool:
        return self.works and now > self._due

    def _judge(self, now: float) -> None:
        if os.getppid() != self._parent:
            self.fail("what started the ranks has ended")
        for link in self._links:
            if now - link.seen > self.seconds:
                self.fail(f"rank {link.rank} has been silent for {self.seconds:g} s")
        overdue = [link.is_overdue for link in self._links]
        if self.rank == 0 and self._is_overdue(now) and all(overdue):
            pulses = {0: self._pulses, **{link.rank: link.pulses for link in self._links}}
            behind = [rank for rank, n in pulses.items() if n < max(pulses.values())]
            who = f"rank {behind[0]} hangs" if behind else "a rank hangs, or each waits for another"
            self.fail(f"{who}: no step has ended for {self.seconds:g} s (--rank-timeout)")


def listen(host: str) -> socket.socket:
    """Where the other ranks find rank 0, on any port."""
    return socket.create_server((host, 0), backlog=64)


def connect(addresses: Iterable[str], port: int, secret: bytes, rank: int) -> socket.socket | None:
    """Finds rank 0 at the first of some addresses where it is."""
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), timeout=3)
            connection.sendall(secret + bytes([rank]))
        except OSError:
            continue
        return connection
    return None


def accept(
    listening: socket.socket, secret: bytes, size: int, seconds: float
) -> dict[int, socket.socket]:
    """The connections of all other ranks; of anybody else, none, and nobody is waited for.

    Raises:
        TimeoutError: They do not come.
    """
    found: dict[int, socket.socket] = {}
    end = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector, ExitStack() as strangers:
        selector.register(listening, selectors.EVENT_READ)
        while len(found) < size - 1:
            ready = selector.select(max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{size - 1 - len(found)} ranks have not come to rank 0")
            for key, _ in ready:
                if key.fileobj is listening:
                    connection, _ = listening.accept()
                    connection.setblocking(False)
                    strangers.enter_context(connection)
                    selector.register(connection, selectors.EVENT_READ, bytearray())
                    continue
                connection = cast("socket.socket", key.fileobj)
                if not _has_said(connection, key.data, len(secret) + 1):
                    continue
                selector.unregister(connection)
                told, rank = key.data[:-1], [*key.data[-1:]]
                if hmac.compare_digest(told, secret) and rank[0] not in found:
                    found[rank[0]] = connection.dup()
                connection.close()
    return found


def _has_said(connection: socket.socket, told: bytearray, length: int) -> bool:
    """Reads on; whether it has said so much, or will say no more."""
    try:
        part = connection.recv(length - len(told))
    except OSError:
        part = b""
    told += part
    return not part or len(told) == length
