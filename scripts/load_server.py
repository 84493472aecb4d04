"""Load a server with many clients at once, and compare every answer with its single run.

python scripts/load_server.py                      # 1,000 requests of 16 clients
python scripts/load_server.py --requests 200 --clients 8 --models 3

The command `mlx_llava.server` runs with the embedded model and few places to wait in, so that
clients are sent away (429) and come again. Of the requests, half have a picture, a third is
streamed, a third sampled with a seed, 5 % are cancelled at their first word and 5 % are broken in
one of several ways. Prints a line of JSON; exits 1 where an answer is wrong, a broken request is
not refused, something hangs, or places stay taken. With several models, some questions first let
their model be unloaded. `resident_mb` is the server's memory before and
after, `growth_percent` what it grew by. As many requests of other kinds go before, uncounted, so
that caches are full.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_llava import generate, load  # isort: skip - before all else, for its BLAS
import openai

from mlx_llava.inputs.image import data_url, png

import shapes  # isort: skip
from served import served

ROOT = Path(__file__).parent.parent
#: Name -> folder.
MODELS = {
    "tiny-llava": ROOT / "weights" / "tiny-llava",
    "llava": ROOT / "tests" / "goldens" / "llava",
    "next": ROOT / "tests" / "goldens" / "llava_next",
}
#: Of the questions to several models, so many unload theirs first.
UNLOADS = 0.1
PICTURES = 50
#: Few enough to wait that clients are sent away, and a cache that is soon full.
OPTIONS = ("--batch-size", "8", "--max-waiting", "4", "--prompt-cache", "20")
JSON = {"Content-Type": "application/json"}
QUESTIONS = ("Describe the picture.", "What colour is the circle?", "How many shapes are there?")
BROKEN: tuple[dict[str, Any], ...] = (
    {"temperature": 9},
    {"model": "another"},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": []},
    {"tool_choice": "required"},
    {"stop": 5},
)


@dataclass(frozen=True)
class Question:
    """One request: what is asked, and what the client does with it."""

    text: str
    picture: shapes.Scene | None
    seed: int | None
    stream: bool
    fate: str
    broken: int
    model: str
    unloads: bool

    def answer_alone(self, model: Any, processor: Any) -> str:
        """What its model says to it alone."""
        picture = self.picture and self.picture.draw()
        sampling = {"temp": 0.0 if self.seed is None else 0.8, "seed": self.seed}
        return generate(model, processor, self.text, picture, max_tokens=40, **sampling)

    def body(self) -> dict[str, Any]:
        """The request."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.picture:
            url = data_url(png(self.picture.draw()))
            parts.append({"type": "image_url", "image_url": {"url": url}})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": parts}],
        }
        if self.seed is not None:
            body |= {"seed": self.seed, "temperature": 0.8}
        broken = BROKEN[self.broken] if self.fate == "broken" else {}
        return {**body, "max_tokens": 40, "stream": self.stream, **broken}


def make_questions(
    count: int, seed: int, models: Sequence[str] = ("tiny-llava",)
) -> list[Question]:
    """Questions of all kinds, about the same pictures whatever the seed."""
    scenes = [shapes.make_scene(random.Random(i), "seen") for i in range(PICTURES)]
    random_ = random.Random(seed)
    return [
        Question(
            text=random_.choice(QUESTIONS),
            picture=random_.choice([None, random_.choice(scenes)]),
            seed=random_.choice([None, None, random_.randrange(100)]),
            stream=random_.random() < 1 / 3,
            fate=random_.choices(["whole", "cancelled", "broken"], [90, 5, 5])[0],
            broken=random_.randrange(len(BROKEN)),
            model=random_.choice(models),
            unloads=len(models) > 1 and random_.random() < UNLOADS,
        )
        for _ in range(count)
    ]


def ask(url: str, question: Question) -> tuple[str, str, int]:
    """What became of a question, what was said, and how often it was sent away before."""
    if question.unloads:
        body = json.dumps({"model": question.model, "keep_alive": 0}).encode()
        request = urllib.request.Request(f"{url}/api/generate", body, JSON)
        urllib.request.urlopen(request, timeout=60).close()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        sent_away = 0
        while True:
            try:
                return (*_ask_once(client, question), sent_away)
            except openai.RateLimitError as error:
                sent_away += 1
                time.sleep(float(error.response.headers["Retry-After"]) * random.random())


def _ask_once(client: openai.OpenAI, question: Question) -> tuple[str, str]:
    body: dict[str, Any] = question.body()
    try:
        if question.fate == "cancelled":
            with client.chat.completions.create(**{**body, "stream": True}) as stream:
                next(iter(stream))
            return "cancelled", ""
        reply = client.chat.completions.create(**body)
        if question.stream:
            chunks = [chunk.choices[0].delta.content or "" for chunk in reply]
            return "whole", "".join(chunks)
        return "whole", reply.choices[0].message.content
    except (openai.BadRequestError, openai.NotFoundError):
        return "broken", ""


def resident_mb(pid: int) -> float:
    """How much memory a process holds."""
    printed = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True
    )
    return int(printed.stdout) / 1000


def run(
    url: str, pid: int, warm_up: Sequence[Question], questions: Sequence[Question], clients: int
) -> dict[str, Any]:
    """Asks all questions, after others; the figures, and what was wrong."""
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(partial(ask, url), warm_up))
        before = resident_mb(pid)
        started = time.perf_counter()
        results = list(pool.map(partial(ask, url), questions))
        seconds = time.perf_counter() - started
    time.sleep(0.5)
    after = resident_mb(pid)
    with urllib.request.urlopen(f"{url}/metrics") as metrics:
        taken = re.findall(r"^mlx_llava_places_taken\S* (\S+)", metrics.read().decode(), re.M)
    loaded = {name: load(MODELS[name]) for name in {question.model for question in questions}}
    fates = [question.fate for question in questions]
    wrong = [
        (question.model, question.text, said, alone)
        for question, (fate, said, _) in zip(questions, results, strict=True)
        if fate == "whole" and said != (alone := question.answer_alone(*loaded[question.model]))
    ]
    return {
        "requests": len(questions),
        "clients": clients,
        "seconds": round(seconds, 2),
        "fates": dict(Counter(fates)),
        "other_fates": sum(a != b for a, (b, *_) in zip(fates, results, strict=True)),
        "wrong": wrong,
        "sent_away": sum(sent_away for *_, sent_away in results),
        "resident_mb": [round(before, 1), round(after, 1)],
        "growth_percent": round(100 * (after / before - 1), 2),
        "places_taken": sum(map(float, taken)),
    }


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes that run the model together"
    )
    parser.add_argument("--models", type=int, default=1, choices=range(1, len(MODELS) + 1))
    args = parser.parse_args()
    models = [*MODELS][: args.models]
    given = [f"--model={name}={MODELS[name]}" for name in models]
    make = partial(make_questions, args.requests, models=models)
    with served(*OPTIONS, *given, ranks=args.ranks) as server:
        figures = run(server.url, server.pid, make(seed=-1), make(args.seed), args.clients)
    print(json.dumps(figures))
    return int(bool(figures["wrong"] or figures["other_fates"] or figures["places_taken"]))


if __name__ == "__main__":
    sys.exit(main())
