"""The table of commands: ``mlx_llava COMMAND`` is ``python -m mlx_llava.COMMAND``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mlx_llava.version import __version__

COMMANDS = {
    "benchmark": "measure speed and memory",
    "caption": "caption folders of pictures",
    "chat": "chat about pictures in the terminal",
    "convert": "make an MLX folder of any checkpoint",
    "doctor": "show what MLX runs on here, and how fast it is",
    "evaluate": "answer question files, and score the answers",
    "explain": "draw what a model looked at while it answered",
    "fuse": "merge what was trained into its model",
    "generate": "ask about pictures",
    "mcp": "let agents look at pictures, by the Model Context Protocol",
    "server": "serve OpenAI's API, and a page for people",
    "train": "align a projector, tune all, or train LoRA layers",
}


def usage() -> str:
    """The text of ``--help``."""
    commands = "\n".join(f"  {name:<10} {job}" for name, job in COMMANDS.items())
    return (
        f"usage: mlx_llava COMMAND ...\n\nLLaVA in MLX, version {__version__}. "
        f"Commands, each with its own --help:\n{commands}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        print(usage(), file=sys.stderr)
        print(f"\nerror: there is no command {name!r}" if name else "", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"mlx_llava.{name}").main(rest)
    return code
