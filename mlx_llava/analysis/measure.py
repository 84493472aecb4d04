"""Measures this package part by part; see benchmark.py."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_llava.analysis.flops import decode_bytes, encode_flops, prefill_flops
from mlx_llava.analysis.machine import matmul_rate, read_rate
from mlx_llava.analysis.peers import Ours, Row, peak_gb
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.steps import generate_step

Figures: TypeAlias = "dict[str, Any]"
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


@dataclass(frozen=True)
class Workload:
    """What to measure.

    Attributes:
        dtype: what to compute in.
        batch: rows at once, one measurement for each.
        images: pictures of a row, one measurement for each.
        max_tokens: the length of every answer.
        repeats: of every measurement.
        requests: how many short prompts to answer, to see how memory grows; 0 for none.
    """

    dtype: str
    batch: Sequence[int]
    images: Sequence[int]
    max_tokens: int
    repeats: int
    requests: int = 0


class Alone:
    """Measures this package by its own parts."""

    def __init__(self, folder: Path, pictures: list[str], work: Workload) -> None:
        self.folder = folder
        started = time.perf_counter()
        self.ours = Ours(str(folder), work.dtype)
        self.load_seconds = time.perf_counter() - started
        self.model, self.processor = self.ours.model, self.ours.processor
        self.pictures, self.work = pictures, work
        self.flops = 1e9 * matmul_rate(getattr(mx, work.dtype))
        self.bytes = 1e9 * read_rate()

    def _decode(self, embeddings: mx.array) -> tuple[float, float]:
        """Seconds to read a prompt, and for each token after the first."""
        clock = [time.perf_counter()]
        steps = generate_step(
            embeddings, self.model.language_model, max_tokens=self.work.max_tokens
        )
        next(steps)
        clock.append(time.perf_counter())
        for _ in steps:
            pass
        clock.append(time.perf_counter())
        return clock[1] - clock[0], (clock[2] - clock[1]) / (self.work.max_tokens - 1)

    def one(self, images: int) -> Figures:
        """One row, part by part."""
        prompt, paths = rows_of(self.pictures, 1, images)[0]
        runs = []
        for _ in range(self.work.repeats + 1):
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
        positions = length + self.work.max_tokens // 2
        least = {
            "encode": encode_flops(self.model.config, sum(inputs.image_tiles)) / self.flops,
            "prefill": prefill_flops(self.model.config, length) / self.flops,
            "token": decode_bytes(self.model, positions) / self.bytes,
        }
        found["of_the_machine"] = {k: s / found[k]["median"] for k, s in least.items()}
        return found

    def context(self, length: int) -> Figures:
        """A prompt of text of some length."""
        embeddings = self.model.language_model.model.embed_tokens(mx.zeros((1, length), mx.int32))
        runs = [self._decode(embeddings) for _ in range(self.work.repeats)]
        prefill, token = zip(*runs, strict=True)
        return {"prompt_tokens": length, "prefill": spread(prefill), "token": spread(token)}

    def follow_up(self) -> Figures:
        """A second question about the same picture, against the first."""
        prompt, paths = rows_of(self.pictures, 1, 1)[0]
        second = prompt.replace("What is in this picture?", "Which colours are there?")
        times: dict[str, list[float]] = {"first": [], "follow_up": []}
        for _ in range(self.work.repeats):
            cache = PromptCache(self.model)
            for name, text in (("first", prompt), ("follow_up", second)):
                started = time.perf_counter()
                inputs = self.processor(text, paths, raw=True)
                empty = self.model.language_model.make_cache()
                content, kv, cached = cache.begin(inputs, empty)
                (embeddings,) = cache.embed([(content, cached)])
                token, _ = next(
                    generate_step(embeddings, self.model.language_model, cache=kv, max_tokens=1)
                )
                times[name].append(time.perf_counter() - started)
                cache.store(content, [token], kv)
        found: Figures = {name: spread(values) for name, values in times.items()}
        ratios = [b / a for a, b in zip(times["first"], times["follow_up"], strict=True)]
        return {**found, "ratio": spread(ratios)}

    def batch(self, batch: int, images: int) -> Figures:
        """Several rows at once: all of it, and what comes after each row's first token."""
        rows = rows_of(self.pictures, batch, images)
        whole, decoding = [], []
        for _ in range(self.work.repeats):
            started = time.perf_counter()
            first, _ = self.ours.answer(rows, self.work.max_tokens)
            whole.append(time.perf_counter() - started)
            decoding.append(batch * (self.work.max_tokens - 1) / (whole[-1] - first))
        return {
            "batch": batch,
            "images": images,
            "seconds": spread(whole),
            "tokens_per_second": batch * self.work.max_tokens / statistics.median(whole),
            "decode_tokens_per_second": spread(decoding),
        }

    def start(self) -> Figures:
        """A whole process, from the shell to the first word and its end."""
        command = [sys.executable, "-m", "mlx_llava.generate", "--model", str(self.folder)]
        command += ["--image", self.pictures[0], "--prompt", "What is this?", "--max-tokens", "1"]
        times = []
        for run in range(self.work.repeats + 1):
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if run:  # the first one fills the system's caches
                times.append(time.perf_counter() - started)
        return spread(times)

    def grow(self, requests: int) -> Figures:
        """How the memory of this process grows with short prompts, after some to warm up."""
        for count in (max(20, requests // 10), requests):
            before = resident_bytes()
            for _ in range(count):
                self.ours.answer(rows_of(self.pictures, 1, 1), 2)
            growth = resident_bytes() / before - 1
        return {"requests": requests, "resident_gb": before / 1e9, "growth": growth}

    def measure(self) -> Figures:
        """Everything."""
        tell("the start of a process")
        start = self.start()
        tell("one row")
        single = [self.one(images) for images in sorted({*self.work.images, 1, 2})]
        tell("contexts")
        limit = self.processor.context_length - self.work.max_tokens
        contexts = [self.context(length) for length in CONTEXTS if length <= limit]
        tell("a follow-up question")
        follow_up = self.follow_up()
        batches = []
        for images in self.work.images:
            for batch in self.work.batch:
                tell(f"{batch} rows of {images} pictures")
                batches.append(self.batch(batch, images))
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
            "growth": self.grow(self.work.requests) if self.work.requests else None,
        }


def resident_bytes() -> int:
    """The memory that this process holds now (Linux), or has held at most."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return int(peak_gb() * 1e9)


def tell(what: str) -> None:
    """Says on stderr what is being measured."""
    print(f"measuring {what} ...", file=sys.stderr)


def lines(alone: Figures) -> list[str]:
    """What `Alone.measure` found, for people."""
    found = [
        f"machine: matmul {alone['matmul_gflops']:.0f} GFLOP/s, reads "
        f"{alone['read_gb_per_second']:.1f} GB/s; load {alone['load']:.2f} s; peak memory of MLX "
        f"{alone['peak_memory_gb']:.2f} GB",
        f"from the shell to the first word and the end of the process: "
        f"{alone['start']['median']:.2f} s",
        "images  tokens  preprocess  encode  prefill  first token  s per token  "
        "of the machine: encode prefill token",
    ]
    for row in alone["single"]:
        part = row["of_the_machine"]
        found.append(
            f"{row['images']:6}  {row['prompt_tokens']:6}  {row['preprocess']['median']:10.3f}  "
            f"{row['encode']['median']:6.3f}  {row['prefill']['median']:7.3f}  "
            f"{row['first']['median']:11.3f}  {row['token']['median']:11.4f}  "
            f"{part['encode']:22.0%} {part['prefill']:7.0%} {part['token']:5.0%}"
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
