"""Endpoints over an engine, as an ASGI app: read -> check -> images -> answer -> reply.

A request's way is that of `Api.complete`, and of the methods below it from top to bottom.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Send

from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.processor import Inputs
from mlx_llava.serving.anthropic import CountRequest, MessagesRequest
from mlx_llava.serving.engine import Engine
from mlx_llava.serving.errors import ApiError, refusals
from mlx_llava.serving.forms import RequestForm, read_form
from mlx_llava.serving.images import Images
from mlx_llava.serving.kept import Kept
from mlx_llava.serving.metrics import Metrics
from mlx_llava.serving.ollama_models import Ollama
from mlx_llava.serving.openai import ChatRequest, CompletionRequest
from mlx_llava.serving.replies import Piece, Reply
from mlx_llava.serving.requests import Request
from mlx_llava.serving.responses import ResponseRequest
from mlx_llava.serving.settings import Settings
from mlx_llava.serving.workers import Workers, forget

PAGE = Path(__file__).parent / "page"
#: Where no key is needed: what says nothing of anyone's questions.
OPEN_PATHS = frozenset(("/", "/health", *(f"/{file.name}" for file in PAGE.iterdir())))
#: Bytes from which one body is parsed at a time, so that those of texts wait for none of them.
LONG_BODY = 1_000_000

T = TypeVar("T")


@dataclass
class Api:
    """One model's endpoints.

    Attributes:
        engine: answers.
        name: of the model, as clients know it.
        defaults: how to answer where a request does not say.
        settings: what its owner allows.
    """

    engine: Engine
    name: str
    defaults: Options
    settings: Settings

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self._images = Images(self.settings)
        self._kept = Kept()
        self._page = StaticFiles(directory=PAGE, html=True)
        # Texts wait for no images, no schemas and no long bodies.
        self._reading, self._parsing, self._compiling = Workers(4), Workers(1), Workers(1)

    def app(self) -> Starlette:
        """The ASGI app; unguarded, see guard.py."""
        chat = partial(self.complete, kind=ChatRequest)
        completion = partial(self.complete, kind=CompletionRequest)
        messages = partial(self.complete, kind=MessagesRequest)
        response = partial(self.complete, kind=ResponseRequest)
        v1 = [
            Route("/chat/completions", chat, methods=["POST"]),
            Route("/completions", completion, methods=["POST"]),
            Route("/messages", messages, methods=["POST"]),
            Route("/messages/count_tokens", self.count_tokens, methods=["POST"]),
            Route("/responses", response, methods=["POST"]),
            Route("/responses/{name}", self.response),
            Route("/responses/{name}", self.forget_response, methods=["DELETE"]),
            Route("/models", self.models),
            Route("/models/{name:path}", self.model),
        ]
        routes = [
            Mount("/v1", routes=v1),
            Route("/health", self.health),
            Route("/metrics", self.metric),
            Mount("/api", routes=Ollama(self).routes()),
            Route("/", self.root),
            Mount("/", self._page),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _refuse,
            HTTPException: _http_error,
            ClientDisconnect: lambda *_: Response(status_code=499),  # which no one reads
            Exception: _mistake,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def models(self, _: HttpRequest) -> Response:
        ends = {"first_id": self.names[0], "last_id": self.names[-1], "has_more": False}
        return JSONResponse({"object": "list", "data": [*map(_model, self.names)], **ends})

    async def model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        self.check_model(name)
        return JSONResponse(_model(name))

    async def response(self, http: HttpRequest) -> Response:
        """A response that was kept."""
        return JSONResponse(self._kept.get(http.path_params["name"]).body)

    async def forget_response(self, http: HttpRequest) -> Response:
        """Forgets a response that was kept."""
        name = http.path_params["name"]
        self._kept.remove(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    async def root(self, http: HttpRequest) -> Response:
        """The page for browsers; others are told what Ollama's clients look for."""
        if "text/html" in http.headers.get("accept", ""):
            return await self._page.get_response("index.html", http.scope)
        return PlainTextResponse("Ollama is running", headers={"Vary": "Accept"})

    async def health(self, _: HttpRequest) -> Response:
        if self.engine.has_ended:
            raise ApiError(503, "The model's thread has ended.")
        return JSONResponse({"status": "ok"})

    async def metric(self, _: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    @property
    def names(self) -> tuple[str, ...]:
        """All that the model is called; its own name first."""
        return self.name, *self.settings.alias

    def check_model(self, name: str) -> None:
        """Refuses what is no name of the model; after ``:`` may be a tag, as Ollama has it.

        Raises:
            ApiError: It is none.
        """
        untagged = name.partition(":")[0]
        if name.removesuffix(":latest") not in self.names and untagged not in self.settings.alias:
            message = f"The model {name!r} does not exist; this server has {self.name!r}."
            raise ApiError(404, message, "model_not_found", param="model")

    async def read(self, http: HttpRequest, read: Callable[[bytes], T]) -> T:
        """What the body of a request says, read in another thread."""
        _check_content_type(http)
        body = await http.body()
        workers = self._parsing if len(body) > LONG_BODY else self._reading
        return await workers.run(partial(read, body))

    async def complete(self, http: HttpRequest, kind: type[RequestForm]) -> Response:
        """Answers a request, whole or as a stream."""
        form, request = await self.read(http, partial(_read, kind, self.defaults, self._kept))
        self._check(request)
        reply = Reply(self._answer(request), request.n)
        if not request.stream:
            whole = await _while_connected(http, form.whole(reply))
            return JSONResponse(whole, headers=form.headers())
        await _while_connected(http, reply.begin())
        return _Stream(form.events(reply), headers=form.headers(), media_type=form.media_type)

    async def count_tokens(self, http: HttpRequest) -> Response:
        """Tells how many tokens a prompt takes, as Anthropic has it."""
        _, request = await self.read(http, partial(_read, CountRequest, self.defaults, self._kept))
        self._check(request)
        with refusals(self.settings.timeout), self.engine.place(request.answers):
            with anyio.fail_after(self.settings.timeout):
                prompts = await self._prepare(request)
        return JSONResponse({"input_tokens": sum(inputs.input_ids.size for inputs, _ in prompts)})

    def _check(self, request: Request) -> None:
        """Refuses what this server has not, and what cannot fit, before anything is made of it."""
        self.check_model(request.model)
        if request.answers > self.engine.capacity:
            message = f"{request.answers} answers were asked for, of {self.engine.capacity}."
            raise ApiError(400, message, param="n")
        images, limit = len(request.images), self.settings.max_images
        if images > limit:
            message = f"There are {images} pictures; the limit is {limit}."
            raise ApiError(400, message, "too_many_images", param="messages")
        request.check_length(self.engine.processor)

    async def _answer(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The pieces of all answers to a request, as they are made."""
        seconds = self.settings.timeout
        with refusals(seconds), self.engine.place(request.answers):
            deadline = anyio.current_time() + seconds
            with anyio.fail_after(seconds):
                prompts = await self._prepare(request)
            answers = self.engine.answer(prompts, request.top_logprobs, deadline)
            async with aclosing(answers):
                async for piece in answers:
                    if piece.finish_reason:
                        self.metrics.count_answer(piece.figures)
                    yield piece

    async def _prepare(self, request: Request) -> list[tuple[Inputs, Options]]:
        """The prompts of a request, each as often as it is to be answered."""
        if request.options.json_schema is not None:
            compile = partial(request.options.constraint, self.engine.processor)
            await self._compiling.run(compile)
        prepare = partial(request.prepare, self.engine.processor)
        if request.images:
            frames = request.frames or self.engine.processor.frames
            return await self._images.use(request.images, frames, prepare)
        return await self._reading.run(partial(prepare, ()))


def _model(name: str) -> dict[str, Any]:
    """What OpenAI's clients read of a model, and Anthropic's."""
    openais = {"id": name, "object": "model", "created": 0, "owned_by": "mlx_llava"}
    return {**openais, "type": "model", "display_name": name, "created_at": "1970-01-01T00:00:00Z"}


def _read(
    kind: type[RequestForm], defaults: Options, kept: Kept, body: bytes
) -> tuple[RequestForm, Request]:
    form = read_form(body, kind)
    form.recall(kept)
    return form, form.request(defaults)


class _Stream(StreamingResponse):
    """A stream whose source is closed at once where the client goes."""

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


def _check_content_type(http: HttpRequest) -> None:
    """Refuses what a web page could send without being allowed to."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, "The Content-Type must be application/json.")


async def _while_connected(http: HttpRequest, work: Awaitable[T]) -> T:
    """Does some work, unless the client goes before it is done."""

    async def leave() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        working.cancel()

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        return await working
    except asyncio.CancelledError:
        if leaving.done():
            raise ClientDisconnect from None
        raise
    finally:
        leaving.cancel()


async def _refuse(http: HttpRequest, error: ApiError) -> Response:
    forget(error)  # here, where whatever has not ended still runs
    return error.response(http.scope["path"])


async def _mistake(http: HttpRequest, _: Exception) -> Response:
    """Of ours; the log has it."""
    return ApiError(500, "The server made a mistake.").response(http.scope["path"])


def _http_error(http: HttpRequest, error: HTTPException) -> Response:
    message = f"Invalid URL ({http.method} {http.url.path})"
    code = "unknown_url" if error.status_code == 404 else "method_not_allowed"
    refusal = ApiError(error.status_code, message, code, headers=error.headers)
    return refusal.response(http.scope["path"])
