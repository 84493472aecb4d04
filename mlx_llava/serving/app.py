"""Endpoints over some engines, as an ASGI app: read -> check -> images -> answer -> reply.

A request's way is that of `Api.complete`, and of the methods below it from top to bottom.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import Send

from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.processor import Processor
from mlx_llava.serving.anthropic import CountRequest, MessagesRequest
from mlx_llava.serving.engine import Engine
from mlx_llava.serving.errors import ApiError, refusals
from mlx_llava.serving.forms import RequestForm, read_form
from mlx_llava.serving.images import Images
from mlx_llava.serving.kept import Kept
from mlx_llava.serving.metrics import Metrics
from mlx_llava.serving.models import Models
from mlx_llava.serving.ollama_models import Ollama
from mlx_llava.serving.openai_chat import ChatRequest
from mlx_llava.serving.openai_completions import CompletionRequest
from mlx_llava.serving.page_files import PageFiles, page_paths
from mlx_llava.serving.replies import Piece, Reply
from mlx_llava.serving.requests import Request
from mlx_llava.serving.responses import ResponseRequest
from mlx_llava.serving.settings import Settings
from mlx_llava.serving.workers import Workers, forget

#: Where no key is needed: what says nothing of anyone's questions.
OPEN_PATHS = frozenset(("/", "/health", *page_paths()))
#: Bytes from which one body is parsed at a time, so that those of texts wait for none of them.
LONG_BODY = 1_000_000

T = TypeVar("T")


@dataclass
class Api:
    """A server's endpoints.

    Attributes:
        models: answer.
        defaults: how to answer where a request does not say.
        settings: what its owner allows.
    """

    models: Models
    defaults: Options
    settings: Settings

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.models.engines)
        self._images = Images(self.settings)
        self._kept = Kept()
        self._page = PageFiles()
        # Texts wait for no images, no schemas and no long bodies.
        self._reading, self._parsing, self._compiling = Workers(4), Workers(1), Workers(1)

    def app(self) -> Starlette:
        """The ASGI app; unguarded, see guard.py."""
        chat = partial(self.complete, kind=ChatRequest)
        completion = partial(self.complete, kind=CompletionRequest)
        messages = partial(self.complete, kind=MessagesRequest)
        response = partial(self.complete, kind=ResponseRequest)
        counted = partial(self.count_tokens, kind=CountRequest)
        what = "response.input_tokens"
        counted_input = partial(self.count_tokens, kind=ResponseRequest, object=what)
        v1 = [
            Route("/chat/completions", chat, methods=["POST"]),
            Route("/completions", completion, methods=["POST"]),
            Route("/messages", messages, methods=["POST"]),
            Route("/messages/count_tokens", counted, methods=["POST"]),
            Route("/responses", response, methods=["POST"]),
            Route("/responses/input_tokens", counted_input, methods=["POST"]),
            Route("/responses/{name}", self.response),
            Route("/responses/{name}", self.forget_response, methods=["DELETE"]),
            Route("/models", self.list_models),
            Route("/models/{name:path}", self.show_model),
        ]
        routes = [
            Mount("/v1", routes=v1),
            Route("/health", self.health),
            Route("/metrics", self.metric),
            Mount("/api", routes=Ollama(self).routes()),
            Route("/", self.root),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _refuse,
            HTTPException: _http_error,
            ClientDisconnect: lambda *_: Response(status_code=499),  # which no one reads
            Exception: _mistake,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.default, app.router.redirect_slashes = self._page, False
        return app

    async def list_models(self, _: HttpRequest) -> Response:
        names = [*self.models.names]
        ends = {"first_id": names[0], "last_id": names[-1], "has_more": False}
        return JSONResponse({"object": "list", "data": [*map(_model, names)], **ends})

    async def show_model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        self.models.find(name)
        return JSONResponse(_model(name))

    async def response(self, http: HttpRequest) -> Response:
        """A response that was kept."""
        if http.query_params.get("stream", "").lower() in ("true", "1"):
            message = "A stored response is not streamed again; leave stream out (or false)."
            raise ApiError(400, message, "unsupported_parameter", param="stream")
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
        if self.models.thread.has_ended:
            raise ApiError(503, "The models' thread has ended.")
        states = {name: _state(engine) for name, engine in self.models.engines.items()}
        return JSONResponse({"status": "ok", "models": states})

    async def metric(self, _: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def read(self, http: HttpRequest, read: Callable[[bytes], T]) -> T:
        """What the body of a request says, read in another thread."""
        _check_content_type(http)
        body = await http.body()
        workers = self._parsing if len(body) > LONG_BODY else self._reading
        return await workers.run(partial(read, body))

    async def complete(self, http: HttpRequest, kind: type[RequestForm]) -> Response:
        """Answers a request, whole or as a stream."""
        form, request = await self.read(http, partial(_read, kind, self.defaults, self._kept))
        engine = self._check(request)
        reply = Reply(self._answer(engine, request), request.n)
        if not request.stream:
            whole = await _while_connected(http, form.whole(reply))
            return JSONResponse(whole, headers=form.headers())
        await _while_connected(http, reply.begin())
        return _Stream(form.events(reply), headers=form.headers(), media_type=form.media_type)

    async def count_tokens(
        self, http: HttpRequest, kind: type[RequestForm], **said: str
    ) -> Response:
        """Tells how many tokens a prompt takes, as Anthropic and OpenAI have it."""
        _, request = await self.read(http, partial(_read, kind, self.defaults, self._kept))
        engine = self._check(request)
        with refusals(self.settings.timeout), engine.place(request.answers):
            with anyio.fail_after(self.settings.timeout):
                prompts = await self._prepare(engine.processor, request)
        tokens = sum(inputs.input_ids.size for inputs, _ in prompts)
        return JSONResponse({**said, "input_tokens": tokens})

    def _check(self, request: Request) -> Engine:
        """Finds the model; refuses what this server has not, and what cannot fit."""
        engine = self.models.find(request.model)
        if request.answers > engine.capacity:
            message = f"{request.answers} answers were asked for, of {engine.capacity}."
            raise ApiError(400, message, param="n")
        images, limit = len(request.images), self.settings.max_images
        if images > limit:
            message = f"There are {images} pictures; the limit is {limit}."
            raise ApiError(400, message, "too_many_images", param="messages")
        request.check_length(engine.processor)
        return engine

    async def _answer(self, engine: Engine, request: Request) -> AsyncGenerator[Piece, None]:
        """The pieces of all answers to a request, as they are made."""
        seconds, keep_alive = self.settings.timeout, request.keep_alive
        if keep_alive is None:
            keep_alive = self.settings.keep_alive_seconds
        with refusals(seconds), engine.place(request.answers):
            deadline = anyio.current_time() + seconds
            with anyio.fail_after(seconds):
                prompts = await self._prepare(engine.processor, request)
            answers = engine.answer(prompts, request.top_logprobs, deadline, keep_alive)
            async with aclosing(answers):
                async for piece in answers:
                    if piece.finish_reason:
                        self.metrics.count_answer(engine.name, piece.figures)
                    yield piece

    async def _prepare(
        self, processor: Processor, request: Request
    ) -> list[tuple[Inputs, Options]]:
        """The prompts of a request, each as often as it is to be answered."""
        if request.options.json_schema is not None:
            await self._compiling.run(partial(request.options.constraint, processor))
        prepare = partial(request.prepare, processor)
        if request.images:
            frames = request.frames or processor.frames
            return await self._images.use(request.images, frames, prepare)
        return await self._reading.run(partial(prepare, ()))


def _state(engine: Engine) -> str:
    return "loaded" if engine.is_loaded else "not loaded"


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
    """Refuses what a web page could send without being allowed to.

    LiteLLM says no type to Ollama's API. A page can do so too, but a browser tells of it.
    """
    headers = http.headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_of_page = "origin" in headers or "sec-fetch-site" in headers
    if kind != "application/json" and (is_of_page or "content-type" in headers):
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
    if error.status_code == 404 and not http.url.path.startswith(("/v1/", "/api/")):
        message += "; OpenAI's API and Anthropic's are under /v1, Ollama's under /api."
    code = "unknown_url" if error.status_code == 404 else "method_not_allowed"
    refusal = ApiError(error.status_code, message, code, headers=error.headers)
    return refusal.response(http.scope["path"])
