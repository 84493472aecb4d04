"""Fetch a picture for someone else: from public addresses only, within bounds of size and time.

A name is resolved once, and the connection goes to the address that was checked, so that a name
which changes its address in between gains nothing. So it is for every redirect.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import SplitResult, urljoin, urlsplit

from mlx_llava.version import __version__

MAX_BYTES = 20_000_000
SECONDS = 10.0
REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_CHUNK = 1 << 16
#: Networks whose addresses carry an IPv4 address in their last 32 bits: IPv4-compatible
#: (RFC 4291) and NAT64 (RFC 6052, RFC 8215).
_CARRIERS = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48")))


def fetch(url: str, max_bytes: int = MAX_BYTES, seconds: float = SECONDS) -> bytes:
    """What a URL gives.

    Args:
        url (str): An http or https URL.
        max_bytes (int): The most to take.
        seconds (float): For everything, redirects included.

    Raises:
        ValueError: The URL is refused, or cannot be fetched within these bounds.
    """
    deadline = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        parts = _check_url(url)
        try:
            with _get(parts, deadline) as response:
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.getheader("Location") or "")
                    continue
                if response.status != 200:
                    raise ValueError(f"The image URL answered {response.status}.")
                return _read(response, max_bytes, deadline)
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline:
                raise ValueError(f"The image URL took longer than {seconds:.2g} s.") from error
            raise ValueError(f"The image URL cannot be fetched: {error}") from error
    raise ValueError(f"The image URL redirects more than {REDIRECTS} times.")


def _check_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in _PORTS and parts.hostname and parts.port != 0
    except ValueError as error:
        raise ValueError(f"The image URL is broken: {error}") from error
    if not usable or parts.username is not None or not url.isascii() or not url.isprintable():
        raise ValueError("An image URL must be http(s)://HOST/..., without a user name.")
    return parts


def public_address(host: str, port: int) -> str:
    """The address of a host, if all of its addresses belong to the public internet.

    Raises:
        ValueError: One of them does not.
        OSError: There is no such host.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(address[0]) for *_, address in found]
    for address in addresses:
        if not is_public(address):
            raise ValueError("The image URL does not lead to a public address.")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address, and the one inside it if it carries one, is globally reachable."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: ipaddress.IPv4Address | None = None
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip.teredo:
            inner = ip.teredo[1]
        if any(ip in network for network in _CARRIERS):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if inner is not None and not is_public(str(inner)):
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        return True
    return ip.is_global and not ip.is_multicast


@contextmanager
def _get(parts: SplitResult, deadline: float) -> Iterator[http.client.HTTPResponse]:
    """Asks an address that was checked; everything but looking up its name ends at the deadline."""
    host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
    address = public_address(host, port)
    connection = http.client.HTTPConnection(host, port)
    # The second handle leads to the same connection, also when TLS has taken over the first.
    with (
        socket.create_connection((address, port), _left(deadline)) as raw,
        raw.dup() as handle,
        _cutting(handle, deadline),
        closing(connection),
    ):
        connection.sock = raw
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        agent = f"mlx_llava/{__version__}"
        connection.request("GET", path, headers={"User-Agent": agent, "Accept": "image/*"})
        with connection.getresponse() as response:
            yield response


def _left(deadline: float) -> float:
    """The seconds that are left; raises TimeoutError where there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@contextmanager
def _cutting(handle: socket.socket, deadline: float) -> Iterator[None]:
    """Ends whatever waits for a connection at the deadline."""
    timer = threading.Timer(_left(deadline), _cut, [handle])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # its handle's number may soon be another's


def _cut(connection: socket.socket) -> None:
    """Ends a connection that another thread waits for."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has ended by itself


def _read(response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    content = bytearray()
    while chunk := response.read1(_CHUNK):
        content += chunk
        if len(content) > max_bytes:
            raise ValueError(f"The image URL gives more than {max_bytes:,} bytes.")
    _left(deadline)  # what was cut looks as if it had ended
    return bytes(content)
