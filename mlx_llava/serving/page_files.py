"""The files of the page that the server shows to people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

_PAGE = Path(__file__).parent / "page"


def page_paths() -> list[str]:
    """Where the files are."""
    files = [path for path in _PAGE.rglob("*") if path.is_file()]
    return [f"/{path.relative_to(_PAGE).as_posix()}" for path in files]


class PageFiles(StaticFiles):
    """Serves them; a browser asks each time, so that it never mixes those of two versions."""

    def __init__(self) -> None:
        super().__init__(directory=_PAGE, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        try:
            found = await super().get_response(path, {**scope, "method": "GET"})
        except ValueError as error:  # no file has such a name
            raise HTTPException(404) from error
        return found if scope["method"] == "GET" else await super().get_response(path, scope)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response
