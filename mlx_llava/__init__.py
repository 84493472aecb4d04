"""LLaVA in MLX: load a checkpoint, ask about a picture.

from mlx_llava import load, generate
model, processor = load("llava-hf/llava-1.5-7b-hf")
print(generate(model, processor, "What is in this picture?", image="photo.jpg"))
"""

import warnings

from mlx_llava.checkpoint.load import load
from mlx_llava.convert import convert
from mlx_llava.generate import generate, stream_generate
from mlx_llava.generation.batch import batch_generate
from mlx_llava.generation.steps import GenerationResponse
from mlx_llava.inputs.image import load_image
from mlx_llava.inputs.processor import Processor
from mlx_llava.model import blas as backend  # noqa: F401 - the first of all, before mlx.core
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llava import Llava
from mlx_llava.version import __version__

# `python -m mlx_llava.generate` runs a module that this file has imported already.
warnings.filterwarnings("ignore", message=r".*'mlx_llava\.\w+' found in sys\.modules")

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
