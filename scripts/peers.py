"""Systems that answer prompts: this package, and others to compare it with.

This file is also the program of a process that holds one, `python peers.py SYSTEM FOLDER DTYPE`,
with the Python of an environment that has the system; it then imports nothing of this package. It
reads lines of JSON and answers each with one; see `compare_systems.Peer`.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: A row: a raw prompt, with a mark for each picture, and the pictures' paths.
Row = tuple[str, Sequence[str]]


class Ours:
    """This package."""

    packages = ("mlx_llava", "mlx")

    def __init__(self, folder: str, _: str) -> None:
        from mlx_llava.analysis.measure import answer_rows, load_endless

        self.model, self.processor = load_endless(folder, None)  # computes in what is fast here
        self.answer_rows = answer_rows

    def answer(self, rows: list[Row], max_tokens: int) -> tuple[float, list[list[int]]]:
        """The time until every row has its first token, and the tokens of each row."""
        return self.answer_rows(self.model, self.processor, rows, max_tokens)


class Transformers:
    """Hugging Face's transformers on PyTorch, on a GPU if it has one."""

    packages = ("transformers", "torch")

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        import transformers

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        self.model: Any = model.eval().to(self.device)

    def answer(self, rows: list[Row], max_tokens: int) -> tuple[float, list[list[int]]]:
        from PIL import Image

        started = time.perf_counter()
        images = [[Image.open(path).convert("RGB") for path in paths] for _, paths in rows]
        inputs = self.processor(
            text=[prompt for prompt, _ in rows],
            images=images if any(images) else None,
            return_tensors="pt",
            padding=len(rows) > 1,
        ).to(self.device)
        length, times = inputs["input_ids"].shape[1], []

        class Clock:
            def put(self, _: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        settings = self.model.generation_config
        settings.eos_token_id, settings.pad_token_id = None, 0
        with self.torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                do_sample=False,
                streamer=Clock() if len(rows) == 1 else None,
            )
        # The first `put` is the prompt's.
        return (times[1] - started if times else 0.0), ids[:, length:].tolist()


class MLXVLM:
    """mlx-vlm."""

    packages = ("mlx-vlm", "mlx", "transformers")

    def __init__(self, folder: str, _: str) -> None:
        from mlx_vlm import load

        self.model, self.processor = load(folder)

    def answer(self, rows: list[Row], max_tokens: int) -> tuple[float, list[list[int]]]:
        from mlx_vlm.generate import generate_step
        from mlx_vlm.utils import prepare_inputs

        if len(rows) > 1:
            raise ValueError("batches of pictures are not measured")
        prompt, images = rows[0]
        started, first = time.perf_counter(), 0.0
        inputs = prepare_inputs(
            self.processor, images=list(images), prompts=prompt, add_special_tokens=False
        )
        tokens: list[int] = []
        steps = generate_step(
            inputs.pop("input_ids"),
            self.model,
            inputs.pop("pixel_values", None),
            inputs.pop("attention_mask", None),
            max_tokens=max_tokens,
            temperature=0.0,
            **inputs,
        )
        for token, _ in steps:
            tokens.append(int(token))
            first = first or time.perf_counter() - started
            if len(tokens) == max_tokens:
                break
        return first, [tokens]


class LlamaCpp:
    """llama.cpp, which reads no such checkpoint: random weights of its shape and bits."""

    packages = ("xllamacpp",)

    def __init__(self, folder: str, dtype: str) -> None:
        import xllamacpp

        write_pair = runpy.run_path(str(Path(__file__).with_name("random_gguf.py")))
        config = json.loads(Path(folder, "config.json").read_text())
        kind = "Q4_0" if config.get("quantization") else _GGUF_KINDS[dtype]
        self.files = tempfile.TemporaryDirectory()
        paths = write_pair["write_random_pair"](Path(folder), Path(self.files.name), kind)
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.mmproj.path = map(str, paths)
        settings.n_ctx, settings.n_parallel = 4096, 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = cores
        self.server = xllamacpp.Server(settings)

    def answer(self, rows: list[Row], max_tokens: int) -> tuple[float, list[list[int]]]:
        """Tokens are only counted: other weights give other ones."""
        if len(rows) > 1:
            raise ValueError("batches are not measured")
        ((prompt, paths),) = rows
        urls = [b64encode(Path(path).read_bytes()).decode() for path in paths]
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{url}"}}
            for url in urls
        ]
        job = {
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }
        started, times = time.perf_counter(), []
        chunks: list[Any] = []

        def receive(chunk: Any) -> bool:
            times.append(time.perf_counter() - started)
            chunks.append(chunk)
            return False

        self.server.handle_chat_completions(json.dumps(job), receive)
        count = json.loads(chunks[-1])["timings"]["predicted_n"]
        return times[0], [[-1] * count]


_GGUF_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "F16"}
SYSTEMS: dict[str, Any] = {
    "mlx_llava": Ours,
    "transformers": Transformers,
    "mlx-vlm": MLXVLM,
    "llama.cpp": LlamaCpp,
}


def peak_gb() -> float:
    """The most memory that this process has held; Linux counts in KB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def serve(name: str, folder: str, dtype: str) -> None:
    """The process: loads a system, then does one job for each line of stdin."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    from importlib.metadata import version

    try:
        system = SYSTEMS[name](folder, dtype)
        say({"versions": {p: version(p) for p in system.packages}})
    except Exception as error:  # whatever another system raises
        say({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        job = json.loads(line)
        try:
            started = time.perf_counter()
            first, tokens = system.answer(job["rows"], job["max_tokens"])
            seconds = time.perf_counter() - started
            say({"first": first, "seconds": seconds, "tokens": tokens, "peak_gb": peak_gb()})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules have names of others
    serve(*sys.argv[1:])
