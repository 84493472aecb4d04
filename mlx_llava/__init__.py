"""LLaVA in MLX: load a checkpoint, ask about a picture.

from mlx_llava import load, generate
model, processor = load("mlx-community/llava-1.5-7b-4bit")
print(generate(model, processor, "What is in this picture?", image="photo.jpg"))
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlx_llava.interrupts import end_by_interrupt, is_command
from mlx_llava.version import __version__

if TYPE_CHECKING:
    from mlx_llava.checkpoint.convert import convert
    from mlx_llava.checkpoint.load import load
    from mlx_llava.generation.jobs import batch_generate
    from mlx_llava.generation.response import GenerationResponse
    from mlx_llava.generation.stream import generate, stream_generate
    from mlx_llava.inputs.image import load_image
    from mlx_llava.inputs.processor import Processor
    from mlx_llava.model.config import LlavaConfig
    from mlx_llava.model.llava import Llava

__all__ = [
    "GenerationResponse",
    "Llava",
    "LlavaConfig",
    "Processor",
    "__version__",
    "batch_generate",
    "convert",
    "generate",
    "load",
    "load_image",
    "stream_generate",
]

#: Where each name is, which is imported when it is first used.
_PLACES = {
    "GenerationResponse": "generation.response",
    "Llava": "model.llava",
    "LlavaConfig": "model.config",
    "Processor": "inputs.processor",
    "batch_generate": "generation.jobs",
    "convert": "checkpoint.convert",
    "generate": "generation.stream",
    "load": "checkpoint.load",
    "load_image": "inputs.image",
    "stream_generate": "generation.stream",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'mlx_llava' has no attribute {name!r}")
    value = getattr(import_module(f"mlx_llava.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """`generate` and `convert` stay functions where commands of the same names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _PLACES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if is_command():
    end_by_interrupt()  # until `arguments.command` runs it
