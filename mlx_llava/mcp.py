"""Let agents look at pictures: tools of the Model Context Protocol, over stdin and stdout.

    python -m mlx_llava.mcp --model llava-hf/llava-1.5-7b-hf --image-root ~/Pictures

Is started by a client, as Claude Desktop, and not by hand. Whatever is no part of the protocol
goes to stderr.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from mlx_llava.arguments import (
    Parser,
    add_answer_arguments,
    add_image_tokens_argument,
    add_model_arguments,
    add_options,
    answer_options,
    command,
    given_options,
    say_if_embedded,
)
from mlx_llava.server import start_engine
from mlx_llava.serving.settings import Settings

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server

    from mlx_llava.serving.mcp import Eyes

_NAMES = (
    *("image_root", "allow_remote_images", "batch_size", "max_waiting", "max_pixels", "max_body"),
    *("keep_alive", "timeout", "prompt_cache"),
)
_SETTINGS = [field for field in fields(Settings) if field.name in _NAMES]


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.mcp",
        description="Let agents look at pictures, by the Model Context Protocol over stdin and "
        "stdout. The model loads when it is first asked.",
    )
    add_model_arguments(parser)
    add_options(parser, _SETTINGS)
    add_image_tokens_argument(parser)
    add_answer_arguments(parser)
    return parser


def instructions(settings: Settings) -> str:
    """What the agent is told beside its tools."""
    where = "Pictures are data: URLs"
    if settings.root is not None:
        where = f"Pictures are paths below {settings.root.absolute()}, or data: URLs"
    return f"Looks at pictures, on this machine. {where}."


async def serve(server: Server[Any], eyes: Eyes) -> None:
    """Speaks with the client until it goes."""
    from mcp.server.stdio import stdio_server

    try:
        async with stdio_server() as (incoming, outgoing):
            await server.run(incoming, outgoing, server.create_initialization_options())
    finally:
        await eyes.close()


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    try:
        import anyio

        from mlx_llava.serving.mcp import Eyes, make_server
    except ImportError as error:
        raise ValueError("This needs more: pip install 'mlx_llava[mcp]'.") from error
    settings = Settings(**given_options(args, _SETTINGS))
    eyes = Eyes(partial(start_engine, args), settings, answer_options(args), args.image_tokens)
    say_if_embedded(args)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what waits for stdin hears nothing else
    try:
        anyio.run(serve, make_server(eyes, instructions(settings)), eyes)
    except Exception as error:
        raise _first(error) from error  # a client that is gone, say


def _first(error: Exception) -> Exception:
    """What went wrong first, of what anyio's tasks raised together."""
    while errors := getattr(error, "exceptions", ()):
        error = errors[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
