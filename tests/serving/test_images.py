"""Whatever strangers do with pictures, memory is bounded, and honest questions do not wait."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.image import png
from mlx_llava.serving import images
from mlx_llava.serving.openai_chat import ChatRequest
from mlx_llava.serving.requests import Request
from mlx_llava.serving.workers import Workers
from tests.inputs.test_image_files import OTHERS, flood, scan_bomb
from tests.servers import MODEL, serving, user, waits_until
from tests.serving.test_attacks import chat, named, refused, resident_mb
from tests.sites import Site

PICTURE = Image.new("RGB", (8, 8), "red")
PATIENCE = 60


class HeldDecoding:
    """Decodes pictures, and keeps each large one until it is told to go on."""

    def __init__(self, monkeypatch):
        self.go_on = threading.Event()
        self.begun = self.running = self.most = self.from_side = 0
        self._decode, self._lock = images.load_image, threading.Lock()
        monkeypatch.setattr(images, "load_image", self)

    def __call__(self, *args):
        image = self._decode(*args)
        if max(image.size) < self.from_side:
            return image
        with self._lock:
            self.begun, self.running = self.begun + 1, self.running + 1
            self.most = max(self.most, self.running)
        try:
            assert self.go_on.wait(PATIENCE)
            return image
        finally:
            with self._lock:
                self.running -= 1


@pytest.fixture
def decoding(monkeypatch):
    held = HeldDecoding(monkeypatch)
    yield held
    held.go_on.set()
    assert waits_until(lambda: not held.running)


def ask_and_leave(served, message, when):
    """A client that goes as soon as something is so."""
    body = json.dumps({"model": MODEL, "messages": [message]}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), PATIENCE) as connection:
        connection.sendall(head.encode() + body)
        assert waits_until(when)
    assert waits_until(lambda: served.engine.taken == 0)


def progressive(side) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "blue").save(buffer, "JPEG", progressive=True)
    return url_of(buffer.getvalue())


def url_of(content: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def test_clients_that_leave_do_not_make_room_for_another_decoder(served, decoding):
    """Six times 25 MP, each given up: one decoder runs, and memory holds one picture.

    A small picture does not wait for it.
    """
    before = resident_mb()
    decoding.from_side = 1000
    message = named(progressive(5000))
    ask_and_leave(served, message, lambda: decoding.running == 1)
    for _ in range(5):
        ask_and_leave(served, message, lambda: served.engine.taken == 1)
    assert (decoding.begun, decoding.running) == (1, 1)
    assert resident_mb() < before + 450
    assert chat(served, [user(PICTURE, "What?")], max_tokens=1).status_code == 200
    with ThreadPoolExecutor() as pool:
        large = pool.submit(chat, served, [message], max_tokens=1)
        assert waits_until(lambda: served.engine.taken == 1)
        assert (decoding.begun, decoding.running) == (1, 1)
        decoding.go_on.set()
        assert large.result().status_code == 200
    assert (decoding.begun, decoding.most) == (2, 1)


def test_a_request_that_fails_holds_nothing(served):
    """Neither its pictures nor its body wait for Python to look for circles."""
    picture = Image.new("RGB", (1234, 777))
    cut = png(Image.effect_noise((64, 64), 50))[:1000]
    message = user("What?", picture)
    message["content"] += named(url_of(cut))["content"]

    def held():
        return [
            o
            for o in gc.get_objects()
            if issubclass(type(o), (ChatRequest, Request))
            or (issubclass(type(o), Image.Image) and o.size == picture.size)
        ]

    gc.collect()
    before = len(held())
    gc.disable()
    try:
        refused(chat(served, [message]), 400, "broken image")
        refused(chat(served, [user(picture, "a b " * 1000)]), 400, "tokens")
        assert waits_until(lambda: len(held()) == before)
    finally:
        gc.enable()


def test_work_that_fails_when_its_asker_has_gone_is_not_logged():
    fails, told = threading.Event(), []

    def work():
        assert fails.wait(PATIENCE)
        raise ValueError

    async def leave():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        workers = Workers(1)
        asker = asyncio.ensure_future(workers.run(work))
        await asyncio.sleep(0)
        asker.cancel()
        fails.set()
        assert await workers.run(lambda: 5) == 5
        gc.collect()

    asyncio.run(leave())
    assert told == []


def test_texts_do_not_wait_for_schemas(served, monkeypatch):
    go_on, compiling = threading.Event(), []
    compile = Options.constraint

    def held(options, processor):
        if options.json_schema is not None and not go_on.is_set():
            compiling.append(options)
            assert go_on.wait(PATIENCE)
        return compile(options, processor)

    monkeypatch.setattr(Options, "constraint", held)
    format = {"type": "json_object"}
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(chat, served, [user("Hi")], max_tokens=1, response_format=format)
            for _ in range(6)
        ]
        assert waits_until(lambda: served.engine.taken == 6 and compiling)
        assert chat(served, [user("Hi")], max_tokens=1).status_code == 200
        assert chat(served, [user(PICTURE, "What?")], max_tokens=1).status_code == 200
        assert len(compiling) == 1
        go_on.set()
        assert [reply.result().status_code for reply in asked] == [200] * 6


def test_texts_do_not_wait_for_pictures(served, decoding):
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(chat, served, [user(PICTURE, "What?")], max_tokens=1) for _ in range(3)
        ]
        assert waits_until(lambda: decoding.running == 1)
        body = {"model": MODEL, "prompt": "Hi", "max_tokens": 1}
        assert chat(served, [user("Hi")], max_tokens=1).status_code == 200
        reply = httpx.post(served.url + "/v1/completions", json=body, timeout=PATIENCE)
        assert reply.status_code == 200
        assert not any(reply.done() for reply in asked)
        decoding.go_on.set()
        assert [reply.result().status_code for reply in asked] == [200] * 3
    assert decoding.most == 1


def test_the_time_of_an_answer_is_counted_from_its_pictures(served, decoding):
    with serving("--timeout", "1", engine=served.engine) as hasty:
        refused(chat(hasty, [user(PICTURE, "What?")]), 503, "more than 1 s")
        refused(chat(hasty, [user(PICTURE, "What?")]), 503, "more than 1 s")
        assert decoding.begun <= 1  # until that ends, no other begins


def test_sent_pictures_do_not_wait_for_fetched_ones(served, internet, tls, monkeypatch):
    """Hosts that say nothing take all that fetch, and nobody else's time."""
    monkeypatch.setattr(images, "SECONDS", PATIENCE)
    monkeypatch.setattr(images, "REMOTE_SECONDS", PATIENCE)
    speak = threading.Event()
    site = Site(lambda _: speak.wait(PATIENCE), tls)
    remote = serving("--allow-remote-images", engine=served.engine)
    with site, remote as open_one, ThreadPoolExecutor(12) as pool:
        internet({"slow.example": ["93.184.216.34"]}, site.port)
        message = named("https://slow.example/a.png")
        asked = [pool.submit(chat, open_one, [message]) for _ in range(12)]
        assert waits_until(
            lambda: len(site.asked) == images.FETCHES and open_one.engine.taken == 12
        )
        honest = chat(open_one, [user(PICTURE, "What?")], max_tokens=1)
        assert honest.status_code == 200
        assert not any(reply.done() for reply in asked)
        assert len(site.asked) == images.FETCHES
        speak.set()
        assert {reply.result().status_code for reply in asked} == {400}


def test_pictures_from_elsewhere_have_one_deadline_together(served, internet, monkeypatch):
    monkeypatch.setattr(images, "REMOTE_SECONDS", 0.5)
    speak = threading.Event()
    with (
        Site(lambda _: speak.wait(PATIENCE)) as site,
        serving("--allow-remote-images", engine=served.engine) as open_one,
    ):
        internet({"slow.example": ["93.184.216.34"]}, site.port)
        urls = [f"http://slow.example/{i}.png" for i in range(3)]
        refused(chat(open_one, [named(*urls)]), 400, "took longer than 0.5 s")
        assert len(site.asked) == 1
        speak.set()


def test_pictures_from_elsewhere_are_together_no_larger_than_a_body(served, internet):
    content = bytes(700_000)

    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content)

    with (
        Site(answer) as site,
        serving("--allow-remote-images", "--max-body", "1", engine=served.engine) as open_one,
    ):
        internet({"large.example": ["93.184.216.34"]}, site.port)
        one, other = "http://large.example/1.png", "http://large.example/2.png"
        refused(chat(open_one, [named(one, one)]), 400, "not an image")
        assert len(site.asked) == 1
        refused(chat(open_one, [named(one, other)]), 400, "more than 300,000 bytes")


BROKEN = {
    **{name: content for name, (content, _) in OTHERS.items()},
    "scans": scan_bomb(PICTURE, 100),
    **{kind: flood(PICTURE, kind) for kind in ("JPEG", "GIF")},
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_a_400(served, name):
    reply = chat(served, [named(url_of(BROKEN[name]))])
    refused(reply, 400)
    assert reply.json()["error"]["code"] == "invalid_image"
    assert served.engine.taken == 0
