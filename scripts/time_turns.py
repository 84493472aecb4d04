"""How long the first token takes in each turn of a conversation about one picture, on a server.

python scripts/time_turns.py                       # CLIP-L/336 and a decoder of 300m, random
python scripts/time_turns.py --shape 7b --dtype float16

Prints a line of JSON: medians over the rounds, each with a picture of its own, in seconds from
sending a request to the first token; and those of the later turns as shares of the first one's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from mlx_llava.analysis.random_model import SHAPES, write_random_model  # isort: skip - first, for its BLAS
import numpy as np
import openai
from PIL import Image

from mlx_llava.inputs.image import data_url, png
from mlx_llava.model.device import DTYPES

from served import served  # isort: skip

QUESTIONS = ("What is in this picture?", "What else?", "Which colours are there?")


def first_tokens(client: openai.OpenAI, model: str, picture: Image.Image) -> list[float]:
    """The seconds to the first token of each turn."""
    seconds = []
    messages: list[Any] = []
    for question in QUESTIONS:
        parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if not messages:
            parts.append({"type": "image_url", "image_url": {"url": data_url(png(picture))}})
        messages.append({"role": "user", "content": parts})
        started = time.perf_counter()
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=16, stream=True
        )
        next(stream)  # a stream opens with the first token, whether that is text or not
        seconds.append(time.perf_counter() - started)
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        messages.append({"role": "assistant", "content": answer})
    return seconds


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="300m")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / args.shape
        write_random_model(args.shape, path, args.dtype)
        pictures = random.integers(0, 256, (args.rounds + 1, 400, 500, 3), "u1")
        with (
            served("--model", str(path)) as server,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
        ):
            rounds = [
                first_tokens(client, args.shape, Image.fromarray(pixels)) for pixels in pictures
            ][1:]
    turns = [median(turn) for turn in zip(*rounds, strict=True)]
    shares = [round(turn / turns[0], 3) for turn in turns]
    figures = {"shape": args.shape, "seconds": [round(t, 3) for t in turns], "shares": shares}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
