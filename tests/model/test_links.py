"""What rank 0 and the others have between them: frames, and nobody else."""

from __future__ import annotations

import queue
import socket
import threading
import time

import pytest

from mlx_llava.model import links

SECRET = b"s" * links.SECRET_BYTES


def test_strangers_are_turned_away():
    """With another secret, in silence, saying too little, and with a number that is taken."""
    with links.listen("127.0.0.1") as listening:
        port = listening.getsockname()[1]
        found: dict[int, socket.socket] = {}
        thread = threading.Thread(
            target=lambda: found.update(links.accept(listening, SECRET, 3, seconds=20))
        )
        thread.start()
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
        strangers = [links.connect(["127.0.0.1"], port, bytes(len(SECRET)), 1)]
        strangers.append(socket.create_connection(("127.0.0.1", port)))
        strangers[-1].sendall(SECRET[:5])
        strangers[-1].shutdown(socket.SHUT_WR)
        ranks = [links.connect(["127.0.0.1"], port, SECRET, 1)]
        strangers.append(links.connect(["127.0.0.1"], port, SECRET, 1))
        ranks.append(links.connect(["127.0.0.1"], port, SECRET, 2))
        thread.join(5)
        assert sorted(found) == [1, 2]
        strangers += silent
        for one in strangers:
            one.settimeout(5)
            assert not one.recv(1)
        for one in (*strangers, *ranks, *found.values()):
            one.close()


def test_rank_0_is_found_at_the_first_address_where_it_is():
    with links.listen("127.0.0.1") as listening:
        port = listening.getsockname()[1]
        with links.connect(["127.0.0.2", "127.0.0.1"], port, SECRET, 1):
            connection, _ = listening.accept()
            connection.close()
    assert links.connect(["127.0.0.1"], port, SECRET, 1) is None


@pytest.fixture
def pair():
    """Rank 0 and rank 1, each with its thread."""
    with links.listen("127.0.0.1") as listening:
        address = listening.getsockname()
        theirs = socket.create_connection(address)
        ours, _ = listening.accept()
    return links.Links(0, {1: ours}), links.Links(1, {0: theirs})


def test_messages_come_in_order_whatever_their_size(pair):
    first, second = pair
    messages = [b"", b"x", bytes(5_000_000), *(str(i).encode() for i in range(100))]
    thread = threading.Thread(target=lambda: [first.send(one) for one in messages])
    thread.start()
    assert [second.receive() for _ in messages] == messages
    thread.join()
    second.send(b"and back")
    assert first.receive() == b"and back"


def test_a_rank_that_waits_for_what_was_told_before_hangs(pair, monkeypatch):
    """As where it alone could not do what rank 0 does, whatever each counts within that."""
    first, second = pair
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    for one in pair:
        one.seconds = 5.0
        monkeypatch.setattr(one, "fail", said.put)
    for _ in range(3):
        second.begin()
        second.work()
        second.rest()
        first.begin()
    first.work()
    first._due = 0.0
    with pytest.raises(queue.Empty):  # it may be slow
        said.get(timeout=1.2)
    threading.Thread(target=second.receive, daemon=True).start()
    first.work()
    first._due = 0.0
    why = said.get(timeout=20)
    first.rest()
    assert why == "rank 1 hangs: no step has ended for 5 s (--rank-timeout)"
    for one in pair:
        one.seconds = links.SECONDS


def test_what_takes_long_for_its_tokens_is_not_overdue(pair):
    """The deadline is for 256 tokens, and never comes nearer."""
    one, _ = pair
    now = time.monotonic()
    one.work(tokens=1024)
    one.work()
    assert one._due - now == pytest.approx(4 * one.seconds, abs=1)
