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
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mlx_llava import load  # isort: skip - before mlx.core, for its BLAS
import mlx.core as mx
import mlx.nn as nn

from mlx_llava.analysis.measure import draw_pictures, rows_of
from mlx_llava.analysis.random_model import SHAPES, write_random_model
from mlx_llava.generation.steps import generate_step
from mlx_llava.model import clip, llama
from mlx_llava.model.device import fast_dtype
from mlx_llava.model.llava import Llava

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
def watched(model: Llava, seconds: Seconds) -> Iterator[None]:
    """Puts `timed` functions in the place of what a model is made of."""
    parts: list[tuple[Any, str, str]] = [
        (type(model.language_model.layers[0].mlp.up_proj), "__call__", "matmul"),
        (clip.PatchEmbedding, "__call__", "matmul"),
        (nn.LayerNorm, "__call__", "norm"),
        (nn.RMSNorm, "__call__", "norm"),
        (llama.Attention, "rope", "rope"),
    ]
    held = {"attention": "attention", "gate": "gate", "activation": "gate"}
    for module in model.modules():
        parts += [(module, key, name) for key, name in held.items() if key in vars(module)]
    saved = [(part, attribute, getattr(part, attribute)) for part, attribute, _ in parts]
    for part, attribute, name in parts:
        setattr(part, attribute, timed(name, getattr(part, attribute), seconds))
    try:
        yield
    finally:
        for part, attribute, function in saved:
            setattr(part, attribute, function)


def report(name: str, total: float, seconds: Seconds, whole: float) -> None:
    """Prints the parts, and what is none of them: additions, copies, the cache."""
    print(f"{name}: {total:.3f} s part by part, {whole:.3f} s as a whole")
    rest = total - sum(seconds.values())
    for part, spent in sorted({**seconds, "other": rest}.items(), key=lambda item: -item[1]):
        print(f"  {part:<18} {spent:8.3f} s  {spent / total:5.1%}")


def profile(folder: Path, dtype: str, tokens: int, picture: str) -> None:
    """Measures one prompt with one picture."""
    seconds: Seconds = defaultdict(float)
    model, processor = load(folder, dtype=dtype)
    prompt, paths = rows_of([picture], 1, 1)[0]
    inputs = processor(prompt, paths, raw=True)
    for watching in (False, True):
        with watched(model, seconds) if watching else nullcontext():
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
