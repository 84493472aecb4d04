"""Serve a model to OpenAI's clients, and a page to people.

    python -m mlx_llava.server --model llava-hf/llava-1.5-7b-hf

Then http://127.0.0.1:8080 in a browser, or as the base_url http://127.0.0.1:8080/v1 of a client.
"""

from __future__ import annotations

import argparse
import copy
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mlx_llava.arguments import (
    add_answer_arguments,
    add_model_arguments,
    answer_options,
    command,
    load_model,
    say_if_embedded,
)
from mlx_llava.checkpoint.hub import embedded_model
from mlx_llava.files import expand_home
from mlx_llava.generation.sampling import BATCH_SIZE, Options
from mlx_llava.json_files import read_text
from mlx_llava.serving.pictures import Limits, Sources

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from mlx_llava.serving.engine import Engine
    from mlx_llava.serving.http import HttpServer

HOST, PORT = "127.0.0.1", 8080
#: So many connections may wait to be taken.
BACKLOG = 512
#: What a request may take beyond the arrival of its body and its answers: a slow reader's time.
GRACE_SECONDS = 60
MIN_KEY_LENGTH = 16
MEGA = 1_000_000


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mlx_llava.server",
        description="Serve a LLaVA model: OpenAI's API below /v1, and a page for people at /.",
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--host", default=HOST, help="where to listen (default: %(default)s, this machine only)")
    add("--port", type=int, default=PORT, help="(default: %(default)s; 0 takes a free one)")
    add("--model-id", metavar="NAME", help="what clients call the model (default: its own name)")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--api-key", metavar="KEY", help="what clients must send")
    keys.add_argument("--api-key-file", metavar="FILE", help="a file that holds it")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name of this machine that clients use; repeatable",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a web page of another server that may ask, as https://example.org; repeatable",
    )
    add("--allow-remote-images", action="store_true", help="fetch pictures from public addresses")
    add("--image-root", metavar="DIR", help="a folder whose pictures may be named in requests")
    add("--batch-size", type=int, default=BATCH_SIZE, help="answers at once (default: %(default)s)")
    add("--max-waiting", type=int, default=64, help="answers that wait (default: %(default)s)")
    add("--max-images", type=int, default=Limits.images, help="of a request (default: %(default)s)")
    add(
        "--max-pixels",
        type=int,
        default=Limits.pixels // MEGA,
        help="of a request, in millions (default: %(default)s)",
    )
    add(
        "--max-body",
        type=int,
        default=Limits.body_bytes // MEGA,
        help="of a request, in MB (default: %(default)s)",
    )
    add(
        "--timeout",
        type=float,
        default=Limits.seconds,
        help="seconds for an answer (default: %(default)g)",
    )
    add("--prompt-cache", type=int, default=1000, help="earlier prompts, in MB (default: 1000)")
    add_answer_arguments(parser)
    return parser


def read_api_key(args: argparse.Namespace) -> str | None:
    """The key that was given.

    Raises:
        ValueError: It can be guessed, or is nothing that a header can hold.
    """
    key: str | None = args.api_key
    if args.api_key_file is not None:
        key = read_text(expand_home(args.api_key_file)).strip()
    if key is not None and (len(key) < MIN_KEY_LENGTH or not (key.isascii() and key.isprintable())):
        raise ValueError(
            f"The API key has {len(key)} characters; use at least {MIN_KEY_LENGTH} of ASCII, as "
            "openssl rand -hex 16 makes them."
        )
    return key


@dataclass(frozen=True)
class Settings:
    """What was asked for beside the model, checked before that is loaded."""

    api_key: str | None
    defaults: Options
    sources: Sources
    limits: Limits

    @classmethod
    def read(cls, args: argparse.Namespace) -> Settings:
        """Reads the command's arguments.

        Raises:
            ValueError: They make no sense.
        """
        root = None if args.image_root is None else expand_home(args.image_root)
        if root is not None and not root.is_dir():
            raise ValueError(f"--image-root is {root}, which is no folder.")
        defaults = answer_options(args)
        limits = Limits(
            body_bytes=args.max_body * MEGA,
            images=args.max_images,
            pixels=args.max_pixels * MEGA,
            seconds=args.timeout,
        )
        sources = Sources(remote=args.allow_remote_images, root=root)
        return cls(read_api_key(args), defaults, sources, limits)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: The address is taken, or is none of this machine.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"The port is {port}; it must lie in 0..65535.")
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


def make_app(args: argparse.Namespace, settings: Settings, engine: Engine) -> ASGIApp:
    """The endpoints, and what stands before them."""
    from starlette.middleware.cors import CORSMiddleware

    from mlx_llava.serving.app import OPEN_PATHS, Api
    from mlx_llava.serving.bodies import BodyLimit
    from mlx_llava.serving.guard import Guard

    limits = settings.limits
    api = Api(
        engine,
        name=args.model_id or model_name(args.model),
        defaults=settings.defaults,
        sources=settings.sources,
        limits=limits,
    )
    app: ASGIApp = BodyLimit(api.app(), limits.body_bytes, limits.body_seconds)
    if args.allow_origin:
        app = CORSMiddleware(
            app,
            allow_origins=args.allow_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return Guard(
        app,
        api_key=settings.api_key,
        open_paths=OPEN_PATHS,
        hosts=[host.lower() for host in (*args.allow_host, args.host)],
        origins=args.allow_origin,
        seconds=limits.body_seconds + limits.seconds + GRACE_SECONDS,
        count=api.metrics.count_request,
    )


def make_server(app: ASGIApp, args: argparse.Namespace, engine: Engine) -> HttpServer:
    """What speaks HTTP. It finishes running answers before it ends, and logs no bodies."""
    import uvicorn

    from mlx_llava.serving.http import Connection, HttpServer

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        log_config=_log_config(),
    )
    return HttpServer(config, args.timeout, engine.stop)


def _log_config() -> dict[str, Any]:
    """Uvicorn's own, but with nothing on stdout; the log has addresses, paths and statuses."""
    from uvicorn.config import LOGGING_CONFIG

    config = copy.deepcopy(LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    try:
        import uvicorn  # noqa: F401 - to miss it before a model is loaded
    except ImportError as error:
        raise ValueError("The server needs more: pip install 'mlx_llava[server]'.") from error
    settings = Settings.read(args)
    with listen(args.host, args.port) as listening:
        say_if_embedded(args)
        engine = start_engine(args)
        settings.defaults.logits_processors(engine.processor)  # refuses a wrong --json-schema
        server = make_server(make_app(args, settings, engine), args, engine)
        if settings.api_key is None and args.host not in (HOST, "localhost", "::1"):
            print(
                f"warning: anyone who reaches {args.host} may ask; see --api-key-file",
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
