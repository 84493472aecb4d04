"""What strangers may try on a server: each gets nothing, and the next honest request works."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import select
import socket
import struct
import time
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath

import anyio
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_llava import server
from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.fetch import is_public
from mlx_llava.inputs.image import data_url, png
from mlx_llava.serving import http as connection
from mlx_llava.serving import ollama
from mlx_llava.serving.anthropic import MessagesRequest
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.forms import read_form
from mlx_llava.serving.images import Images, read_below
from mlx_llava.serving.openai_chat import ChatRequest
from mlx_llava.serving.openai_completions import CompletionRequest
from mlx_llava.serving.parameters import UNSUPPORTED
from mlx_llava.serving.responses import ResponseRequest
from mlx_llava.serving.settings import Settings
from tests.servers import GENERATE, HTTP, MODEL, OPENAI, WIRES, receive, serving, user
from tests.sites import DrippingHandshake, Site, fetch, network, reply_with, unwanted

SECRET = "the secret of the house"
PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.fixture(autouse=True)
def still_works(request):
    """After every attack on a server, an honest request is answered."""
    if "served" not in request.fixturenames:
        yield
        return
    served = request.getfixturevalue("served")
    yield
    reply = chat(served, [user(PICTURE, "What colour is it?")], max_tokens=2)
    assert reply.status_code == 200
    assert served.engine.taken == 0


class EveryApi:
    """Attacks that are tried in every API."""

    @pytest.fixture(params=WIRES.values(), ids=WIRES.keys())
    def wire(self, request):
        return request.param

    @pytest.fixture
    def served(self, served, wire):
        return replace(served, wire=wire)


def also(served, *arguments, **limits):
    """Another server with the same model, asked in the same API."""
    return serving(*arguments, engine=served.engine, wire=served.wire, **limits)


def chat(served, messages, **options):
    return served.post(messages=messages, **options)


def named(*urls):
    """A message whose pictures are named by URLs."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}


def refused(reply, status, *words):
    """Whether a reply is an error as its API has it, that says some words and no secret."""
    assert reply.status_code == status, reply.text
    path = reply.request.url.path
    wires = [wire for wire in WIRES.values() if path in (wire.path, wire.models)]
    message = (wires or [OPENAI])[0].error(reply.json())
    assert SECRET not in reply.text
    for word in words:
        assert word in message


class TestAddresses:
    @pytest.mark.parametrize(
        "address",
        [
            "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.5.5", "192.168.1.1",
            "169.254.169.254", "100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1",
            "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1",
            "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a00:1::1",
            "2001:0:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:db8::1",
        ],
    )  # fmt: skip
    def test_that_are_not_public(self, address):
        assert not is_public(address)

    @pytest.mark.parametrize(
        "address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1"]
    )
    def test_that_are(self, address):
        assert is_public(address)

    @pytest.mark.parametrize(
        "host",
        [
            "127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "0.0.0.0",
            "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "[::]", "[::ffff:7f00:1]",
        ],
    )  # fmt: skip
    def test_are_not_fetched_from(self, host, monkeypatch, inside):
        network(monkeypatch)
        for scheme in ("http", "https"):
            with pytest.raises(ValueError, match=r"public address|cannot be fetched"):
                fetch(f"{scheme}://{host}:{inside.port}/picture.png")
        assert inside.asked == []

    @pytest.mark.parametrize(
        "url",
        [
            "file:///etc/passwd", "FILE:///etc/passwd", "gopher://127.0.0.1:70/_x", "ftp://a/b",
            "dict://a:1/", "jar:http://a!/", "http:///x", "http://", "http://user@a/",
            "http://a:b@c/", "http://a:99999/", "http://a:0/", "http://[::1/", "http://a/\r\nX: y",
            "http://a/\u2028", "http://é.example/", "javascript:alert(1)", "//127.0.0.1/x",
        ],
    )  # fmt: skip
    def test_urls_that_are_none(self, url, served, monkeypatch):
        network(monkeypatch, getaddrinfo=unwanted)
        with pytest.raises(ValueError, match="image URL"):
            fetch(url)
        with serving("--allow-remote-images", engine=served.engine) as open_one:
            refused(chat(open_one, [named(url)]), 400)


@pytest.fixture
def inside():
    with Site(reply_with(SECRET.encode())) as site:
        yield site


class TestPicturesElsewhere(EveryApi):
    def test_are_off_unless_allowed(self, served, inside):
        url = f"http://127.0.0.1:{inside.port}/picture.png"
        why = "--allow-remote-images" if served.wire.takes_urls else "base64"
        refused(chat(served, [named(url)]), 400, why)
        assert inside.asked == []

    def test_are_never_private(self, served, inside):
        url = f"http://127.0.0.1:{inside.port}/picture.png"
        with also(served, "--allow-remote-images") as open_one:
            why = "public address" if served.wire.takes_urls else "base64"
            refused(chat(open_one, [named(url)]), 400, why)
        assert inside.asked == []


class TestRemotePictures:
    def test_are_fetched_where_allowed(self, internet):
        allowing = Settings(allow_remote_images=True)
        with Site(reply_with(png(PICTURE))) as site:
            looked_up = internet({"pictures.example": ["93.184.216.34"]}, site.port)
            url, images = "http://pictures.example/a.png?b=c", Images(allowing)
            assert anyio.run(images.fetch, url, 1_000_000, 60) == png(PICTURE)
            assert site.asked == [("pictures.example", "/a.png?b=c")]
            assert looked_up == ["pictures.example"]

    def test_name_that_changes_its_address(self, internet, inside):
        """The second look-up would give a private address; there is no second look-up."""
        looked_up = internet({"rebind.example": ["93.184.216.34", "127.0.0.1"]}, inside.port)
        fetch("http://rebind.example/")
        assert looked_up == ["rebind.example"]
        with pytest.raises(ValueError, match="public address"):
            fetch("http://rebind.example/")

    @pytest.mark.parametrize(
        "target",
        [
            "http://127.0.0.1/x", "http://[::1]/", "http://169.254.169.254/latest/meta-data/",
            "file:///etc/passwd", "gopher://127.0.0.1/", "//localhost/", "http://a@b/",
        ],
    )  # fmt: skip
    def test_redirect_to_what_is_private(self, internet, target):
        with Site(reply_with(b"", 302, Location=target)) as site:
            looked_up = internet(
                {"a.example": ["93.184.216.34"], "localhost": ["127.0.0.1"]}, site.port
            )
            with pytest.raises(ValueError, match=r"public address|image URL must be"):
                fetch("http://a.example/")
            assert len(site.asked) == 1
            assert looked_up[0] == "a.example"

    def test_redirects_without_end(self, internet):
        with Site(reply_with(b"", 301, Location="/again")) as site:
            internet({"a.example": ["93.184.216.34"]}, site.port)
            with pytest.raises(ValueError, match="redirects more than 3 times"):
                fetch("http://a.example/")
            assert len(site.asked) == 4

    def test_one_private_address_among_public_ones(self, monkeypatch):
        def getaddrinfo(*_, **__):
            return [
                (socket.AF_INET, 1, 6, "", (address, 80)) for address in ("1.1.1.1", "10.0.0.1")
            ]

        network(monkeypatch, getaddrinfo=getaddrinfo)
        with pytest.raises(ValueError, match="public address"):
            fetch("http://mixed.example/")

    def test_more_than_is_taken(self, internet):
        with Site(reply_with(bytes(2_000_000))) as site:
            internet({"a.example": ["93.184.216.34"]}, site.port)
            with pytest.raises(ValueError, match="more than 1,000,000 bytes"):
                fetch("http://a.example/", max_bytes=1_000_000)

    @pytest.mark.parametrize("part", ["handshake", "headers", "body"])
    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_an_answer_that_drips(self, internet, tls, scheme, part):
        """It is cut while it goes on, whatever it drips."""
        to_its_end = []

        def drip(handler):
            if part == "body":
                handler.send_response(200)
                handler.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(1200):
                    handler.wfile.write(b"x")
                    time.sleep(0.05)
                to_its_end.append(True)

        site = DrippingHandshake() if part == "handshake" else Site(drip, scheme == "https" and tls)
        with site:
            internet({"a.example": ["93.184.216.34"]}, site.port)
            # What is no HTTP from its first byte is refused by that.
            is_http = (scheme, part) != ("http", "handshake")
            said = "took longer than 0.5 s" if is_http else "illegal request line"
            with pytest.raises(ValueError, match=said):
                fetch(f"{scheme}://a.example/", seconds=0.5)
        assert not to_its_end

    def test_certificate_is_the_names(self, internet, tls):
        """Of the redirect's name too, though both are at one address."""
        asked = []
        tls.server.sni_callback = lambda _, name, __: asked.append(name)
        answers = iter([(b"", 302), (b"picture", 200)])

        def answer(handler):
            reply_with(*next(answers), Location="https://b.example/")(handler)

        with Site(answer, tls) as site:
            internet({f"{a}.example": ["93.184.216.34"] for a in "ab"}, site.port)
            assert fetch("https://a.example/") == b"picture"
        assert asked == ["a.example", "b.example"]

    def test_errors_say_nothing_of_what_answered(self, internet):
        with Site(reply_with(SECRET.encode(), 500)) as site:
            internet({"a.example": ["93.184.216.34"]}, site.port)
            with pytest.raises(ValueError, match="answered 500") as caught:
                fetch("http://a.example/")
            assert SECRET not in str(caught.value)


class TestLocalFiles(EveryApi):
    @pytest.fixture
    def root(self, tmp_path):
        """A folder with a picture, below one with a secret, and links that lead there."""
        (tmp_path / "secret.png").write_bytes(SECRET.encode())
        root = tmp_path / "root"
        (root / "sub").mkdir(parents=True)
        PICTURE.save(root / "sub" / "ok.png")
        (root / "link.png").symlink_to(tmp_path / "secret.png")
        (root / "up").symlink_to(tmp_path)
        (root / "inner.png").symlink_to("sub/ok.png")
        os.mkfifo(root / "pipe.png")
        return root

    def test_are_off_unless_allowed(self, served, root):
        for url in (f"file://{root}/sub/ok.png", "sub/ok.png", "/etc/passwd", "~/.ssh/id_rsa"):
            words = ["--image-root"] if served.wire.takes_urls else []
            refused(chat(served, [named(url)]), 400, *words)

    def test_are_read_below_the_root(self, served, root):
        status = 200 if served.wire.takes_urls else 400
        with also(served, "--image-root", str(root)) as open_one:
            path = f"{root}/sub/ok.png"
            for url in ("sub/ok.png", f"file://{path}", f"FILE://{path}", path, "sub/./ok.png"):
                assert chat(open_one, [named(url)], max_tokens=1).status_code == status

    def test_nothing_escapes(self, served, root):
        above = "../" * 20
        urls = [
            "../secret.png", "sub/../../secret.png", f"{above}etc/passwd", "/etc/passwd",
            f"file://{root}/../secret.png", f"file://{root}/%2e%2e/secret.png", "file:///etc/passwd",
            f"file://{root}/sub/%2e%2e/%2e%2e/secret.png", "link.png", "up/secret.png", "inner.png",
            f"file://{root}/up/secret.png", "pipe.png", "sub", ".", "", "sub/ok.png\0.txt",
            "file://example.org/etc/passwd", f"file://{root}x/a", "file:secret.png", "\udcff",
            "~/secret.png", "nothing.png", "FILE:///etc/passwd", "file:///proc/self/environ",
        ]  # fmt: skip
        with also(served, "--image-root", str(root)) as open_one:
            for url in urls:
                if url.isprintable() and "\udcff" not in url:
                    refused(chat(open_one, [named(url)]), 400)
        images = Images(Settings(image_root=str(root)))
        for url in urls:
            with pytest.raises(ValueError, match=r"image root|image URL|base64"):
                images.read(url)

    def test_a_file_exchanged_for_a_link_while_it_is_opened(self, root, tmp_path, monkeypatch):
        """The last step is not followed either, whatever was there a moment before."""
        opened = os.open

        def exchange(path, flags, **options):
            if path == "ok.png":
                (root / "sub" / "ok.png").unlink()
                (root / "sub" / "ok.png").symlink_to(tmp_path / "secret.png")
            return opened(path, flags, **options)

        monkeypatch.setattr(os, "open", exchange)
        with pytest.raises(ValueError, match="no such file"):
            read_below(root, PurePosixPath("sub/ok.png"))

    def test_large_files(self, root):
        with (root / "large.png").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(ValueError, match="larger than 1,000 bytes"):
            read_below(root, PurePosixPath("large.png"), max_bytes=1000)


@cache
def bomb(side):
    """A PNG of side x side black pixels: 12000 x 12000 are 445 kB."""
    rows = zlib.compress(bytes((side + 1) * side), 9)

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def resident_mb():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


class TestPictures(EveryApi):
    def test_bomb_of_12000_by_12000(self, served):
        content = bomb(12000)
        assert len(content) < 445_000
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        before = resident_mb()
        refused(chat(served, [named(url)]), 400, "12000x12000")
        assert resident_mb() < before + 50

    def test_bombs_that_add_up(self, served):
        """Each would be allowed alone; together they are not."""
        url = "data:image/png;base64," + base64.b64encode(bomb(6000)).decode()
        words = "first 3 pictures have 108,000,000 pixels together; the limit of a request is 100"
        refused(chat(served, [named(url, url, url)]), 400, words)

    def test_other_formats_are_not_decoded(self, served):
        for format in ("TIFF", "ICO", "BMP", "PPM", "JPEG2000", "EPS"):
            buffer = io.BytesIO()
            PICTURE.save(buffer, format)
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            refused(chat(served, [named(url)]), 400, "is not an image")

    def test_long_thin_pictures_take_no_more_memory_than_others(self, served):
        for size in ((1, 60_000), (60_000, 1)):
            reply = chat(served, [user(Image.new("RGB", size), "What?")], max_tokens=1)
            assert reply.status_code in (200, 400)
            assert served.engine.taken == 0

    def test_ten_thousand_images(self, served):
        hundreds = named(*[data_url(png(PICTURE))] * 500)
        refused(chat(served, [hundreds] * 20), 400, "10000 pictures; the limit is 16")

    def test_truncated_and_garbled_pictures(self, served):
        whole = png(Image.effect_noise((64, 64), 50).convert("RGB"))
        for content in (
            whole[:100],
            whole[:-20],
            whole[:200] + bytes(100) + whole[300:],
            b"GIF89a",
        ):
            url = "data:image/png;base64," + base64.b64encode(content).decode()
            assert chat(served, [named(url)], max_tokens=1).status_code in (200, 400)


class TestBodies(EveryApi):
    def head(self, served, *lines, length=None):
        fields = [
            f"POST {served.wire.path} HTTP/1.1",
            f"Host: 127.0.0.1:{served.port}",
            "Content-Type: application/json",
            *lines,
            *([] if length is None else [f"Content-Length: {length}"]),
        ]
        return ("\r\n".join(fields) + "\r\n\r\n").encode()

    def test_a_gigabyte_that_is_announced(self, served):
        before = resident_mb()
        answer = served.raw(self.head(served, length=1_000_000_000) + b"{" * 100_000)
        assert answer.startswith(b"HTTP/1.1 413")
        refusal = served.wire.error(json.loads(answer.partition(b"\r\n\r\n")[2]))
        assert refusal == "The body has more than 50,000,000 bytes."
        assert served.wire is not OPENAI or b"request_too_large" in answer
        assert resident_mb() < before + 50

    def test_a_gigabyte_that_just_comes(self, served):
        before = resident_mb()
        part = b"10000\r\n" + b" " * 65536 + b"\r\n"
        sent = 0
        with socket.create_connection(("127.0.0.1", served.port), 60) as connection:
            connection.sendall(self.head(served, "Transfer-Encoding: chunked"))
            with contextlib.suppress(OSError):
                for _ in range(16_000):
                    connection.sendall(part)
                    sent += 65536
            answer = receive(connection)
        assert 200_000_000 < sent < 300_000_000
        assert answer.startswith(b"HTTP/1.1 413") or not answer  # reset before it could be read
        assert resident_mb() < before + 250

    @pytest.mark.parametrize("is_announced", [False, True])
    def test_whoever_sends_too_much_reads_why(self, served, is_announced):
        """Also who reads only after having sent all."""
        body = b" " * 30_000_000
        if is_announced:
            head = self.head(served, length=len(body))
        else:
            head = self.head(served, "Transfer-Encoding: chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        with also(served, "--max-body", "1") as strict:
            answer = strict.raw(head + body)
        refusal = served.wire.error(json.loads(answer.partition(b"\r\n\r\n")[2]))
        assert refusal == "The body has more than 1,000,000 bytes."

    def test_many_bodies_at_once(self, served):
        """More than four of the greatest length are not held, in however many pieces."""
        with (
            also(served, "--max-body", "1") as small,
            contextlib.ExitStack() as all,
        ):
            connections = []
            for _ in range(6):
                connection = socket.create_connection(("127.0.0.1", small.port), 60)
                connections.append(all.enter_context(connection))
                connection.sendall(self.head(small, length=999_999) + b" " * 900_000)
            for _ in range(2):
                (answered, *_), _, _ = select.select(connections, [], [], 60)
                assert answered.recv(100).startswith(b"HTTP/1.1 429")
                connections.remove(answered)

    def test_a_slow_body(self, served):
        with also(served, seconds=0.4) as hasty:
            request = self.head(hasty, length=100) + b"{"
            assert hasty.raw(request).startswith(b"HTTP/1.1 408")

    def test_deep_json(self, served):
        for body, words in (
            (b"[" * 1_000_000, "1,000,000 brackets; the limit is"),
            (b'{"a":' * 300_000, "300,000 texts; the limit is"),
            (b'{"a":' * 50_000, "not JSON"),
            (b'{"messages":' + b"[" * 90_000, "not JSON"),
        ):
            refused(post(served, body), 400, words)
        deep = {"type": "object"}
        for _ in range(60):
            deep = {"type": "object", "properties": {"a": deep}}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
        assert chat(served, [user("Hi")], response_format=wanted, max_tokens=2).status_code in (
            200,
            400,
        )

    def test_bad_utf8_and_surrogates(self, served):
        for text in (b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\\ud800", b"\\udfff\\ud800"):
            body = b'{"model":"%s","prompt":"%s","messages":[{"role":"user","content":"%s"}]}'
            refused(post(served, body % (MODEL.encode(), text, text)), 400)

    @pytest.mark.parametrize(
        "body",
        [b"", b"null", b"[]", b'"x"', b"{", b"NaN", b'{"model":NaN}', b"{}", b'{"messages":{}}'],
    )
    def test_what_is_no_request(self, served, body):
        refused(post(served, body), 400)

    def test_a_huge_stop_text_and_a_huge_schema(self, served):
        refused(chat(served, [user("Hi")], stop="x" * 1_000_000), 400, "stop")
        schema = {
            "type": "object",
            "properties": {f"p{i}": {"type": "string"} for i in range(9999)},
        }
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        refused(chat(served, [user("Hi")], response_format=wanted), 400, "characters of 100,000")

    def test_schema_that_explodes(self, served):
        pattern = "(" * 30 + "a" + "{1,50})" * 30
        schema = {"type": "string", "pattern": pattern}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        started = time.process_time()
        reply = chat(served, [user("Hi")], response_format=wanted, max_tokens=4)
        assert reply.status_code in (200, 400)
        assert time.process_time() - started < 10


def post(served, body):
    headers = {"Content-Type": "application/json"}
    url = served.url + served.wire.path
    return httpx.post(url, content=body, headers=headers, **HTTP)


def drip(connection):
    """Sends letter after letter for a minute."""
    for _ in range(1200):
        connection.sendall(b"X")
        time.sleep(0.05)


class TestHeaders(EveryApi):
    def test_two_ends_of_one_body(self, served):
        """What one reader takes for the body holds a request for another (request smuggling)."""
        host = f"Host: 127.0.0.1:{served.port}"
        inner = f"GET /metrics HTTP/1.1\r\n{host}\r\n\r\n"
        chunked = "0\r\n\r\n" + inner
        kinds = [
            ["Content-Length: 5", "Transfer-Encoding: chunked"],
            ["Transfer-Encoding: chunked", f"Content-Length: {len(chunked)}"],
            ["Content-Length: 5", "Content-Length: 6"],
            ["Transfer-Encoding: chunked, identity"],
            ["Transfer-Encoding: identity"],
            ["Transfer-Encoding : chunked"],
            ["Content-Length: +5"],
            ["Content-Length: 5\r\n folded: 1"],
            ["Content-Length: -1"],
            ["Transfer-Encoding: \x0bchunked"],
        ]
        for lines in kinds:
            head = "\r\n".join([f"POST {served.wire.path} HTTP/1.1", host, *lines]) + "\r\n\r\n"
            answer = served.raw((head + chunked).encode())
            assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501")), (lines, answer[:80])
            assert b"mlx_llava_requests" not in answer, lines

    def test_headers_without_end(self, served):
        answer = served.raw(b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 200_000)
        assert answer.startswith(b"HTTP/1.1 400") or not answer

    @pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
    def test_a_head_that_drips(self, served, monkeypatch, before):
        """Nor does a connection stay open that was good for a request before."""
        monkeypatch.setattr(connection, "HEAD_SECONDS", 0.4)
        with socket.create_connection(("127.0.0.1", served.port), 60) as slow:
            slow.sendall(before + b"GET / HTTP/1.1\r\n")
            with pytest.raises(OSError, match=r"reset|pipe"):
                drip(slow)
            assert receive(slow).count(b"HTTP/1.1") <= 1

    @pytest.mark.parametrize("lines", [[], ["Host: a", "Host: 127.0.0.1"], ["Host: evil.example"]])
    def test_names_that_are_not_ours(self, served, lines):
        """A page that makes its own name point to this machine is not answered (DNS rebinding)."""
        answer = served.raw(
            "\r\n".join(
                [f"GET {served.wire.models} HTTP/1.1", *lines, "Connection: close"]
            ).encode()
            + b"\r\n\r\n"
        )
        assert answer.split()[1] in (b"400", b"403")
        assert MODEL.encode() not in answer

    def test_names_that_are_allowed(self, served):
        with also(served, "--allow-host", "Mac.local") as named_one:
            for host in (
                "mac.local:80",
                "MAC.LOCAL",
                "localhost",
                "127.0.0.1:1",
                "192.168.1.5:8080",
                "[::1]",
            ):
                reply = httpx.get(
                    named_one.url + served.wire.models, headers={"Host": host}, timeout=60
                )
                assert reply.status_code == 200

    @pytest.mark.parametrize(
        "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://[", ""]
    )
    def test_pages_of_others(self, served, origin):
        reply = httpx.get(served.url + served.wire.models, headers={"Origin": origin}, **HTTP)
        refused(reply, 403, "--allow-origin")
        assert not any(name.startswith("access-control") for name in reply.headers)

    def test_pages_that_are_allowed(self, served):
        origin = "https://ui.example"
        key = "0123456789abcdef"
        allowed = ("--allow-origin", origin, "--api-key", key)
        with also(served, *allowed) as shared:
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            assert (
                httpx.options(
                    shared.url + served.wire.models, headers=headers, timeout=60
                ).status_code
                == 200
            )
            headers = {"Origin": origin, **shared.headers}
            reply = httpx.get(shared.url + served.wire.models, headers=headers, **HTTP)
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (
                200,
                origin,
            )
            assert (
                httpx.get(
                    shared.url + served.wire.models, headers={"Origin": origin}, timeout=60
                ).status_code
                == 401
            )
            other = httpx.get(
                shared.url + served.wire.models,
                headers={"Origin": "https://evil.example"},
                timeout=60,
            )
            assert other.status_code == 403

    def test_forms_of_web_pages(self, served):
        """What a page can send without being allowed to is not read."""
        body = json.dumps(served.wire.body({"model": MODEL, "messages": [user("Hi")]}))
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            reply = httpx.post(
                served.url + served.wire.path,
                content=body,
                headers={"Content-Type": kind},
                timeout=60,
            )
            refused(reply, 400, "Content-Type")
        for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": served.url}):
            reply = httpx.post(
                served.url + served.wire.path, content=body, headers=headers, timeout=60
            )
            refused(reply, 400, "Content-Type")

    def test_paths_that_climb(self, served):
        for path in ("/../server.py", "/%2e%2e/server.py", "/..%2fserver.py", "//etc/passwd"):
            answer = served.raw(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            assert answer.startswith(b"HTTP/1.1 404"), path


class TestKeys(EveryApi):
    KEY = "k" * 31 + "1"

    def test_guessing(self, served):
        with also(served, "--api-key", self.KEY) as guarded:
            guesses = [
                "", "Bearer", "Bearer ", f"Bearer {self.KEY[:-1]}", f"Bearer {self.KEY} ",
                f"Bearer  {self.KEY}", f"Basic {self.KEY}", self.KEY, f"Bearer {self.KEY.upper()}",
                "Bearer \xff\xff", f"Bearer {self.KEY}\t",
            ]  # fmt: skip
            for guess in guesses:
                request = (
                    f"GET {served.wire.models} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                    f"Authorization: {guess}\r\n\r\n"
                )
                if guess.strip() != f"Bearer {self.KEY}":  # HTTP drops blanks around a value
                    answer = guarded.raw(request.encode("latin-1"))
                    assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), guess
            models = served.wire.models
            for path in (models, "/metrics", f"{models}/", f"/{models}", models.upper()):
                assert httpx.get(guarded.url + path, **HTTP).status_code == 401
            refused(chat(replace(guarded, key=None), [user("Hi")]), 401, "Bearer KEY")
            for guess in (
                "",
                self.KEY[:-1],
                f"{self.KEY}1",
                self.KEY.upper(),
                f"Bearer {self.KEY}",
            ):
                reply = httpx.get(guarded.url + models, headers={"X-Api-Key": guess}, **HTTP)
                assert reply.status_code == 401, guess
            reply = httpx.get(guarded.url + models, headers={"X-Api-Key": self.KEY}, timeout=60)
            assert reply.status_code == 200

    def test_weak_keys_are_refused_at_the_start(self, capsys):
        for key in ("", "secret", "x" * 15, "schlüssel" * 3):
            assert server.main(["--api-key", key, "--port", "0"]) == 2
            assert "use at least 16" in capsys.readouterr().err


class TestMarkup(EveryApi):
    def test_markup_comes_back_as_json(self, served):
        script = "<script>alert(1)</script><img src=x onerror=alert(1)>"
        reply = chat(served, [user(script)], max_tokens=2)
        assert reply.headers["content-type"] == "application/json"
        if served.wire is not GENERATE:  # which has no roles
            refused(chat(served, [{"role": script, "content": "x"}]), 400)
        reply = served.post(model=script, messages=[user("Hi")])
        refused(reply, 404, script)
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-content-type-options"] == "nosniff"
        reply = httpx.get(served.url + "/" + script, **HTTP)
        assert (reply.status_code, reply.headers["content-type"]) == (404, "application/json")

    def test_special_tokens_in_a_text_are_text(self, served):
        tokens = served.wire.prompt_tokens
        plain = tokens(chat(served, [user("Hi")], max_tokens=1).json())
        for token in ("</s>", "<image>", "<s>"):
            reply = chat(served, [user(f"Hi{token}")], max_tokens=1)
            assert reply.status_code == 200
            assert tokens(reply.json()) > plain + 1

    def test_the_page_allows_nothing_from_elsewhere(self, served):
        for path in ("/", "/page.js", served.wire.models, "/nothing"):
            policy = httpx.get(served.url + path, **HTTP).headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in policy


@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES.keys())
def test_nothing_of_a_question_is_logged(served, wire, caplog, capfd):
    served = replace(served, wire=wire)
    with caplog.at_level(logging.DEBUG):
        chat(served, [user(PICTURE, f"{SECRET} one")], max_tokens=1)
        chat(served, [user(f"{SECRET} two"), user("again")])
        chat(served, [named(f"data:,{SECRET}")])
    ours = [record.getMessage() for record in caplog.records if "httpx" not in record.name]
    assert not any(SECRET in message for message in ours)
    assert SECRET not in "".join(capfd.readouterr())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
OLLAMAS = (ollama.ChatRequest, ollama.GenerateRequest)
KINDS = (ChatRequest, CompletionRequest, MessagesRequest, ResponseRequest, *OLLAMAS)
FIELDS = sorted(
    {
        *(name for kind in KINDS for name in kind.model_fields), *UNSUPPORTED,
        "num_predict", "repeat_penalty", "temperature", "user",
    }
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(FIELDS), JSON),
    st.dictionaries(st.sampled_from(FIELDS), JSON),
)
def test_any_json_is_read_or_refused(kind, fields, options):
    """Nothing but a refusal ever comes of reading a request, and of taking its options."""
    asked = {
        "messages": [{"role": "user", "content": "Hi"}],
        "prompt": "Hi",
        "input": "Hi",
        "max_tokens": 9,
    }
    body = {
        "model": "x",
        **{key: asked[key] for key in asked if key in kind.model_fields},
        **fields,
    }
    if kind in OLLAMAS:
        body = {"options": options, **body}
    with contextlib.suppress(ApiError):
        form = read_form(json.dumps(body).encode(), kind)
        request = form.request(Options())
        assert len(request.seeded()) == request.n


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 40))
def test_any_bytes_are_read_or_refused(content, at, cut):
    whole = json.dumps({"model": "x", "messages": [user("Hi")], "seed": 1}).encode()
    with contextlib.suppress(ApiError):
        read_form(whole[:at] + content + whole[at + cut :], ChatRequest)
