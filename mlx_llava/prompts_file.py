"""A file of prompts -> a line of JSON for each, as they are answered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

from mlx_llava.batch import AnswerError, BatchGenerator
from mlx_llava.command import one_line
from mlx_llava.decoding import Options
from mlx_llava.processor import Processor

_OPTIONS = {field.name for field in fields(Options)}
_KNOWN = {"prompt", "images", "id", *_OPTIONS}


def answer_lines(
    lines: Iterable[str],
    generator: BatchGenerator,
    processor: Processor,
    defaults: Options,
    **prompt_options: Any,
) -> Iterator[dict[str, Any]]:
    """Answers lines of JSON, reading only as far ahead as there are places.

    Args:
        lines (iterable of str): Each an object with ``prompt``, and perhaps ``images`` (a list),
            ``id``, and fields of `Options` for this line alone.
        generator (BatchGenerator): Answers them.
        processor (Processor): Prepares them.
        defaults (Options): For what a line does not say.
        **prompt_options: ``raw``, ``system``, ``image_position`` of `Processor`.

    Yields:
        dict: ``index`` of the line from 0, its ``id`` if it has one, and either the answer with
        its figures or an ``error``. In the order in which answers end.
    """
    remaining = enumerate(line for line in lines if line.strip())
    running: dict[int, dict[str, Any]] = {}
    more = True
    while more or not generator.is_idle:
        while more and generator.free > 0:
            index, line = next(remaining, (-1, ""))
            more = index >= 0
            if not more:
                break
            record: dict[str, Any] = {"index": index}
            try:
                data = _read(line)
                record |= {"id": data["id"]} if "id" in data else {}
                options = replace(defaults, **{k: data[k] for k in data.keys() & _OPTIONS})
                inputs = processor(data["prompt"], data.get("images"), **prompt_options)
                uid = generator.insert(inputs, options)
            except (ValueError, OSError, TypeError) as error:
                yield {**record, "error": one_line(error)}
            else:
                running[uid] = {**record, "text": ""}
        try:
            responses = generator.next()
        except AnswerError as error:
            record = running.pop(error.uid)
            del record["text"]
            yield {**record, "error": one_line(error)}
            continue
        for uid, response in responses:
            running[uid]["text"] += response.text
            if response.finish_reason:
                yield {**running.pop(uid), **response.figures()}


def _read(line: str) -> dict[str, Any]:
    """One line's object; raises ValueError where it is none, or has unknown keys."""
    data = json.loads(line)
    if not isinstance(data, dict) or "prompt" not in data:
        raise ValueError("A line is an object with a prompt, and perhaps images.")
    unknown = sorted(data.keys() - _KNOWN)
    if unknown:
        raise ValueError(f"Unknown keys {', '.join(unknown)}; known: {', '.join(sorted(_KNOWN))}.")
    return data
