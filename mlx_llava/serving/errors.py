"""What a server answers in place of an answer, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RETRY_SECONDS = 1


class ApiError(Exception):
    """What is answered in place of an answer.

    Attributes:
        status: of HTTP.
        headers: further ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self._fields = {"message": message, "type": kind, "param": param, "code": code}

    def body(self) -> dict[str, Any]:
        """The object that clients read."""
        return {"error": self._fields}


def busy(message: str) -> ApiError:
    """Asks to come again."""
    kind, code = "rate_limit_error", "rate_limit_exceeded"
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(429, message, kind=kind, code=code, headers=headers)


def failure(message: str, code: str | None = None) -> ApiError:
    """Says that the server cannot answer, through no fault of the question."""
    return ApiError(503, message, kind="server_error", code=code)


def unsupported(name: str, neutral: str) -> ApiError:
    """Refuses what would change the answer and cannot, with what may stand there instead."""
    message = f"{name} is not supported here; leave it out (or {neutral})."
    return ApiError(400, message, param=name, code="unsupported_parameter")
