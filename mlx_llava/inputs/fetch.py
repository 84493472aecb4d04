"""Fetch an image from a URL, within bounds of size and time.

`download` does it for a user, from wherever the URL leads; `fetch` for someone else, from public
addresses only. There a name is looked up once, and the connection goes to the address that was
checked, so that a name which changes its address in between gains nothing. So it is for every
redirect.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import anyio
import anyio.to_thread
import httpcore
import httpx

from mlx_llava.version import __version__

REDIRECTS = 3
MAX_DOWNLOAD_BYTES = 100_000_000
DOWNLOAD_SECONDS = 30.0
#: Compressed, a few bytes could become any number.
_HEADERS = (
    ("User-Agent", f"mlx_llava/{__version__}"),
    ("Accept", "image/*"),
    ("Accept-Encoding", "identity"),
)
#: Networks whose addresses carry an IPv4 address in their last 32 bits: IPv4-compatible
#: (RFC 4291) and NAT64 (RFC 6052, RFC 8215).
_CARRIERS = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48")))

_FAILURES = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)

T = TypeVar("T")


def download(url: str) -> bytes:
    """What a user's URL gives, through the proxies that the environment names.

    Raises:
        ValueError: It cannot be fetched, or gives too much.
    """
    content = bytearray()
    try:
        with (
            httpx.Client(
                verify=ssl.create_default_context(), timeout=DOWNLOAD_SECONDS, follow_redirects=True
            ) as client,
            client.stream("GET", url, headers=_HEADERS) as response,
        ):
            if not response.is_success:
                raise ValueError(f"HTTP Error {response.status_code}: {response.reason_phrase}")
            for chunk in response.iter_raw():
                content += chunk
                if len(content) > MAX_DOWNLOAD_BYTES:
                    break
    # ImportError: of a proxy that httpx needs a further package for.
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as error:
        raise ValueError(f"{url} cannot be fetched: {error}") from error
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{url} is larger than {MAX_DOWNLOAD_BYTES:,} bytes.")
    return bytes(content)


async def fetch(url: str, max_bytes: int, seconds: float) -> bytes:
    """What a URL of someone else's gives, redirects included.

    Raises:
        ValueError: The URL is refused, or cannot be fetched within these bounds.
    """
    try:
        with anyio.fail_after(seconds):
            context = await _in_thread(ssl.create_default_context)
            async with (
                aclosing(_PublicNetwork()) as network,
                httpcore.AsyncConnectionPool(context, network_backend=network) as pool,
            ):
                for _ in range(REDIRECTS + 1):
                    _check_url(url)
                    async with pool.stream("GET", url, headers=_HEADERS) as response:
                        if response.status not in (301, 302, 303, 307, 308):
                            return await _content(response, max_bytes)
                        headers = {name.lower(): value for name, value in response.headers}
                        url = urljoin(url, headers.get(b"location", b"").decode("latin-1"))
    except TimeoutError as error:
        raise ValueError(f"The image URL took longer than {seconds:.2g} s.") from error
    except (OSError, *_FAILURES) as error:
        raise ValueError(f"The image URL cannot be fetched: {error}") from error
    raise ValueError(f"The image URL redirects more than {REDIRECTS} times.")


async def _content(response: httpcore.Response, max_bytes: int) -> bytes:
    if response.status != 200:
        raise ValueError(f"The image URL answered {response.status}.")
    content = bytearray()
    async for chunk in response.aiter_stream():
        content += chunk
        if len(content) > max_bytes:
            raise ValueError(f"The image URL gives more than {max_bytes:,} bytes.")
    return bytes(content)


class _PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked, and in the end leaves no connection."""

    def __init__(self) -> None:
        self._opened: list[httpcore.AsyncNetworkStream] = []

    async def connect_tcp(
        self, host: str, port: int, *args: Any, **kwargs: Any
    ) -> httpcore.AsyncNetworkStream:
        address = await _in_thread(partial(public_address, host, port))
        stream = await httpcore.AnyIOBackend().connect_tcp(address, port, *args, **kwargs)
        self._opened.append(stream)
        return stream

    async def aclose(self) -> None:
        """Ends also what TLS had not taken over when the time was up."""
        with anyio.CancelScope(shield=True):
            for stream in self._opened:
                await stream.aclose()


async def _in_thread(work: Callable[[], T]) -> T:
    """Does what would hold up others; nobody waits for it after the deadline."""
    limiter = anyio.CapacityLimiter(1)
    return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise ValueError(f"The image URL is broken: {error}") from error
    if not usable or parts.username is not None or not url.isascii() or not url.isprintable():
        raise ValueError("An image URL must be http(s)://HOST/..., without a user name.")


def public_address(host: str, port: int) -> str:
    """The address of a host, if all of its addresses belong to the public internet.

    Raises:
        ValueError: One of them does not.
        OSError: There is no such host.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(address[0]) for *_, address in found]
    if not all(map(is_public, addresses)):
        raise ValueError("The image URL does not lead to a public address.")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address, and the one inside it if it carries one, is globally reachable."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip.teredo:
            inner = ip.teredo[1]
        if any(ip in network for network in _CARRIERS):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
        if ip.ipv4_mapped:
            return True
    return ip.is_global and not ip.is_multicast
