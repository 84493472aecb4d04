"""What Linux's CPU needs to be fast: `adopt` puts it into a loaded model, as nn.quantize does."""

from __future__ import annotations

import ctypes
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.model import clip, layers, llama
from mlx_llava.model.blas import set_blas_threads
from mlx_llava.model.linux import functions
from mlx_llava.model.linux.decoder import DecoderLayer
from mlx_llava.model.linux.encoder import EncoderLayer
from mlx_llava.model.linux.functions import (
    Function,
    attention,
    gelu,
    gelu_tanh,
    quick_gelu,
    swiglu,
)
from mlx_llava.model.linux.layers import (
    Embedding,
    Linear,
    PatchEmbedding,
    PermutedLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    is_coded,
)
from mlx_llava.model.linux.threads import threads
from mlx_llava.model.quantized import PermutedQuantizedLinear, is_quantized

_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.QuantizedLinear: QuantizedLinear,
    nn.QuantizedEmbedding: QuantizedEmbedding,
    PermutedQuantizedLinear: PermutedLinear,
    clip.PatchEmbedding: PatchEmbedding,
    clip.EncoderLayer: EncoderLayer,
    llama.DecoderLayer: DecoderLayer,
}
_FUNCTIONS: dict[Function, Function] = {
    mx.fast.scaled_dot_product_attention: attention,
    layers.quick_gelu: quick_gelu,
    layers.gelu_tanh: gelu_tanh,
    nn.gelu: gelu,
    layers.swiglu: swiglu,
}


def adopt(model: nn.Module) -> None:
    """Swaps a model's layers, and the functions that they hold, for those of this folder.

    Does nothing on other systems, or where ``MLX_LLAVA_BLAS=off`` is set.
    """
    if not functions.NUMPY:
        return
    _settle_process()
    for module in model.modules():
        if is_coded(module) or not is_quantized(module):
            module.__class__ = _LAYERS.get(type(module), type(module))
        for name, value in list(vars(module).items()):
            if callable(value) and value in _FUNCTIONS:
                setattr(module, name, _FUNCTIONS[value])


@cache
def _settle_process() -> None:
    """One thread below MLX and NumPy each; and one arena that keeps freed memory.

    MLX's CPU backend frees what each operation made; given back to the system, the same pages
    would be asked for, and zeroed, again and again (mallopt(3)).
    """
    set_blas_threads(1)
    threads()
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(arena_max, 1)
        mallopt(trim_threshold, 256 << 20)
        mallopt(mmap_threshold, 32 << 20)
