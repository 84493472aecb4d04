"""OpenAI's API over an engine, as an ASGI app: read -> check -> pictures -> ask -> reply.

A request's way is that of `Api.complete`, and of the methods below it from top to bottom.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Send

from mlx_llava.files import one_line
from mlx_llava.generation.memory import ContextError
from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.processor import Inputs
from mlx_llava.serving.engine import Engine, Piece
from mlx_llava.serving.errors import ApiError, failure
from mlx_llava.serving.guard import error_response
from mlx_llava.serving.metrics import Metrics
from mlx_llava.serving.pictures import Limits, Pictures, Sources
from mlx_llava.serving.requests import AnswerRequest, ChatRequest, CompletionRequest, read_request
from mlx_llava.serving.responses import ChatReply, CompletionReply, Reply
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
        sources: which pictures may be named.
        limits: what a request may take.
    """

    engine: Engine
    name: str
    defaults: Options
    sources: Sources
    limits: Limits

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self._pictures = Pictures(self.sources, self.limits)
        # Texts wait for no pictures, no schemas and no long bodies.
        self._reading, self._parsing, self._compiling = Workers(4), Workers(1), Workers(1)

    def app(self) -> Starlette:
        """The ASGI app; unguarded, see guard.py."""
        routes = [
            Mount(
                "/v1",
                routes=[
                    Route("/chat/completions", self.chat, methods=["POST"]),
                    Route("/completions", self.completions, methods=["POST"]),
                    Route("/models", self.models),
                    Route("/models/{name:path}", self.model),
                ],
            ),
            Route("/health", self.health),
            Route("/metrics", self.metric),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _refuse,
            HTTPException: _http_error,
            ClientDisconnect: lambda *_: Response(status_code=499),  # which no one reads
            Exception: _unforeseen,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def chat(self, request: Request) -> Response:
        return await self.complete(request, ChatRequest, ChatReply)

    async def completions(self, request: Request) -> Response:
        return await self.complete(request, CompletionRequest, CompletionReply)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def health(self, _: Request) -> Response:
        if self.engine.has_ended:
            raise failure("The model's thread has ended.")
        return JSONResponse({"status": "ok"})

    async def metric(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "mlx_llava"}

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    async def complete(
        self, http: Request, kind: type[AnswerRequest], reply_to: type[Reply]
    ) -> Response:
        """Answers a request, whole or as a stream."""
        request = await self._read(http, kind)
        self._check(request)
        reply = reply_to(request)
        pieces = self._answer(request)
        if not request.stream:
            return JSONResponse(await _while_connected(http, _whole(reply, pieces)))
        first = await _while_connected(http, anext(pieces))
        return _EventStream(_events(reply, first, pieces), media_type="text/event-stream")

    async def _read(self, http: Request, kind: type[AnswerRequest]) -> AnswerRequest:
        _check_content_type(http)
        body = await http.body()
        workers = self._parsing if len(body) > LONG_BODY else self._reading
        return await workers.run(partial(read_request, body, kind))

    def _check(self, request: AnswerRequest) -> None:
        """Refuses what this server has not, and what cannot fit, before anything is made of it."""
        self._check_model(request.model)
        if request.answers > self.engine.capacity:
            message = f"{request.answers} answers were asked for, of {self.engine.capacity}."
            raise ApiError(400, message, param="n")
        images, limit = len(request.pictures()), self.limits.images
        if images > limit:
            message = f"There are {images} pictures; the limit is {limit}."
            raise ApiError(400, message, param="messages", code="too_many_images")
        processor, characters = self.engine.processor, request.longest()
        if characters > processor.context_length * processor.tokenizer.longest_piece:
            raise _context_error(
                f"The text has {characters:,} characters, more than the model's context of "
                f"{processor.context_length} tokens can hold."
            )

    async def _answer(self, request: AnswerRequest) -> AsyncGenerator[Piece, None]:
        """The pieces of all answers to a request, as they are made."""
        try:
            with self.engine.place(request.answers):
                deadline = anyio.current_time() + self.limits.seconds
                with anyio.fail_after(self.limits.seconds):
                    prompts = await self._prepare(request)
                answer = self.engine.answer(prompts, request.requested_logprobs, deadline)
                async with aclosing(answer) as pieces:
                    async for piece in pieces:
                        if piece.finish_reason:
                            self.metrics.count_answer(piece.figures)
                        yield piece
        except ContextError as error:
            raise _context_error(str(error)) from error
        except ValueError as error:
            raise ApiError(400, one_line(error)) from error
        except TimeoutError as error:
            message = f"The answer took more than {self.limits.seconds:g} s."
            raise failure(message, code="timeout") from error

    async def _prepare(self, request: AnswerRequest) -> list[tuple[Inputs, Options]]:
        """The prompts of a request, each as often as it is to be answered."""
        options = request.options(self.defaults)
        if options.json_schema is not None:
            compile = partial(options.logits_processors, self.engine.processor)
            await self._compiling.run(compile)
        prepare = partial(request.inputs, self.engine.processor)
        if urls := request.pictures():
            prompts = await self._pictures.use(urls, prepare)
        else:
            prompts = await self._reading.run(partial(prepare, ()))
        return [(inputs, seeded) for inputs in prompts for seeded in request.seeded(options)]


async def _whole(reply: Reply, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
    async with aclosing(pieces):
        return reply.whole([piece async for piece in pieces])


async def _events(
    reply: Reply, first: Piece, pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[str, None]:
    async with aclosing(pieces):
        try:
            piece: Piece | None = first
            while piece is not None:
                for chunk in reply.chunks(piece):
                    yield _event(chunk)
                piece = await anext(pieces, None)
        except ApiError as error:
            yield _event(error.body())
            return
    for chunk in reply.last_chunks():
        yield _event(chunk)
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """A stream whose source is closed at once where the client goes."""

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"


def _check_content_type(request: Request) -> None:
    """Refuses what a web page could send without being allowed to."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, "The Content-Type must be application/json.")


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Does some work, unless the client goes before it is done."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if tasks[0].cancelled():
        raise ClientDisconnect
    return tasks[0].result()


async def _refuse(_: Request, error: ApiError) -> Response:
    forget(error)  # here, where whatever has not ended still runs
    return error_response(error)


def _context_error(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="context_length_exceeded")


def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"Invalid URL ({request.method} {request.url.path})"
    code = "unknown_url" if error.status_code == 404 else "method_not_allowed"
    return error_response(ApiError(error.status_code, message, code=code, headers=error.headers))


def _unforeseen(_: Request, __: Exception) -> Response:
    """A mistake of ours; the log has it."""
    return error_response(ApiError(500, "The server made a mistake.", kind="server_error"))
