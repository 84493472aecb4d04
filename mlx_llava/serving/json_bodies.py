"""The body of a request -> what its JSON holds, in bounded time.

A parser makes an object of every key and value, and the whole process waits for it. A request
has few of them, if long ones: so they are counted before they are made.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from mlx_llava.serving.errors import ApiError

MAX_TEXTS = MAX_BRACKETS = 100_000
MAX_COMMAS = 250_000  # of which texts have many
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json(body: bytes) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ApiError: It is none, or has too many keys and values.
    """
    _check_structure(body)
    text = body.removeprefix(_BYTE_ORDER_MARK)
    try:
        data = from_json(text, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return data


def _check_structure(body: bytes) -> None:
    """Refuses more keys and values than any request needs.

    Each text opens with a quote that follows no backslash, each list and object with a bracket,
    and each value but the first of these follows a comma. Those within texts count as well, but
    pictures in base64 have none.
    """
    for name, found, most in (
        ("texts", (body.count(b'"') - body.count(b'\\"')) // 2, MAX_TEXTS),
        ("commas", body.count(b","), MAX_COMMAS),
        ("brackets", body.count(b"[") + body.count(b"{"), MAX_BRACKETS),
    ):
        if found > most:
            message = f"The body has {found:,} {name}; the limit is {most:,}."
            raise ApiError(400, message, code="request_too_complex")
