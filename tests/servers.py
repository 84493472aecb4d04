"""The server as its command makes it, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import httpx
import openai

from mlx_llava import server
from mlx_llava.arguments import answer_options, given_options
from mlx_llava.inputs.image import data_url, png
from mlx_llava.serving.engine import Engine
from mlx_llava.serving.http import HttpServer
from mlx_llava.serving.models import Models
from mlx_llava.serving.settings import Settings

MODEL = "tiny-llava"
#: How httpx asks; it would make a context for each request, which takes most of the time.
HTTP: dict[str, Any] = {"timeout": 60, "verify": ssl.create_default_context()}


@dataclass(frozen=True)
class Wire:
    """How the clients of an API ask, and what they read.

    Attributes:
        path: where they ask.
        models: where they look which models there are.
        body: what OpenAI's fields of a chat are in it.
        error: the message of an error, of which nothing else may be there.
        prompt_tokens: of an answer.
        takes_urls: whether pictures may be elsewhere, or files.
    """

    path: str
    models: str
    body: Callable[[dict[str, Any]], dict[str, Any]]
    error: Callable[[dict[str, Any]], str]
    prompt_tokens: Callable[[dict[str, Any]], int]
    takes_urls: bool = True


def _openais_error(body: dict[str, Any]) -> str:
    (error,) = body.values()
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


OPENAI = Wire(
    "/v1/chat/completions",
    "/v1/models",
    body=lambda fields: fields,
    error=_openais_error,
    prompt_tokens=lambda answer: answer["usage"]["prompt_tokens"],
)


def _with_parts(fields: dict[str, Any], translate: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Messages whose parts are those of another API."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [*map(translate, message["content"])]}
        for message in fields["messages"]
    ]


def _anthropics_block(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    url = part["image_url"]["url"]
    start, mark, content = url.partition(";base64,")
    if not mark or not start.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    source = {"type": "base64", "media_type": start.removeprefix("data:"), "data": content}
    return {"type": "image", "source": source}


def _anthropics_body(fields: dict[str, Any]) -> dict[str, Any]:
    body = {"max_tokens": 60, **fields, "messages": _with_parts(fields, _anthropics_block)}
    if schema := body.pop("response_format", None):
        wanted = {"type": "json_schema", "schema": schema["json_schema"]["schema"]}
        body["output_config"] = {"format": wanted}
    return {**body, "stop_sequences": [body.pop("stop")]} if "stop" in body else body


def _anthropics_error(body: dict[str, Any]) -> str:
    assert (set(body), body["type"]) == ({"type", "error"}, "error")
    assert set(body["error"]) == {"type", "message"}
    return body["error"]["message"]


def _anthropics_prompt(answer: dict[str, Any]) -> int:
    usage = answer["usage"]
    return usage["input_tokens"] + usage["cache_read_input_tokens"]


ANTHROPIC = Wire(
    *("/v1/messages", "/v1/models"),
    body=_anthropics_body,
    error=_anthropics_error,
    prompt_tokens=_anthropics_prompt,
)
COUNTING = replace(
    ANTHROPIC,
    path="/v1/messages/count_tokens",
    prompt_tokens=lambda answer: answer["input_tokens"],
)


def _responses_part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {**part, "type": "input_text"}
    return {"type": "input_image", "image_url": part["image_url"]["url"]}


def _responses_body(fields: dict[str, Any]) -> dict[str, Any]:
    body = {**fields, "input": _with_parts(fields, _responses_part)}
    names = {"max_tokens": "max_output_tokens", "response_format": "text"}
    body = {names.get(name, name): value for name, value in body.items() if name != "messages"}
    if "text" in body:
        body["text"] = {"format": {"type": "json_schema", **body["text"]["json_schema"]}}
    return body


RESPONSES = Wire(
    *("/v1/responses", "/v1/models"),
    body=_responses_body,
    error=_openais_error,
    prompt_tokens=lambda answer: answer["usage"]["input_tokens"],
)


def _ollamas_message(message: dict[str, Any]) -> dict[str, Any]:
    """As clients make it of OpenAI's: a text, and pictures in base64 without a `data:` before."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    images = [url.partition("base64,")[2] or url for url in urls]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    return {"role": message["role"], "content": text, "images": images}


def ollamas_chat(fields: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's fields as Ollama's."""
    names = {"max_tokens": "num_predict", "stop": "stop"}
    body: dict[str, Any] = {
        "model": fields["model"],
        "stream": fields.get("stream", False),
        "messages": [*map(_ollamas_message, fields["messages"])],
        "options": {names[name]: fields[name] for name in names if name in fields},
    }
    if "response_format" in fields:
        body["format"] = fields["response_format"]["json_schema"]["schema"]
    return body


def _ollamas_prompt(fields: dict[str, Any]) -> dict[str, Any]:
    """All that is said and shown as one turn."""
    body = ollamas_chat(fields)
    messages = body.pop("messages")
    images = [image for message in messages for image in message["images"]]
    return {**body, "prompt": messages[-1]["content"], "images": images}


def _ollamas_error(body: dict[str, Any]) -> str:
    (message,) = body.values()
    assert isinstance(message, str)
    return message


OLLAMA = Wire(
    "/api/chat",
    "/api/tags",
    body=ollamas_chat,
    error=_ollamas_error,
    prompt_tokens=lambda answer: answer["prompt_eval_count"],
    takes_urls=False,
)
GENERATE = replace(OLLAMA, path="/api/generate", body=_ollamas_prompt)
#: By their names; each is attacked in the same ways.
WIRES = {
    "openai": OPENAI,
    "anthropic": ANTHROPIC,
    "counting": COUNTING,
    "responses": RESPONSES,
    "ollama chat": OLLAMA,
    "ollama generate": GENERATE,
}


@dataclass
class Served:
    """A running server."""

    models: Models
    port: int
    key: str | None
    server: HttpServer
    wire: Wire = OPENAI

    @property
    def engine(self) -> Engine:
        """Of the first model."""
        return next(iter(self.models.engines.values()))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": self.key or "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, **fields: Any) -> httpx.Response:
        """Asks for a chat completion, by OpenAI's fields."""
        body = self.wire.body({"model": MODEL, **fields})
        url = self.url + self.wire.path
        return httpx.post(url, json=body, headers=self.headers, **HTTP)

    def raw(self, request: bytes, timeout: float = 60) -> bytes:
        """All that comes back for some bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as connection:
            connection.sendall(request)
            return receive(connection)


def receive(connection: socket.socket) -> bytes:
    """What a connection gives until it ends."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            answer += part
    return answer


@contextlib.contextmanager
def serving(
    *arguments: str, engine: Engine | None = None, wire: Wire = OPENAI, **limits: Any
) -> Iterator[Served]:
    """Serves with the command's arguments; with an engine that runs already, if one is given.

    Args:
        *arguments: Of the command.
        engine: Instead of loading one.
        wire: Of the API that is asked in.
        **limits: Attributes of `BodyLimit` that no argument sets.
    """
    args = server.build_parser().parse_args(["--port", "0", *arguments])
    settings = Settings(**given_options(args, fields(Settings)))
    defaults = answer_options(args)
    listening = server.listen(settings.host, settings.port)
    models = server.start_models(args, settings) if engine is None else None
    models = models or Models({MODEL: engine}, dict.fromkeys(settings.alias, engine))
    app = server.make_app(models, defaults, settings)
    for name, value in limits.items():
        setattr(app.app, name, value)
    running = server.make_server(app, settings.timeout, models.thread)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield Served(models, listening.getsockname()[1], settings.api_key, running, wire)
    finally:
        running.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"
        if engine is None:
            models.thread.close()


def user(*parts: Any) -> dict[str, Any]:
    """A user's message of texts and PIL pictures."""
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(png(part))}}
            for part in parts
        ],
    }


def endless() -> dict[str, Any]:
    """Options with which the embedded model goes on until its context is full.

    It chooses every digit: what a schema forces is read together, which takes no time.
    """
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": endless_schema()}}
    return {"response_format": format, "max_tokens": 100_000}


def endless_schema() -> dict[str, Any]:
    """What no answer fills."""
    return {"type": "array", "items": {"type": "integer"}, "minItems": 1000}


def waits_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether something becomes so; the time is only for what hangs."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return False
