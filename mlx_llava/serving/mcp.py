"""Tools for agents that cannot see: a question about a picture -> its answer, as MCP has it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import anyio
from mcp import types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.shared.exceptions import MCPError

from mlx_llava.files import one_line
from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.messages import Message
from mlx_llava.serving.engine import Engine
from mlx_llava.serving.errors import ApiError, refusals
from mlx_llava.serving.images import Images
from mlx_llava.serving.requests import Request
from mlx_llava.serving.settings import MEGA, Settings
from mlx_llava.serving.workers import Workers, forget
from mlx_llava.version import __version__

#: Progress of an answer is told no more often.
REPORT_SECONDS = 0.5
_LOADING = "loading the model"
_IMAGE = "a path below the folder of pictures, or a data: URL of JPEG, PNG, WebP or GIF"
_QUESTION = "what to ask about the picture"

#: Takes what is being done.
Report: TypeAlias = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class Tool:
    """What a client may call.

    Attributes:
        title: for people.
        description: for the model that chooses.
        question: what is asked about the picture; None where the caller says it.
    """

    title: str
    description: str
    question: str | None = None

    @property
    def arguments(self) -> Mapping[str, str]:
        """What it takes, all of it texts, and what each is."""
        return {"image": _IMAGE, **({} if self.question else {"question": _QUESTION})}

    def schema(self) -> dict[str, Any]:
        """JSON's, of the arguments."""
        texts = {n: {"type": "string", "description": d} for n, d in self.arguments.items()}
        required = [*self.arguments]
        return {
            "type": "object",
            "properties": texts,
            "required": required,
            "additionalProperties": False,
        }

    def read(self, given: Mapping[str, Any]) -> tuple[str, str]:
        """The image and the question of a call.

        Raises:
            ValueError: There is something else, or not all.
        """
        texts = {name: value for name, value in given.items() if isinstance(value, str)}
        if texts.keys() != self.arguments.keys() or len(texts) != len(given):
            expected = " and ".join(self.arguments)
            raise ValueError(f"It takes {expected}, as text; found {dict(given)!r:.80}.")
        return texts["image"], self.question or texts["question"]


TOOLS = {
    "look": Tool("Look at a picture", "Looks at a picture and answers a question about it."),
    "describe": Tool(
        "Describe a picture", "Describes what a picture shows.", "Describe this image in detail."
    ),
    "read_text": Tool(
        "Read a picture's text",
        "Reads the text in a picture, such as a sign, a receipt or a screenshot.",
        "What does the text in this image say? Write down the text only.",
    ),
}


class Eyes:
    """Looks at pictures; the model loads when there is the first one.

    Attributes:
        settings: what is allowed.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        settings: Settings,
        options: Options,
        image_tokens: int | None = None,
    ) -> None:
        self.settings, self._load, self._options = settings, load, options
        self._image_tokens = image_tokens
        self._images, self._loader = Images(settings), Workers(1)
        self._loading: asyncio.Future[Engine] | None = None

    async def look(self, image: str, question: str, report: Report) -> str:
        """The answer to a question about an image, as `generate` gives it.

        Raises:
            ApiError: The image is not allowed or cannot be read, the question is too long, too many
                ask at a time, it took too long, or the model has failed.
            ValueError, OSError: The model cannot be read.
        """
        if len(image) > self.settings.max_body * MEGA:
            limit = self.settings.max_body * MEGA
            message = f"The image has {len(image):,} characters; the limit is {limit:,}."
            raise ApiError(413, message, "request_too_large")
        engine, seconds = await self._engine(report), self.settings.timeout
        request = Request(
            model="",
            prompts=[[Message("user", question, images=1)]],
            options=self._options,
            images=[image],
            image_tokens=self._image_tokens,
        )
        request.check_length(engine.processor)
        await report("reading the picture")
        with refusals(seconds), engine.place(request.answers):
            deadline, text = anyio.current_time() + seconds, ""
            with anyio.fail_after(seconds):
                prepare = partial(request.prepare, engine.processor)
                prompts = await self._images.use(request.images, 0, prepare)
            if not engine.is_loaded:  # any more
                await report(_LOADING)
            keep_alive = self.settings.keep_alive_seconds
            async with aclosing(engine.answer(prompts, None, deadline, keep_alive)) as pieces:
                async for piece in pieces:
                    text += piece.text
                    await report("answering")
        return text

    async def close(self) -> None:
        """Ends the model's thread, if there is one."""
        loading = self._loading
        if loading is not None and loading.done() and not loading.exception():
            loading.result().close()

    async def _engine(self, report: Report) -> Engine:
        """The model; who goes while it loads does not stop that, and who comes waits for it too."""
        if self._loading is None:
            self._loading = asyncio.ensure_future(self._loader.run(self._load))
        if not self._loading.done():
            await report(_LOADING)
        try:
            return await asyncio.shield(self._loading)
        except Exception:
            self._loading = None  # so that the next call tries again
            raise


def make_server(eyes: Eyes, instructions: str) -> Server[Any]:
    """What speaks MCP."""

    async def list_tools(*_: Any) -> types.ListToolsResult:
        hints = types.ToolAnnotations(
            read_only_hint=True, open_world_hint=eyes.settings.allow_remote_images
        )
        return types.ListToolsResult(tools=[_listed(name, hints) for name in TOOLS])

    async def call_tool(
        context: ServerRequestContext[Any], call: types.CallToolRequestParams
    ) -> types.CallToolResult:
        tool = TOOLS.get(call.name)
        if tool is None:
            known = ", ".join(TOOLS)
            message = f"There is no tool {call.name!r:.80}; known: {known}."
            raise MCPError(types.INVALID_PARAMS, message)
        try:
            image, question = tool.read(call.arguments or {})
            return _result(await eyes.look(image, question, _reporter(context)))
        except (ApiError, ValueError, OSError) as error:
            forget(error)
            return _result(one_line(error), is_error=True)

    return Server(
        "mlx_llava",
        version=__version__,
        title="LLaVA",
        instructions=instructions,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def _listed(name: str, hints: types.ToolAnnotations) -> types.Tool:
    tool = TOOLS[name]
    return types.Tool(
        name=name,
        title=tool.title,
        description=tool.description,
        input_schema=tool.schema(),
        annotations=hints,
    )


def _result(text: str, is_error: bool = False) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(text=text)], is_error=is_error)


def _reporter(context: ServerRequestContext[Any]) -> Report:
    """Tells a client how far a call is, where it wants to know that."""
    steps, last, until = 0, "", 0.0

    async def report(what: str) -> None:
        nonlocal steps, last, until
        steps += 1
        if what != last or time.monotonic() > until:
            last, until = what, time.monotonic() + REPORT_SECONDS
            await context.session.report_progress(steps, None, what)

    return report
