"""One of several ranks, which answers prompts with parts of models; see test_sharding.py.

    python -m tests.model.rank FOLDER

Reads FOLDER/jobs-SIZE.json, and writes what it finds to FOLDER/RANK-of-SIZE.json.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mlx_llava import load  # isort: skip - before mlx.core, for its BLAS
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_llava import batch_generate, stream_generate
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.steps import generate_step
from mlx_llava.inputs.processor import Processor
from mlx_llava.model import pipeline
from mlx_llava.model.batch_cache import make_batch_cache
from mlx_llava.model.cache import fork
from mlx_llava.model.llava import Llava
from tests.conftest import as_on

#: Of prompts through a pipeline: those of tiny models are short.
CHUNK = 16
#: How many tokens are made of a prompt, and of each of several.
TOKENS = 2
LENGTHS = (2, 5, 3)


def observe(model: Llava, processor: Processor, folder: Path, whole: bool) -> dict[str, Any]:
    """What a model says to the prompts and images in a folder, in as many ways as there are."""
    prompts = json.loads((folder / "prompts.json").read_text())
    images = [
        [Image.open(folder / f"{row}-{i}.png") for i in range(text.count("<image>"))]
        for row, text in enumerate(prompts)
    ]
    inputs = processor(prompts, images, raw=True)
    logits, mask = np.array(model(**inputs)), inputs.attention_mask
    alone = processor(prompts[0], images[0], raw=True)
    steps = generate_step(model.embed(**alone), model.language_model, max_tokens=TOKENS)
    seen = {
        "logits": logits if mask is None else logits[np.array(mask) > 0],
        "tokens": [token for token, _ in steps],
    }
    if not whole:
        return seen
    options = {"max_tokens": LENGTHS[: len(prompts)], "prompt_options": {"raw": True}}
    seen["rows"] = batch_generate(model, processor, prompts, images, batch_size=2, **options)
    cache, again, told = PromptCache(model), [], []
    for more in ("", " A cat. USER: Why? ASSISTANT:"):
        stream = stream_generate(
            *(model, processor, prompts[0] + more, images[0]),
            raw=True,
            max_tokens=4,
            prompt_cache=cache,
            prefill_step=20,
            prompt_progress_callback=lambda *now: told.append(now),
        )
        again += [(part.token, part.cached_tokens) for part in stream]
    return {**seen, "again": again, "told": (told[0], told[-1])}


def held(model: Llava) -> int:
    """The bytes of the decoder's layers."""
    layers: dict[str, mx.array] = dict(
        tree_flatten([x.parameters() for x in model.language_model.layers])
    )
    return sum(array.nbytes for array in layers.values())


def _counting(operation: Any, count: Counter[str], x: mx.array, *args: Any, **how: Any) -> mx.array:
    count[operation.__name__] += 1
    count["bytes"] += x.nbytes
    return operation(x, *args, **how)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """What this rank gives to others, by the operation: how often, and how many bytes."""
    count: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for operation in (mx.distributed.all_sum, mx.distributed.all_gather, mx.distributed.send):
            patch.setattr(mx.distributed, operation.__name__, partial(_counting, operation, count))
        yield count


def steps_counted(model: Llava, processor: Processor, folder: Path) -> list[dict[str, int]]:
    """What crosses for the images of a prompt, its prefill, and a token of one row and of three."""
    prompts = json.loads((folder / "prompts.json").read_text())
    images = [Image.open(path) for path in sorted(folder.glob("0-*.png"))]
    inputs = processor(prompts[0], images, raw=True)
    decoder, cache, found = model.language_model, model.language_model.make_cache(), []
    with counted() as count:
        embeddings = model.embed(**inputs)
    found.append(dict(count))
    batch = make_batch_cache()
    with counted() as count:
        mx.eval(decoder(input_embeddings=embeddings, cache=cache, last_only=True))
    found.append(dict(count, tokens=embeddings.shape[1]))
    for _ in range(3):
        batch.join(fork(cache, cache[0].offset))
    with counted() as count:
        mx.eval(decoder(mx.array([[7]]), cache=cache))
    found.append(dict(count))
    with counted() as count:
        mx.eval(decoder(mx.array([[7]] * 3), cache=batch.step([1, 1, 1])))
    found.append(dict(count))
    return found


def differences(ours: dict[str, Any], folder: Path, machine: str) -> dict[str, Any]:
    """How far from what one process gave logits are, of the largest one, and what is another."""
    theirs = json.loads((folder / f"{machine}.json").read_text())
    logits = np.load(folder / f"{machine}.npy")
    error = np.abs(ours.pop("logits") - logits).max() / np.abs(logits).max()
    same = json.loads(json.dumps(ours))
    differ = [name for name in same if same[name] != theirs[name]]
    return {"error": float(error), "differ": differ, "whole": theirs["held"]}


def do(job: dict[str, Any], group: mx.distributed.Group) -> dict[str, Any]:
    """What a job finds: a refusal, or how answers differ, or what crosses."""
    folder = Path(job["folder"])
    try:
        model, processor = load(folder, as_stored=True, group=group, **job["how"])
    except ValueError as error:
        return {"refused": str(error)}
    with as_on(job["machine"]):
        if job["count"]:
            return {"crosses": steps_counted(model, processor, folder)}
        seen = observe(model, processor, folder, job["whole"])
        return {**differences(seen, folder, job["machine"]), "held": held(model)}


def main() -> None:
    """Does all jobs of a folder for this number of ranks."""
    folder = Path(sys.argv[1])
    group = mx.distributed.init(strict=True, backend="ring")
    jobs = json.loads((folder / f"jobs-{group.size()}.json").read_text())
    pipeline.CHUNK = CHUNK
    found = [do(job, group) for job in jobs]
    (folder / f"{group.rank()}-of-{group.size()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
