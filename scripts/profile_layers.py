"""Where the time goes, part by part: encoding a picture, reading a prompt, making a token.

    python scripts/profile_layers.py --shape 1b

Each operation is waited for before the next begins, so that the sum is more than a real run's
time, most of all on a GPU; compare the parts with each other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_llava import load  # isort: skip - before mlx.core, for its BLAS
import mlx.core as mx
import mlx.nn as nn

from mlx_llava.analysis.measure import draw_pictures, rows_of
from mlx_llava.analysis.random_model import SHAPES, write_random_model
from mlx_llava.generation.steps import generate_step
from mlx_llava.model import cache, clip, llama
from mlx_llava.model import linux_cpu as kernels
from mlx_llava.model.device import fast_dtype
from mlx_llava.model.layers import ACTIVATIONS

Seconds = dict[str, float]


def timed(name: str, function: Callable[..., Any], seconds: Seconds) -> Callable[..., Any]:
    """A function that waits for its inputs and its output, and counts the time between."""

    def call(*args: Any, **kwargs: Any) -> Any:
        mx.eval([arg for arg in args if isinstance(arg, mx.array)])
        started = time.perf_counter()
        output = function(*args, **kwargs)
        mx.eval(output)
        seconds[name] += time.perf_counter() - started
        return output

    return call


@contextmanager
def watched(seconds: Seconds) -> Iterator[None]:
    """Puts `timed` functions in the place of what models are made of."""
    places: list[tuple[Any, str, str]] = [
        (kernels.Linear, "__call__", "matmul"),
        (clip.PatchEmbedding, "__call__", "matmul"),
        (nn.QuantizedLinear, "__call__", "quantised matmul"),
        (nn.LayerNorm, "__call__", "norm"),
        (nn.RMSNorm, "__call__", "norm"),
        (llama.Attention, "rope", "rope"),
        (clip, "attention", "attention"),
        (cache, "attention", "attention"),
        (llama, "swiglu", "gate"),
    ]
    saved = [(place, attribute, getattr(place, attribute)) for place, attribute, _ in places]
    quick_gelu = ACTIVATIONS["quick_gelu"]
    for place, attribute, name in places:
        setattr(place, attribute, timed(name, getattr(place, attribute), seconds))
    ACTIVATIONS["quick_gelu"] = timed("gate", quick_gelu, seconds)
    try:
        yield
    finally:
        for place, attribute, function in saved:
            setattr(place, attribute, function)
        ACTIVATIONS["quick_gelu"] = quick_gelu


def report(name: str, total: float, seconds: Seconds, whole: float) -> None:
    """Prints the parts, and what is none of them: additions, copies, the cache."""
    print(f"{name}: {total:.3f} s part by part, {whole:.3f} s as a whole")
    rest = total - sum(seconds.values())
    for part, spent in sorted({**seconds, "other": rest}.items(), key=lambda item: -item[1]):
        print(f"  {part:<18} {spent:8.3f} s  {spent / total:5.1%}")


def profile(folder: Path, dtype: str, tokens: int, picture: str) -> None:
    """Measures one prompt with one picture."""
    seconds: Seconds = defaultdict(float)
    for watching in (False, True):
        with watched(seconds) if watching else contextmanager(lambda: iter([None]))():
            model, processor = load(folder, dtype=dtype)
            prompt, paths = rows_of([picture], 1, 1)[0]
            inputs = processor(prompt, paths, raw=True)
            stages: list[tuple[str, float, Seconds]] = []
            for name in ("warm-up", "encode", "prefill", f"{tokens} tokens"):
                seconds.clear()
                started = time.perf_counter()
                if name in ("warm-up", "encode"):
                    embeddings = model.embed(**inputs)
                    mx.eval(embeddings)
                elif name == "prefill":
                    steps = generate_step(embeddings, model.language_model, max_tokens=tokens + 1)
                    next(steps)
                else:
                    for _ in steps:
                        pass
                stages.append((name, time.perf_counter() - started, dict(seconds)))
        if not watching:
            whole = {name: total for name, total, _ in stages}
    for name, total, parts in stages[1:]:
        report(name, total, parts, whole[name])


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="a folder")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--dtype", default=fast_dtype())
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch) / "model"
        if args.shape:
            write_random_model(args.shape, folder, args.dtype)
        profile(folder, args.dtype, args.tokens, draw_pictures(Path(scratch), 1)[0])


if __name__ == "__main__":
    main()
