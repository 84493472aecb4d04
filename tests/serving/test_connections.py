"""Connections that are idle, half-closed, cut off or not HTTP's, each beside an honest request."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from mlx_llava.serving import app as api
from mlx_llava.serving import http as connection
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.forms import MAX_BRACKETS, MAX_COMMAS, MAX_TEXTS, read_form, read_json
from mlx_llava.serving.openai_chat import ChatRequest
from tests.servers import MODEL, endless, receive, serving, user, waits_until


@pytest.fixture(autouse=True)
def still_works(served):
    """After everything, an honest request is answered."""
    yield
    assert ask(served).status_code == 200
    assert waits_until(lambda: served.engine.taken == 0)


def ask(served, **options):
    return served.post(**{"messages": [user("Hi")], "max_tokens": 2, **options})


def request(**options):
    """A chat's bytes on the wire."""
    options = {"max_tokens": 2, **options}
    body = json.dumps({"model": MODEL, "messages": [user("Hi")], **options}).encode()
    return head(len(body)) + body


def head(length):
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


NO_CHUNK = head(5).replace(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"zz\r\n"


def connect(served):
    return socket.create_connection(("127.0.0.1", served.port), 60)


def exactly(connection, size):
    content = b""
    while len(content) < size:
        content += connection.recv(size - len(content))
    return content


def parsed(answer):
    """Status and body of one answer."""
    top, _, body = answer.partition(b"\r\n\r\n")
    status, *headers = top.decode().split("\r\n")
    assert status.startswith("HTTP/1.1 ")
    if "transfer-encoding: chunked" in headers:
        parts = body.split(b"\r\n")
        assert parts[-3] == b"0"
        body = b"".join(parts[1::2])
    return int(status.split()[1]), body


def error_of(answer, status):
    found, body = parsed(answer)
    assert found == status
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


class TestNoHttp:
    @pytest.mark.parametrize(
        "content",
        [
            b"hello\r\n\r\n",
            b"GET /\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000,
            head(0)[:-2] + b"Transfer-Encoding: gzip\r\n\r\n",
            NO_CHUNK,
        ],
        ids=lambda content: repr(content[:24]),
    )
    def test_is_refused_in_openais_shape(self, served, content):
        with connect(served) as sending:
            sending.sendall(content)
            assert "HTTP" in error_of(receive(sending), 400)

    def test_after_a_good_request_too(self, served):
        with connect(served) as sending:
            sending.sendall(request() + b"nonsense\r\n\r\n")
            answers = receive(sending)
        good, bad = answers.split(b"HTTP/1.1 400 Bad Request", 1)
        assert parsed(good)[0] == 200
        assert error_of(b"HTTP/1.1 400 Bad Request" + bad, 400)


class TestHalfClosed:
    @pytest.mark.parametrize("stream", [False, True])
    def test_is_answered(self, served, stream):
        with connect(served) as sending:
            sending.sendall(request(stream=stream))
            sending.shutdown(socket.SHUT_WR)
            status, body = parsed(receive(sending))
        assert status == 200
        assert (b"[DONE]" in body) is stream
        assert stream or json.loads(body)["choices"]

    def test_all_requests_of_a_pipeline_are_answered(self, served):
        with connect(served) as sending:
            sending.sendall(request() * 3)
            sending.shutdown(socket.SHUT_WR)
            answers = receive(sending)
        assert answers.count(b"HTTP/1.1 200 OK\r\n") == answers.count(b'"choices"') == 3

    @pytest.mark.parametrize("options", [{}, {"n": 0}])
    def test_waits_as_long_as_the_answer_takes(self, served, monkeypatch, options):
        """Letters that were written to see if it is there are a part of what it gets."""
        monkeypatch.setattr(connection, "PROBE_SECONDS", 0.01)
        held = hold(monkeypatch, b'"Hi"')
        with connect(served) as sending:
            sending.sendall(request(**options))
            sending.shutdown(socket.SHUT_WR)
            held.reached.wait(60)
            begun = exactly(sending, 9)
            held.go.set()
            status, _ = parsed(begun + receive(sending))
        assert begun == b"HTTP/1.1 "
        assert status == (400 if options else 200)

    def test_that_is_gone_is_noticed(self, served, monkeypatch):
        monkeypatch.setattr(connection, "PROBE_SECONDS", 0.01)
        with connect(served) as going:
            going.sendall(request(**endless()))
            assert waits_until(lambda: served.engine.running == 1)
        assert waits_until(lambda: served.engine.taken == 0)

    @pytest.mark.parametrize("content", [b"", b"GET /health HT", head(100) + b"{"])
    def test_without_a_whole_request_is_closed(self, served, content):
        with connect(served) as sending:
            sending.sendall(content)
            sending.shutdown(socket.SHUT_WR)
            assert receive(sending) == b""


class Held:
    """Requests that are being read until they may go on."""

    def __init__(self):
        self.reached, self.go = threading.Event(), threading.Event()


def hold(monkeypatch, words):
    """Holds the reading of every body with these words."""
    held = Held()

    def reading(body, kind):
        if words in body:
            held.reached.set()
            assert held.go.wait(60)
        return read_form(body, kind)

    monkeypatch.setattr(api, "read_form", reading)
    return held


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_takes_longer_than_its_head(served, monkeypatch, stream):
    """Only who has not asked is closed; that is looked up where it would take seconds to see."""
    held = hold(monkeypatch, b'"Hi"')
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, served, stream=stream)
        assert held.reached.wait(60)
        (asking,) = [c for c in served.server.server_state.connections if not c.asks_for_nothing]
        assert asking._late is None
        held.go.set()
        assert asked.result(60).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        head(10**12) + b"{",
        NO_CHUNK,
    ],
    ids=["too long", "no chunk"],
)
def test_who_is_answered_early_does_not_hold_up_the_end(content, served, monkeypatch):
    cut = []

    async def cut_off(self):
        cut.append(self)

    monkeypatch.setattr(connection.HttpServer, "_cut_off", cut_off)
    monkeypatch.setattr(connection, "LINGER_SECONDS", 600)
    with contextlib.ExitStack() as all, serving("--timeout", "10", engine=served.engine) as ending:
        sending = all.enter_context(connect(ending))
        sending.sendall(content)
        assert receive(sending).startswith(b"HTTP/1.1 4")
        assert waits_until(lambda: not ending.server.server_state.tasks)
    assert not cut


class TestManyConnections:
    LIMIT = 12

    @pytest.fixture(autouse=True)
    def few(self, monkeypatch):
        monkeypatch.setattr(connection, "CONNECTIONS", self.LIMIT)

    @pytest.mark.parametrize("content", [b"", b"GET / HTTP/1.1\r\n", head(100) + b"{"])
    def test_an_idle_one_gives_way(self, served, content):
        with contextlib.ExitStack() as all:
            idle = [all.enter_context(connect(served)) for _ in range(2 * self.LIMIT)]
            for sending in idle:
                with contextlib.suppress(OSError):
                    sending.sendall(content)
            for _ in range(3):
                assert ask(served).status_code == 200
                assert httpx.get(served.url + "/health", timeout=60).status_code == 200
            assert receive(idle[0]) == b""

    def test_one_that_is_answered_early_gives_way(self, served, monkeypatch):
        """However long it might send what nobody reads."""
        monkeypatch.setattr(connection, "LINGER_SECONDS", 600)
        early = []

        def is_closed(sending):
            try:
                sending.sendall(b"{")
            except OSError:
                return True
            return False

        with contextlib.ExitStack() as all:
            for _ in range(2 * self.LIMIT):
                early.append(all.enter_context(connect(served)))
                early[-1].sendall(head(10**12) + b"{")
                assert receive(early[-1]).startswith(b"HTTP/1.1 413")
            assert waits_until(lambda: is_closed(early[0]))
            assert not is_closed(early[-1])

    def test_one_that_has_just_come_outlasts_slow_bodies(self, served, monkeypatch):
        monkeypatch.setattr(connection, "NEW_SECONDS", 60)
        with contextlib.ExitStack() as all:
            slow = [all.enter_context(connect(served)) for _ in range(self.LIMIT)]
            for sending in slow:
                sending.sendall(head(100) + b"{")
            assert httpx.get(served.url + "/health", timeout=60).status_code == 200
            honest = all.enter_context(connect(served))
            for _ in range(2):
                all.enter_context(connect(served))
            assert httpx.get(served.url + "/health", timeout=60).status_code == 200
            honest.sendall(request())
            assert honest.recv(12) == b"HTTP/1.1 200"

    def test_one_that_asks_is_kept(self, served):
        with contextlib.ExitStack() as all:
            sending = all.enter_context(connect(served))
            sending.sendall(request(stream=True, **endless()))
            first = sending.recv(1)
            for _ in range(2 * self.LIMIT):
                all.enter_context(connect(served))
            assert ask(served).status_code == 200
            assert served.engine.taken == 1
            assert first + exactly(sending, 8) == b"HTTP/1.1 "

    def test_where_all_are_answered_a_new_one_is_told_so(self, served, monkeypatch):
        held = hold(monkeypatch, b'"Hi"')
        with ThreadPoolExecutor(self.LIMIT) as pool:
            asked = [pool.submit(ask, served) for _ in range(self.LIMIT)]
            state = served.server.server_state
            assert waits_until(lambda: len(state.tasks) == self.LIMIT)
            reply = httpx.get(served.url + "/health", timeout=60)
            held.go.set()
            assert {future.result(60).status_code for future in asked} == {200}
        assert reply.status_code == 429
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        assert reply.headers["connection"] == "close"


class TestBodies:
    def in_chunks_of_one(self, content):
        top, body = b"\r\n".join(head(0).split(b"\r\n")[:-3]), content
        chunks = b"".join(b"1\r\n%c\r\n" % letter for letter in body)
        top += b"\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        return top + chunks + b"0\r\n\r\n"

    def test_a_letter_at_a_time_is_read(self, served):
        body = request().partition(b"\r\n\r\n")[2]
        assert served.raw(self.in_chunks_of_one(body)).startswith(b"HTTP/1.1 200")

    def test_very_many_letters_at_a_time_are_not(self, served):
        answer = served.raw(self.in_chunks_of_one(b" " * (connection.SHORT_PARTS + 200)))
        error_of(answer, 400)

    def test_very_many_parts_that_are_not_short_are_read(self):
        reader = connection._Counted(connection.h11.SERVER)
        reader.receive_data(head(10**7))
        reader.next_event()
        for _ in range(2 * connection.SHORT_PARTS):
            reader.receive_data(bytes(connection.PART_BYTES))
            assert len(reader.next_event().data) == connection.PART_BYTES

    def test_others_are_answered_while_one_is_read(self, served, monkeypatch):
        held = hold(monkeypatch, b"heavy")
        with ThreadPoolExecutor(1) as pool:
            heavy = pool.submit(ask, served, messages=[user("heavy")])
            assert held.reached.wait(60)
            assert httpx.get(served.url + "/health", timeout=60).status_code == 200
            assert ask(served).status_code == 200
            assert not heavy.done()
            held.go.set()
            assert heavy.result(60).status_code == 200

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b"{" + b'"0":1,' * 3_000_000 + b'"1":1}', "texts"),
            (b'{"messages":[' + b'"",' * 200_000 + b'""]}', "texts"),
            (b'{"user":[' + b"1," * 2_000_000 + b"1]}", "commas"),
            (b'{"user":[' + b"[[[[]]]]," * 200_000 + b"1]}", "brackets"),
            (b'{"user":[' + b"{}," * 200_000 + b"1]}", "brackets"),
            (rb'{"a":"' + rb'\\","b":"' * 200_000 + b'"}', "texts"),
        ],
        ids=["keys", "texts", "numbers", "lists", "objects", "backslashes"],
    )
    def test_of_more_values_than_any_request_needs(self, body, words):
        with pytest.raises(ApiError, match=f"{words}; the limit is") as caught:
            read_json(body)
        assert (caught.value.status, caught.value.body()["error"]["code"]) == (
            400,
            "request_too_complex",
        )

    def test_as_rich_as_honest_ones_are_read(self):
        """Long texts of code and tables, long conversations, many tools, many pictures."""
        schema = {f"p{i}": {"type": "string", "enum": ["a", "b"]} for i in range(20)}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        url = "data:image/png;base64," + "A" * 100_000
        picture = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
        said = {"role": "assistant", "content": 'print("[{}]", x) ' * 100}
        messages = [said, {"role": "user", "content": [picture]}] * 100
        table = {"role": "user", "content": '"1","2",[3]\\\n' * 60_000}
        body = {"model": MODEL, "messages": [*messages, table], "tools": [tool] * 200}
        assert len(read_form(json.dumps(body).encode(), ChatRequest).messages) == 201

    def test_limits_are_far_above_the_longest_conversation(self):
        messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * 1000
        body = json.dumps({"model": MODEL, "messages": messages})
        assert body.count('"') // 2 < MAX_TEXTS / 10
        assert body.count(",") < MAX_COMMAS / 10
        assert body.count("[") + body.count("{") < MAX_BRACKETS / 10


def test_a_second_control_c_tells_everyone_and_ends_quietly(caplog):
    """Streams, whole answers, those that wait, bodies that do not come, idle ones."""
    with (
        caplog.at_level(logging.INFO),
        serving("--batch-size", "1") as ending,
        contextlib.ExitStack() as all,
    ):
        stream = all.enter_context(connect(ending))
        stream.sendall(request(stream=True, **endless()))
        assert exactly(stream, 9) == b"HTTP/1.1 "
        whole = [all.enter_context(connect(ending)) for _ in range(6)]
        for sending in whole:
            sending.sendall(request(**endless()))
        silent = [all.enter_context(connect(ending)) for _ in range(2)]
        silent[0].sendall(head(100) + b"{")
        assert waits_until(lambda: ending.engine.taken == 7)
        ending.server.should_exit = ending.server.force_exit = True
        _, body = parsed(b"HTTP/1.1 " + receive(stream))
        assert b"The server is ending." in body
        assert b"[DONE]" not in body
        for sending in whole:
            assert error_of(receive(sending), 503) == "The server is ending."
        for sending in silent:
            assert receive(sending) == b""
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
