"""What a server answers in place of an answer, in the shape of the API that was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from starlette.responses import JSONResponse

from mlx_llava.files import one_line
from mlx_llava.generation.memory import ContextError

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
        self.fields = {"message": message, "type": kind, "param": param, "code": code}

    def body(self, path: str = "") -> dict[str, Any]:
        """The object that clients of a path read: OpenAI's, unless it is another API's."""
        shapes = (shape for prefix, shape in _SHAPES.items() if path.startswith(prefix))
        return next(shapes, _openais)(self)

    def response(self, path: str = "") -> JSONResponse:
        return JSONResponse(self.body(path), self.status, self.headers)


def _openais(error: ApiError, asked: str = "messages") -> dict[str, Any]:
    """OpenAI's, in an API whose field `asked` is what chats call their messages."""
    param = error.fields["param"]
    return {"error": {**error.fields, "param": asked if param == "messages" else param}}


def _ollamas(error: ApiError) -> dict[str, Any]:
    return {"error": error.fields["message"]}


def _anthropics(error: ApiError) -> dict[str, Any]:
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPICS_KINDS.get(error.status, usual)
    return {"type": "error", "error": {"type": kind, "message": error.fields["message"]}}


_ANTHROPICS_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
#: How the APIs say it, by the beginnings of their paths.
_SHAPES: Mapping[str, Callable[[ApiError], dict[str, Any]]] = {
    "/api/": _ollamas,
    "/v1/messages": _anthropics,
    "/v1/responses": partial(_openais, asked="input"),
    "/v1/completions": partial(_openais, asked="prompt"),
}


def busy(message: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """Asks to come again."""
    headers = {"Retry-After": str(RETRY_SECONDS), **(headers or {})}
    return ApiError(429, message, "rate_limit_exceeded", headers=headers)


def context_error(message: str) -> ApiError:
    """Says that a prompt is longer than the model's context."""
    return ApiError(400, message, "context_length_exceeded", param="messages")


@contextmanager
def refusals(seconds: float) -> Iterator[None]:
    """Makes of what goes wrong with an answer what its client is told.

    Raises:
        ApiError: In the place of other errors that are a client's to mend.
    """
    try:
        yield
    except ContextError as error:
        raise context_error(str(error)) from error
    except ValueError as error:
        raise ApiError(400, one_line(error)) from error
    except TimeoutError as error:
        message = f"The answer took more than {seconds:g} s."
        raise ApiError(503, message, "timeout") from error
