"""What a server answers in place of an answer, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

CLOSE = {"Connection": "close"}
RETRY_SECONDS = 1


class ApiError(Exception):
    """What is answered in place of an answer; HTTP's status tells whose mistake it is."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        usual = "server_error" if status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if status == 429 else usual
        self._fields = {"message": message, "type": kind, "param": param, "code": code}

    def body(self) -> dict[str, Any]:
        """The object that clients read."""
        return {"error": self._fields}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def busy(message: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """Asks to come again."""
    headers = {"Retry-After": str(RETRY_SECONDS), **(headers or {})}
    return ApiError(429, message, "rate_limit_exceeded", headers=headers)
