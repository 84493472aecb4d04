"""Serve a model to the clients of OpenAI, Anthropic and Ollama, and a page to people.

    python -m mlx_llava.server --model mlx-community/llava-1.5-7b-4bit

Then http://127.0.0.1:8080 in a browser, or as the base_url http://127.0.0.1:8080/v1 of a client.
"""

from __future__ import annotations

import argparse
import copy
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING

from mlx_llava.arguments import (
    Parser,
    add_answer_arguments,
    add_model_arguments,
    add_options,
    add_ranks_arguments,
    answer_options,
    command,
    given_options,
    load_model,
    say_if_embedded,
)
from mlx_llava.checkpoint.hub import embedded_model
from mlx_llava.files import expand_home
from mlx_llava.generation.sampling import Options
from mlx_llava.serving.settings import MEGA, Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from mlx_llava.serving.engine import Engine
    from mlx_llava.serving.http import HttpServer

#: So many connections may wait to be taken.
BACKLOG = 512
#: How long a body may take to arrive.
BODY_SECONDS = 30.0
#: What a request may take beyond that and its answers: a slow reader's time.
GRACE_SECONDS = 60


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.server",
        description="Serve a LLaVA model: the APIs of OpenAI and Anthropic below /v1, Ollama's "
        "below /api, and a page for people at /.",
    )
    add_model_arguments(parser)
    add_ranks_arguments(parser)
    add_options(parser, fields(Settings))
    add_answer_arguments(parser)
    return parser


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: The address is taken, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        why = str(error).partition(" (while")[0]
        raise ValueError(f"Cannot listen on {host} port {port}: {why}.") from error


def model_name(model: str | None) -> str:
    """What clients call a model: a hub repository by its name, a folder or file by its last."""
    if model is None:
        return embedded_model().name
    path = expand_home(model)
    return path.resolve().name if path.exists() else model


def start_engine(args: argparse.Namespace) -> Engine:
    """Loads the model in the thread that will own it."""
    from mlx_llava.serving.engine import Engine

    return Engine(
        partial(load_model, args),
        batch_size=args.batch_size,
        max_waiting=args.max_waiting,
        prompt_cache_bytes=args.prompt_cache * MEGA,
    )


def make_app(engine: Engine, name: str, defaults: Options, settings: Settings) -> ASGIApp:
    """The endpoints, and what stands before them."""
    from starlette.middleware.cors import CORSMiddleware

    from mlx_llava.serving.app import OPEN_PATHS, Api
    from mlx_llava.serving.guard import BodyLimit, Guard

    api = Api(engine, name, defaults, settings)
    app: ASGIApp = BodyLimit(api.app(), settings.max_body * MEGA, BODY_SECONDS)
    if settings.allow_origin:
        app = CORSMiddleware(
            app,
            allow_origins=settings.allow_origin,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Api-Key", "Anthropic-Version"],
        )
    seconds = BODY_SECONDS + settings.timeout + GRACE_SECONDS
    return Guard(app, settings, OPEN_PATHS, seconds, api.metrics.count_request)


def make_server(app: ASGIApp, seconds: float, engine: Engine) -> HttpServer:
    """What speaks HTTP; the log, on stderr, has addresses, paths and statuses."""
    import uvicorn
    from uvicorn.config import LOGGING_CONFIG

    from mlx_llava.serving.http import Connection, HttpServer

    log_config = copy.deepcopy(LOGGING_CONFIG)
    log_config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        log_config=log_config,
    )
    return HttpServer(config, seconds, engine.stop)


@command(led=build_parser)
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    try:
        import uvicorn  # noqa: F401 - to miss it before a model is loaded
    except ImportError as error:
        raise ValueError("The server needs more: pip install 'mlx_llava[server]'.") from error
    settings = Settings(**given_options(args, fields(Settings)))
    defaults = answer_options(args)
    with listen(settings.host, settings.port) as listening:
        say_if_embedded(args)
        engine = start_engine(args)
        defaults.constraint(engine.processor)  # refuses a wrong --json-schema
        name = settings.model_id or model_name(args.model)
        app = make_app(engine, name, defaults, settings)
        server = make_server(app, settings.timeout, engine)
        if settings.api_key is None and settings.host not in ("127.0.0.1", "localhost", "::1"):
            print(
                f"warning: anyone who reaches {settings.host} may ask; see --api-key-file",
                file=sys.stderr,
            )
        address, port = listening.getsockname()[:2]
        host = f"[{address}]" if ":" in address else address
        print(f"page: http://{host}:{port} | API: http://{host}:{port}/v1", file=sys.stderr)
        try:
            server.run(sockets=[listening])
        finally:
            engine.close()


if __name__ == "__main__":
    sys.exit(main())
