"""Measures this package part by part, or in turn with other systems; see benchmark.py."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_llava.decoding import generate_step
from mlx_llava.machine import matmul_rate, read_rate
from mlx_llava.peers import Ours, Peer, Row
from mlx_llava.reuse import PromptCache
from mlx_llava.work import decode_bytes, encode_flops, prefill_flops

Figures: TypeAlias = "dict[str, Any]"


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
class Plan:
    """What to measure.

    Attributes:
        dtype: what to compute in.
        batch: rows at once, one measurement for each.
        images: pictures of a row, one measurement for each.
        max_tokens: the length of every answer.
        repeats: of every measurement.
    """

    dtype: str
    batch: Sequence[int]
    images: Sequence[int]
    max_tokens: int
    repeats: int


class Alone:
    """Measures this package by its own parts."""

    def __init__(self, folder: Path, pictures: list[str], plan: Plan) -> None:
        started = time.perf_counter()
        self.ours = Ours(str(folder), plan.dtype)
        self.load_seconds = time.perf_counter() - started
        self.model, self.processor = self.ours.model, self.ours.processor
        self.pictures, self.plan = pictures, plan
        self.flops = 1e9 * matmul_rate(getattr(mx, plan.dtype))
        self.bytes = 1e9 * read_rate()

    def one(self, images: int) -> Figures:
        """One row, part by part."""
        prompt, paths = rows_of(self.pictures, 1, images)[0]
        language_model, repeats = self.model.language_model, self.plan.repeats
        parts: dict[str, list[float]] = {"preprocess": [], "encode": [], "prefill": [], "token": []}
        for run in range(repeats + 1):
            clock = [time.perf_counter()]
            inputs = self.processor(prompt, paths, raw=True)
            clock.append(time.perf_counter())
            embeddings = self.model.embed(**inputs)
            mx.eval(embeddings)
            clock.append(time.perf_counter())
            steps = generate_step(embeddings, language_model, max_tokens=self.plan.max_tokens)
            next(steps)
            clock.append(time.perf_counter())
            for _ in steps:
                pass
            clock.append(time.perf_counter())
            if run:  # the first one warms up
                for name, a, b in zip(parts, clock, clock[1:], strict=False):
                    parts[name].append(
                        (b - a) / (self.plan.max_tokens - 1 if name == "token" else 1)
                    )
        length = inputs.input_ids.shape[1]
        found: Figures = {"images": images, "prompt_tokens": length}
        found |= {name: spread(times) for name, times in parts.items()}
        first = [sum(times) for times in zip(*list(parts.values())[:3], strict=True)]
        positions = length + self.plan.max_tokens // 2
        work = {
            "encode": encode_flops(self.model.config, sum(inputs.image_tiles)) / self.flops,
            "prefill": prefill_flops(self.model.config, length) / self.flops,
            "token": decode_bytes(self.model, positions) / self.bytes,
        }
        found["first"] = spread(first)
        found["of_the_machine"] = {k: w / found[k]["median"] for k, w in work.items()}
        return found

    def follow_up(self) -> Figures:
        """A second question about the same picture, against the first."""
        prompt, paths = rows_of(self.pictures, 1, 1)[0]
        second = prompt.replace("What is in this picture?", "Which colours are there?")
        times: dict[str, list[float]] = {"first": [], "follow_up": []}
        for _ in range(self.plan.repeats):
            cache = PromptCache(self.model)
            for name, text in (("first", prompt), ("follow_up", second)):
                started = time.perf_counter()
                inputs = self.processor(text, paths, raw=True)
                content = cache.prompt(inputs)
                kv, known = cache.begin(content, self.model.language_model.make_cache())
                (embeddings,) = cache.embed([content], [known])
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
        for _ in range(self.plan.repeats):
            started = time.perf_counter()
            first, _ = self.ours.answer(rows, self.plan.max_tokens)
            whole.append(time.perf_counter() - started)
            decoding.append(batch * (self.plan.max_tokens - 1) / (whole[-1] - first))
        return {
            "batch": batch,
            "images": images,
            "seconds": spread(whole),
            "tokens_per_second": batch * self.plan.max_tokens / statistics.median(whole),
            "decode_tokens_per_second": spread(decoding),
        }

    def measure(self) -> Figures:
        """Everything."""
        tell("one row")
        single = [self.one(images) for images in sorted({*self.plan.images, 1, 2})]
        tell("a follow-up question")
        follow_up = self.follow_up()
        batches = []
        for images in self.plan.images:
            for batch in self.plan.batch:
                tell(f"{batch} rows of {images} pictures")
                batches.append(self.batch(batch, images))
        return {
            "matmul_gflops": self.flops / 1e9,
            "read_gb_per_second": self.bytes / 1e9,
            "load": self.load_seconds,
            "single": single,
            "follow_up": follow_up,
            "batches": batches,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }


def tell(what: str) -> None:
    """Says on stderr what is being measured."""
    print(f"measuring {what} ...", file=sys.stderr)


def compare(
    folder: Path, pictures: list[str], plan: Plan, names: Sequence[str], pythons: Mapping[str, str]
) -> list[Figures]:
    """Runs this package and others in turn, A B A B, on the same checkpoint and the same rows.

    Args:
        folder (Path): The checkpoint.
        pictures (list of str): Paths, as many as the largest batch has.
        plan (Plan): What to measure.
        names (list of str): The other systems.
        pythons (dict): The interpreter of a system's environment, if it is another.

    Returns:
        list of dict: For each batch and number of pictures, medians and ratios.
    """
    found = []
    with ExitStack() as stack:
        peers = []
        for name in ["mlx_llava", *names]:
            peers.append(Peer(name, folder, plan.dtype, pythons.get(name)))
            stack.callback(peers[-1].close)
        for images in plan.images:
            for batch in plan.batch:
                tell(f"{batch} rows of {images} pictures")
                rows = rows_of(pictures, batch, images)
                asked = peers if batch == 1 else [p for p in peers if p.system != "mlx-vlm"]
                runs: dict[str, list[Figures]] = {peer.system: [] for peer in asked}
                for turn in range(plan.repeats + 1):
                    for peer in asked:
                        answer = peer.answer(rows, plan.max_tokens)
                        if turn or plan.repeats == 1:  # the first turn warms up
                            runs[peer.system].append(answer)
                versions = {peer.system: peer.versions for peer in asked}
                found.append(
                    {"batch": batch, "images": images, "versions": versions, **_ratios(runs)}
                )
    return found


def _ratios(runs: dict[str, list[Figures]]) -> Figures:
    """Each system's medians, and ours by theirs, turn by turn."""
    systems: Figures = {}
    for name, turns in runs.items():
        tokens = turns[0]["tokens"]
        count = sum(len(row) for row in tokens)
        systems[name] = {
            "seconds": spread([turn["seconds"] for turn in turns]),
            "tokens_per_second": spread([count / turn["seconds"] for turn in turns]),
            "peak_gb": turns[-1]["peak_gb"],
        }
        if len(tokens) == 1 and count > 1:
            rates = [(count - 1) / (turn["seconds"] - turn["first"]) for turn in turns]
            systems[name]["first"] = spread([turn["first"] for turn in turns])
            systems[name]["decode_tokens_per_second"] = spread(rates)
    ours, ratios = runs["mlx_llava"], {}
    for name, turns in runs.items():
        if name == "mlx_llava":
            continue
        pairs = list(zip(ours, turns, strict=True))
        ratio: Figures = {
            "throughput": spread([theirs["seconds"] / mine["seconds"] for mine, theirs in pairs]),
            "peak_memory": ours[-1]["peak_gb"] / turns[-1]["peak_gb"],
            "same_tokens": [turn["tokens"] for turn in turns] == [turn["tokens"] for turn in ours],
        }
        if "first" in systems[name]:
            ratio["first"] = spread([mine["first"] / theirs["first"] for mine, theirs in pairs])
            decode = [
                (theirs["seconds"] - theirs["first"]) / (mine["seconds"] - mine["first"])
                for mine, theirs in pairs
            ]
            ratio["decode"] = spread(decode)
        ratios[name] = ratio
    return {"systems": systems, "ratios": ratios}
