"""Servers elsewhere, for what fetches pictures: on this machine, under names of the internet."""

from __future__ import annotations

import contextlib
import http.server
import socket
import ssl
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import anyio
import pytest

from mlx_llava.inputs import fetch as remote


def unwanted(*_, **__):
    raise AssertionError("something was connected to, or looked up")


def network(monkeypatch, getaddrinfo=socket.getaddrinfo, connect_tcp=unwanted):
    """Replaces how fetch.py looks up names, and how httpx connects for it."""
    names = SimpleNamespace(SOCK_STREAM=socket.SOCK_STREAM, getaddrinfo=getaddrinfo)
    monkeypatch.setattr(remote, "socket", names)
    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)


def fetch(url, max_bytes=20_000_000, seconds=10):
    return anyio.run(remote.fetch, url, max_bytes, seconds)


class Site:
    """A server that must not be reached, or only by the address that was checked."""

    def __init__(self, answer, tls=None):
        self.asked = asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append((self.headers["Host"], self.path))
                answer(self)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls:
            listening = self._server.socket
            self._server.socket = tls.server.wrap_socket(
                listening, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def reply_with(content, status=200, **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


class DrippingHandshake:
    """A server that begins a record of TLS and does not end it."""

    def __enter__(self):
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._drip, daemon=True)
        self._thread.start()
        return self

    def _drip(self):
        with contextlib.suppress(OSError):
            connection, _ = self._listening.accept()
            with connection:
                connection.sendall(b"\x16\x03\x03\x40\x00")
                for _ in range(1200):  # a minute, where nobody cuts it
                    connection.sendall(b"x")
                    if self._is_over.wait(0.05):
                        return

    def __exit__(self, *_):
        self._is_over.set()
        self._listening.close()
        self._thread.join()


@dataclass
class Tls:
    """Both ends of TLS without certificates, which would have to be made."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def _anonymous(side):
    context = ssl.SSLContext(side)
    if side == ssl.PROTOCOL_TLS_CLIENT:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ADH:AECDH:@SECLEVEL=0")
    return context


@pytest.fixture
def tls(monkeypatch):
    """What sites need to be asked by https."""
    try:
        made = Tls(*map(_anonymous, (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)))
    except ssl.SSLError:
        pytest.skip("this OpenSSL has no anonymous ciphers")
    context = SimpleNamespace(create_default_context=lambda: made.client)
    monkeypatch.setattr(remote, "ssl", context)
    return made


@pytest.fixture
def internet(monkeypatch):
    """Names with public addresses, of which 93.184.216.34 leads to a site of the test."""
    looked_up, connect = [], anyio.connect_tcp

    def names(table, port):
        table = {name: [*addresses] for name, addresses in table.items()}

        def getaddrinfo(host, _, **__):
            looked_up.append(host)
            known = table.get(host)
            address = known.pop(0) if known and len(known) > 1 else known[0] if known else host
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return [(family, socket.SOCK_STREAM, 6, "", (address, 80))]

        async def connect_tcp(remote_host, remote_port, **_):
            assert remote_host == "93.184.216.34", f"connected to {remote_host}"
            return await connect("127.0.0.1", port)

        network(monkeypatch, getaddrinfo, connect_tcp)
        return looked_up

    return names
