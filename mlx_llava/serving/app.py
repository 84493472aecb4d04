"""OpenAI's API over an engine, as an ASGI app: request -> pictures -> answers -> replies.

A request is followed from `Api.complete`: `read_request`, its pictures and prompts (`_asks`),
`Engine.answer`, and the shape of the replies.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, nullcontext
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
from mlx_llava.inputs.image import image_size, load_image
from mlx_llava.inputs.processor import Inputs
from mlx_llava.serving.engine import Ask, BusyError, Engine, EngineError, Piece
from mlx_llava.serving.errors import ApiError, busy
from mlx_llava.serving.guard import error_response
from mlx_llava.serving.limits import Limits
from mlx_llava.serving.metrics import Metrics
from mlx_llava.serving.pictures import MAX_BYTES, Sources, is_remote
from mlx_llava.serving.requests import ChatRequest, CompletionRequest, Wanted, read_request
from mlx_llava.serving.responses import ChatShape, CompletionShape, Shape, Tally
from mlx_llava.serving.workers import Workers, forget

PAGE = Path(__file__).parent / "page"
#: Where no key is needed: what says nothing of anyone's questions.
OPEN_PATHS = frozenset(("/", "/health", *(f"/{file.name}" for file in PAGE.iterdir())))
#: What browsers and cameras make; each further decoder is one more that strangers can feed.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
#: Bytes from which one body is parsed at a time, so that those of texts wait for none of them.
LONG_BODY = 1_000_000
#: Pixels of a request up to which its pictures are small, as those of most telephones are.
SMALL_PIXELS = 16_000_000
#: So many requests have pictures fetched at a time, and keep them until they are decoded.
FETCHES = 8
#: How long fetching all pictures of a request may take.
REMOTE_SECONDS = 30.0
#: And one of them.
SECONDS = 10.0

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
        """Begins to count."""
        self.metrics = Metrics(self.engine)
        # The pictures of one request are decoded at a time, and beside those of one with small
        # ones, so that their pixels never add up. Texts wait for no pictures and no schemas, small
        # pictures for no large ones, and those that are sent for none of elsewhere.
        self._decoding, self._decoding_small, self._measuring = Workers(1), Workers(1), Workers(2)
        self._reading, self._parsing, self._compiling = Workers(4), Workers(1), Workers(1)
        self._holding = asyncio.Semaphore(FETCHES)

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
        """``POST /v1/chat/completions``."""
        return await self.complete(request, ChatRequest, ChatShape)

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await self.complete(request, CompletionRequest, CompletionShape)

    async def models(self, _: Request) -> Response:
        """``GET /v1/models``."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/NAME``."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def health(self, _: Request) -> Response:
        """``GET /health``."""
        if self.engine.has_ended:
            raise ApiError(503, "The model's thread has ended.", kind="server_error")
        return JSONResponse({"status": "ok"})

    async def metric(self, _: Request) -> Response:
        """``GET /metrics``."""
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
        self, request: Request, kind: type[Wanted], shape_of: type[Shape]
    ) -> Response:
        """Answers a request, whole or as a stream.

        Args:
            request (Request): Of HTTP.
            kind (type): What its body is.
            shape_of (type): What its answer looks like.

        Raises:
            ApiError: It is refused, or fails before the first word.
        """
        _check_content_type(request)
        body = await request.body()
        workers = self._parsing if len(body) > LONG_BODY else self._reading
        wanted = await workers.run(partial(read_request, body, kind))
        self._check_model(wanted.model)
        has_logprobs = wanted.told_logprobs is not None
        shape = shape_of(wanted.model, has_logprobs, wanted.tells_usage)
        pieces = self._pieces(wanted)
        if not wanted.stream:
            whole = await _while_connected(request, self._whole(shape, pieces, wanted.n))
            return JSONResponse(whole)
        first = await _while_connected(request, anext(pieces))
        events = self._events(shape, first, pieces, wanted.n)
        return _EventStream(events, media_type="text/event-stream")

    async def _pieces(self, wanted: Wanted) -> AsyncGenerator[Piece, None]:
        """The pieces of all answers to a request, as they are made."""
        prompts = 1 if isinstance(wanted, ChatRequest) else len(wanted.prompt)
        count = prompts * wanted.n
        if count > self.engine.capacity:
            raise ApiError(
                400, f"{count} answers were asked for, of {self.engine.capacity}.", param="n"
            )
        try:
            with self.engine.place(count):
                until = anyio.current_time() + self.limits.seconds
                with anyio.fail_after(self.limits.seconds):
                    asks = await self._asks(wanted)
                left = max(0.0, until - anyio.current_time())
                answer = self.engine.answer(asks, top_logprobs=wanted.told_logprobs, seconds=left)
                async with aclosing(answer) as pieces:
                    async for piece in pieces:
                        if piece.finish_reason:
                            self.metrics.count_answer(piece.figures)
                        yield piece
        except BusyError as error:
            raise busy(f"The server is busy: {error}") from error
        except ContextError as error:
            raise _context_error(str(error)) from error
        except ValueError as error:
            raise ApiError(400, one_line(error)) from error
        except TimeoutError as error:
            message = f"The answer took more than {self.limits.seconds:g} s."
            raise ApiError(503, message, kind="server_error", code="timeout") from error
        except EngineError as error:
            raise ApiError(503, str(error), kind="server_error") from error

    async def _asks(self, wanted: Wanted) -> list[Ask]:
        """The prompts of a request, prepared, each as often as it is to be answered."""
        if isinstance(wanted, ChatRequest):
            urls, texts = wanted.pictures(), sum(map(len, wanted.texts()))
        else:
            urls, texts = [], max(map(len, wanted.prompt))
        if len(urls) > self.limits.images:
            raise ApiError(
                400,
                f"There are {len(urls)} pictures; the limit is {self.limits.images}.",
                param="messages",
                code="too_many_images",
            )
        self._check_length(texts)
        options = wanted.options(self.defaults)
        if options.json_schema is not None:
            compile = partial(options.logits_processors, self.engine.processor)
            await self._compiling.run(compile)
        async with self._holding if any(map(is_remote, urls)) else nullcontext():
            files = await self._fetch(urls)
            workers = self._reading
            if urls:
                pixels = await self._measuring.run(partial(self._pixels, urls, files))
                workers = self._decoding if pixels > SMALL_PIXELS else self._decoding_small
            prepared = await workers.run(partial(self._prepare, wanted, urls, files))
        return [(inputs, own) for inputs in prepared for own in wanted.seeded(options)]

    async def _fetch(self, urls: Sequence[str]) -> dict[str, bytes]:
        """The pictures that are elsewhere; all of a request together have one deadline."""
        until = anyio.current_time() + REMOTE_SECONDS
        files: dict[str, bytes] = {}
        for url in filter(is_remote, urls):
            left = until - anyio.current_time()
            if left <= 0:
                message = f"The pictures at URLs took longer than {REMOTE_SECONDS:g} s."
                raise ApiError(400, message, param="messages", code="invalid_image_url")
            room = min(MAX_BYTES, self.limits.body_bytes - sum(map(len, files.values())))
            if url not in files:
                with _refusing("invalid_image_url"):
                    files[url] = await self.sources.fetch(url, room, min(SECONDS, left))
        return files

    def _check_length(self, characters: int) -> None:
        """Refuses texts that cannot fit, before they are tokenised."""
        processor = self.engine.processor
        if characters > processor.context_length * processor.tokenizer.longest_piece:
            raise _context_error(
                f"The text has {characters:,} characters, more than the model's context of "
                f"{processor.context_length} tokens can hold."
            )

    def _prepare(
        self, wanted: Wanted, urls: Sequence[str], files: Mapping[str, bytes]
    ) -> list[Inputs]:
        """What needs neither the model nor the event loop: decoding, cutting, tokenising."""
        processor = self.engine.processor
        if isinstance(wanted, CompletionRequest):
            return [processor(text, raw=True) for text in wanted.prompt]
        with _refusing("invalid_image"):
            pictures = [
                load_image(file, self.limits.pixels, FORMATS) for file in self._files(urls, files)
            ]
        return [processor(wanted.conversation(pictures))]

    def _files(self, urls: Sequence[str], files: Mapping[str, bytes]) -> Iterator[bytes]:
        """The pictures of a request, from what was fetched and what is at hand."""
        for url in urls:
            with _refusing("invalid_image_url"):
                file = files[url] if url in files else self.sources.read(url)
            yield file

    def _pixels(self, urls: Sequence[str], files: Mapping[str, bytes]) -> int:
        """How many pixels the pictures of a request have, which may not be too many."""
        limit, pixels = self.limits.pixels, 0
        for count, file in enumerate(self._files(urls, files), 1):
            with _refusing("invalid_image"):
                width, height = image_size(file, limit, FORMATS)
            pixels += width * height
            if pixels > limit:
                message = (
                    f"The first {count} pictures have {pixels:,} pixels together; the limit of a "
                    f"request is {limit:,}."
                )
                raise ApiError(400, message, param="messages", code="invalid_image")
        return pixels

    async def _whole(
        self, shape: Shape, pieces: AsyncGenerator[Piece, None], n: int
    ) -> dict[str, Any]:
        """All answers in one reply."""
        answers: dict[int, Piece] = {}
        tally = Tally(n)
        async with aclosing(pieces):
            async for piece in pieces:
                tally.add(piece)
                before = answers.get(piece.index)
                answers[piece.index] = before.then(piece) if before else piece
        return shape.whole([answers[i] for i in sorted(answers)], tally.usage, tally.timings)

    async def _events(
        self, shape: Shape, first: Piece, pieces: AsyncGenerator[Piece, None], n: int
    ) -> AsyncGenerator[str, None]:
        """The answers as server-sent events."""
        tally = Tally(n)
        async with aclosing(pieces):
            try:
                piece: Piece | None = first
                while piece is not None:
                    tally.add(piece)
                    for chunk in shape.chunks(piece):
                        yield _event(chunk)
                    piece = await anext(pieces, None)
            except ApiError as error:
                yield _event(error.body())
                return
        if shape.include_usage:
            yield _event(shape.last_chunk(tally.usage, tally.timings))
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


@contextmanager
def _refusing(code: str) -> Iterator[None]:
    """Errors of pictures as clients read them."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code=code) from error


async def _refuse(_: Request, error: ApiError) -> Response:
    forget(error)  # here, where whatever has not ended still runs
    return error_response(error)


def _context_error(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="context_length_exceeded")


def _http_error(request: Request, error: HTTPException) -> Response:
    """What Starlette refuses: unknown paths and methods."""
    message = f"Invalid URL ({request.method} {request.url.path})"
    code = "unknown_url" if error.status_code == 404 else "method_not_allowed"
    return error_response(ApiError(error.status_code, message, code=code, headers=error.headers))


def _unforeseen(_: Request, __: Exception) -> Response:
    """A mistake of ours; the log has it."""
    return error_response(ApiError(500, "The server made a mistake.", kind="server_error"))
