"""Serve models to the clients of OpenAI, Anthropic and Ollama, and a page to people.

    python -m mlx_llava.server --model mlx-community/llava-1.5-7b-4bit

Then http://127.0.0.1:8080 in a browser, or as the base_url http://127.0.0.1:8080/v1 of a client.
"""

from __future__ import annotations

import argparse
import copy
import math
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from mlx_llava.arguments import (
    Parser,
    add_adapter_argument,
    add_answer_arguments,
    add_loading_arguments,
    add_options,
    add_share_arguments,
    answer_options,
    command,
    given_options,
    load_model,
    look_at_model,
    say_if_embedded,
)
from mlx_llava.checkpoint.hub import embedded_model
from mlx_llava.files import expand_home
from mlx_llava.generation.sampling import Options
from mlx_llava.model.ranks import rank_here
from mlx_llava.serving.durations import as_seconds
from mlx_llava.serving.settings import MEGA, Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from mlx_llava.serving.engine import Engine
    from mlx_llava.serving.http import HttpServer
    from mlx_llava.serving.model_thread import ModelThread
    from mlx_llava.serving.models import Models

#: What belongs to a checkpoint, so that it cannot be said of several.
OF_ONE_MODEL = "adapter_path base mmproj model_id revision template vision_tower".split()
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
        description="Serve LLaVA models: the APIs of OpenAI and Anthropic below /v1, Ollama's "
        "below /api, and a page for people at /.",
    )
    parser.add_argument(
        "--model",
        action=_Model,
        metavar="[NAME=]MODEL",
        help="a folder, a GGUF file, or a hub repository, and what clients call it; may be given "
        "several times: the first is loaded now, others when they are asked (default: embedded)",
    )
    parser.set_defaults(models=None)
    add_adapter_argument(parser)
    add_loading_arguments(parser)
    add_share_arguments(parser)
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


class _Model(argparse.Action):
    """Reads ``NAME=MODEL``: the first is `model`, and all of them, with their names, `models`."""

    def __call__(self, _: Any, args: argparse.Namespace, given: Any, *__: Any) -> None:
        name, mark, path = given.partition("=")
        if not mark or expand_home(given).exists():
            name, path = "", given
        elif name and not path:
            raise ValueError(f"--model {given} names no checkpoint; say NAME=MODEL.")
        args.models = [*(args.models or ()), (name or None, path)]
        args.model = args.models[0][1]


def named_models(args: argparse.Namespace) -> list[tuple[str | None, argparse.Namespace]]:
    """The name that each model was given, if any, and the arguments with that model alone.

    Raises:
        ValueError: An argument is for one model, and there are several.
    """
    models = args.models or [(None, None)]
    given = [option for option in OF_ONE_MODEL if getattr(args, option) is not None]
    if len(models) > 1 and given:
        flag = f"--{given[0].replace('_', '-')}"
        raise ValueError(f"{flag} is for one model; there are {len(models)} --model.")
    if rank_here() is not None and (len(models) > 1 or not math.isinf(as_seconds(args.keep_alive))):
        raise ValueError("Under mlx.launch there is one --model, which stays: no --keep-alive.")
    return [
        (name or args.model_id, argparse.Namespace(**{**vars(args), "model": model}))
        for name, model in models
    ]


def start_models(args: argparse.Namespace, settings: Settings) -> Models:
    """Opens all models in the thread that will own them, and loads the first.

    Raises:
        ValueError: A checkpoint is none, or two have one name.
    """
    from mlx_llava.serving.models import Models

    engines: dict[str, Engine] = {}
    aliases: dict[str, Engine] = {}
    with _model_thread() as thread:
        for given, one in named_models(args):
            name = given or model_name(one.model)
            if name in engines:
                raise ValueError(f"Two models are called {name}; say --model NAME={one.model}.")
            engines[name] = _open_model(name, one, thread)
            engines[name].keep_alive = settings.keep_alive_seconds
            if given and given != args.model_id:
                aliases[name] = engines[name]
        first = next(iter(engines.values()))
        thread.run(first.load)
    return Models(engines, {**dict.fromkeys(settings.alias, first), **aliases})


def start_engine(args: argparse.Namespace) -> Engine:
    """Loads a model in a thread of its own."""
    with _model_thread() as thread:
        engine = _open_model(model_name(args.model), args, thread)
        thread.run(engine.load)
    return engine


@contextmanager
def _model_thread() -> Iterator[ModelThread]:
    """A new one, which ends again where its models cannot be loaded."""
    from mlx_llava.serving.model_thread import ModelThread

    thread = ModelThread()
    try:
        yield thread
    except Exception:
        thread.close()
        raise


def _open_model(name: str, args: argparse.Namespace, thread: ModelThread) -> Engine:
    from mlx_llava.serving.engine import Engine, ModelFiles

    engine = Engine(
        ModelFiles(name, partial(look_at_model, args), partial(load_model, args)),
        thread,
        batch_size=args.batch_size,
        max_waiting=args.max_waiting,
        prompt_cache_bytes=args.prompt_cache * MEGA,
    )
    args.offline = True  # a folder that is gone later is no repository of that name
    return engine


def make_app(models: Models, defaults: Options, settings: Settings) -> ASGIApp:
    """The endpoints, and what stands before them."""
    from starlette.middleware.cors import CORSMiddleware

    from mlx_llava.serving.app import OPEN_PATHS, Api
    from mlx_llava.serving.guard import BodyLimit, Guard

    api = Api(models, defaults, settings)
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


def make_server(app: ASGIApp, seconds: float, thread: ModelThread) -> HttpServer:
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
    return HttpServer(config, seconds, thread.stop)


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
        models = start_models(args, settings)
        try:
            for engine in models.engines.values():
                defaults.constraint(engine.processor)  # refuses a wrong --json-schema
            app = make_app(models, defaults, settings)
            server = make_server(app, settings.timeout, models.thread)
            if settings.api_key is None and settings.host not in ("127.0.0.1", "localhost", "::1"):
                print(
                    f"warning: anyone who reaches {settings.host} may ask; see --api-key-file",
                    file=sys.stderr,
                )
            address, port = listening.getsockname()[:2]
            host = f"[{address}]" if ":" in address else address
            print(f"page: http://{host}:{port} | API: http://{host}:{port}/v1", file=sys.stderr)
            server.run(sockets=[listening])
        finally:
            models.thread.close()


if __name__ == "__main__":
    sys.exit(main())
