"""Measures this package part by part; see benchmark.py."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_llava.analysis.flops import work_of
from mlx_llava.analysis.machine import clock, matmul_rate, read_rate
from mlx_llava.analysis.predict import expect_here
from mlx_llava.checkpoint.load import load
from mlx_llava.generation.batch import BatchGenerator, run
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.sampling import Options
from mlx_llava.generation.steps import generate_step
from mlx_llava.generation.stream import generate, stream_generate
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.llava import Llava

Figures: TypeAlias = "dict[str, Any]"
#: A raw prompt, with a mark for each picture, and the pictures' paths.
Row: TypeAlias = "tuple[str, Sequence[str]]"
PARTS = ("preprocess", "encode", "prefill", "token")
CONTEXTS = (64, 256, 1024)


def spread(times: Sequence[float]) -> Figures:
    """The median of some measurements, and the least and the greatest."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def draw_pictures(folder: Path, count: int) -> list[str]:
    """Writes photographs of noise, of a camera's proportions, each another; returns their paths."""
    paths = []
    for seed in range(count):
        noise = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
        paths.append(str(folder / f"{seed}.png"))
        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def rows_of(pictures: Sequence[str], batch: int, images: int) -> list[Row]:
    """Prompts with pictures of their own."""
    text = "USER: " + "<image>\n" * images + "What is in this picture? ASSISTANT:"
    return [(text, list(pictures[i * images : (i + 1) * images])) for i in range(batch)]


def load_endless(folder: str | Path, dtype: str | None, **shares: Any) -> tuple[Llava, Processor]:
    """A model that nothing but ``max_tokens`` ends the answers of; more options are of `load`."""
    model, processor = load(folder, dtype=dtype, **shares)
    processor.eos_ids = frozenset()
    template: Any = processor.template  # one of several dataclasses
    processor.template = replace(template, stops=())
    return model, processor


def answer_rows(
    model: Llava, processor: Processor, rows: Sequence[Row], max_tokens: int
) -> tuple[float, list[list[int]]]:
    """Answers rows together: the seconds until a first token, and the tokens of each row."""
    started, first = time.perf_counter(), 0.0
    inputs = [processor(prompt, list(images), raw=True) for prompt, images in rows]
    tokens: list[list[int]] = [[] for _ in rows]
    if len(rows) == 1:
        parts = stream_generate(model, processor, inputs[0], max_tokens=max_tokens)
        answers: Iterable[tuple[int, GenerationResponse]] = ((0, part) for part in parts)
    else:
        generator = BatchGenerator(model, processor, batch_size=len(rows))
        for one in inputs:
            generator.insert(one, Options(max_tokens))
        answers = run(generator)
    for row, part in answers:
        first = first or time.perf_counter() - started
        tokens[row].append(part.token)
    return first, tokens


class Alone:
    """Measures this package by its own parts.

    Takes a checkpoint, what loads it, paths of as many pictures as the largest batch has (2 at
    least), the length of every answer, and how often to measure each thing.
    """

    def __init__(
        self,
        folder: Path,
        load: Callable[[], tuple[Llava, Processor]],
        pictures: list[str],
        max_tokens: int,
        repeats: int,
    ) -> None:
        self.folder, self.pictures = folder, pictures
        self.max_tokens, self.repeats = max_tokens, repeats
        started = time.perf_counter()
        self.model, self.processor = load()
        self.load_seconds = time.perf_counter() - started
        self.flops = 1e9 * matmul_rate(self.model.language_model.dtype)
        self.bytes = 1e9 * read_rate()

    @property
    def dtype(self) -> str:
        """What the decoder computes in."""
        return str(self.model.language_model.dtype).removeprefix("mlx.core.")

    def _decode(self, embeddings: mx.array) -> tuple[float, float]:
        """Seconds to read a prompt, and for each token after the first."""
        started = time.perf_counter()
        steps = generate_step(embeddings, self.model.language_model, max_tokens=self.max_tokens)
        next(steps)
        read = time.perf_counter()
        count = len(list(steps))
        return read - started, (time.perf_counter() - read) / count

    def one(self, images: int) -> Figures:
        """One row, part by part."""
        prompt, paths = rows_of(self.pictures, 1, images)[0]
        runs = []
        for _ in range(self.repeats + 1):
            started = time.perf_counter()
            inputs = self.processor(prompt, paths, raw=True)
            prepared = time.perf_counter()
            embeddings = self.model.embed(**inputs)
            mx.eval(embeddings)
            encoded = time.perf_counter()
            runs.append((prepared - started, encoded - prepared, *self._decode(embeddings)))
        times = list(zip(*runs[1:], strict=True))  # the first run warms up
        length = inputs.input_ids.shape[1]
        found: Figures = {"images": images, "prompt_tokens": length}
        found |= {name: spread(seconds) for name, seconds in zip(PARTS, times, strict=True)}
        found["first"] = spread([sum(run[:3]) for run in runs[1:]])
        work = work_of(self.model, inputs, self.max_tokens)
        least = {
            "encode": work.encode / self.flops,
            "prefill": work.prefill / self.flops,
            "token": work.token / self.bytes,
        }
        found["of_the_machine"] = {k: s / found[k]["median"] for k, s in least.items()}
        return found

    def expected(self) -> Figures:
        """What `doctor --model` would say of one row with one picture."""
        prompt, paths = rows_of(self.pictures, 1, 1)[0]
        return expect_here(self.model, self.processor(prompt, paths, raw=True), self.max_tokens)

    def context(self, length: int) -> Figures:
        """A prompt of text of some length."""
        embeddings = self.model.language_model.model.embed_tokens(mx.zeros((1, length), mx.int32))
        runs = [self._decode(embeddings) for _ in range(self.repeats)]
        prefill, token = zip(*runs, strict=True)
        return {"prompt_tokens": length, "prefill": spread(prefill), "token": spread(token)}

    def follow_up(self) -> Figures:
        """A second question about the same picture, against the first."""
        prompt, paths = rows_of(self.pictures, 1, 1)[0]
        second = prompt.replace("What is in this picture?", "Which colours are there?")

        def answer(question: str, cache: PromptCache) -> None:
            inputs = self.processor(question, paths, raw=True)
            generate(self.model, self.processor, inputs, max_tokens=1, prompt_cache=cache)

        times = []
        for _ in range(self.repeats):
            cache = PromptCache(self.model)
            times.append([clock(answer, question, cache) for question in (prompt, second)])
        first, follow_up = zip(*times, strict=True)
        ratio = spread([after / before for before, after in times])
        return {"first": spread(first), "follow_up": spread(follow_up), "ratio": ratio}

    def batch(self, batch: int, images: int) -> Figures:
        """Several rows at once: all of it, and what comes after each row's first token."""
        rows = rows_of(self.pictures, batch, images)
        whole, decoding = [], []
        for _ in range(self.repeats):
            started = time.perf_counter()
            first, _ = answer_rows(self.model, self.processor, rows, self.max_tokens)
            whole.append(time.perf_counter() - started)
            decoding.append(batch * (self.max_tokens - 1) / (whole[-1] - first))
        return {
            "batch": batch,
            "images": images,
            "seconds": spread(whole),
            "tokens_per_second": batch * self.max_tokens / statistics.median(whole),
            "decode_tokens_per_second": spread(decoding),
        }

    def start(self) -> Figures | None:
        """A whole process, from the shell to the first word and its end, where it is one."""
        if self.model.ranks.size > 1:
            return None
        command = [sys.executable, "-m", "mlx_llava.generate", "--model", str(self.folder)]
        command += ["--image", self.pictures[0], "--prompt", "What is this?", "--max-tokens", "1"]
        start = partial(subprocess.run, command, check=True, capture_output=True)
        times = [clock(start) for _ in range(self.repeats + 1)]
        return spread(times[1:])  # the first one fills the system's caches

    def grow(self, requests: int) -> Figures:
        """How the memory of this process grows with short prompts, after some to warm up."""
        for count in (max(20, requests // 10), requests):
            before = resident_bytes()
            for _ in range(count):
                answer_rows(self.model, self.processor, rows_of(self.pictures, 1, 1), 2)
        growth = resident_bytes() / before - 1
        return {"requests": requests, "resident_gb": before / 1e9, "growth": growth}

    def measure(self, batch: Sequence[int], images: Sequence[int], requests: int = 0) -> Figures:
        """Everything: of each number of rows, and of pictures a row; requests are `grow`'s."""
        tell("the start of a process")
        start = self.start()
        tell("one row")
        single = [self.one(count) for count in sorted({*images, 1, 2})]
        tell("contexts")
        limit = self.processor.context_length - self.max_tokens
        contexts = [self.context(length) for length in CONTEXTS if length <= limit]
        tell("a follow-up question")
        follow_up = self.follow_up()
        batches = []
        for count in images:
            for rows in batch:
                tell(f"{rows} rows of {count} pictures")
                batches.append(self.batch(rows, count))
        return {
            "matmul_gflops": self.flops / 1e9,
            "read_gb_per_second": self.bytes / 1e9,
            "load": self.load_seconds,
            "start": start,
            "single": single,
            "contexts": contexts,
            "follow_up": follow_up,
            "batches": batches,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "expected": self.expected(),  # after the peak, which its layers would raise
            "growth": self.grow(requests) if requests else None,
        }


def resident_bytes() -> int:
    """The memory that this process holds now (Linux), or has held at most."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def tell(what: str) -> None:
    """Says on stderr what is being measured."""
    print(f"measuring {what} ...", file=sys.stderr)


def _start_lines(alone: Figures) -> list[str]:
    if not alone["start"]:
        return []
    seconds = alone["start"]["median"]
    return [f"from the shell to the first word and the end of the process: {seconds:.2f} s"]


def lines(alone: Figures) -> list[str]:
    """What `Alone.measure` found, for people."""
    found = [
        f"machine: matmul {alone['matmul_gflops']:.0f} GFLOP/s, reads "
        f"{alone['read_gb_per_second']:.1f} GB/s; load {alone['load']:.2f} s; peak memory of MLX "
        f"{alone['peak_memory_gb']:.2f} GB",
        *_start_lines(alone),
        "images  tokens  preprocess  encode  prefill  first token  s per token  "
        "of the machine: encode prefill token",
    ]
    form = "{:6}  {:6}  {:10.3f}  {:6.3f}  {:7.3f}  {:11.3f}  {:11.4f}  {:22.0%} {:7.0%} {:5.0%}"
    for row in alone["single"]:
        times = [
            row[name]["median"] for name in ("preprocess", "encode", "prefill", "first", "token")
        ]
        shares = row["of_the_machine"].values()
        found.append(form.format(row["images"], row["prompt_tokens"], *times, *shares))
    one, expected = alone["single"][0], alone["expected"]
    found.append(
        f"expected of 1 image by calculation: first token in {expected['first_token']:.3f} s, "
        f"{expected['first_token'] / one['first']['median']:.2f} of what was measured; "
        f"{expected['token']:.4f} s per token, {expected['token'] / one['token']['median']:.2f}"
    )
    found += [
        f"text of {row['prompt_tokens']} tokens: prefill {row['prefill']['median']:.3f} s, "
        f"{row['token']['median']:.4f} s per token"
        for row in alone["contexts"]
    ]
    follow = alone["follow_up"]
    found.append(
        f"follow-up question: first token in {follow['follow_up']['median']:.3f} s, "
        f"{follow['ratio']['median']:.1%} of the first question's"
    )
    found.append("rows  images  seconds  tokens/s  decode tokens/s")
    found += [
        f"{row['batch']:4}  {row['images']:6}  {row['seconds']['median']:7.2f}  "
        f"{row['tokens_per_second']:8.1f}  {row['decode_tokens_per_second']['median']:15.1f}"
        for row in alone["batches"]
    ]
    if alone["growth"]:
        found.append(
            f"after {alone['growth']['requests']} more short prompts, resident memory had grown by "
            f"{alone['growth']['growth']:.2%}"
        )
    return found
