"""Many prompts -> a record for each, as they are answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

from mlx_llava.files import one_line
from mlx_llava.generation.batch import BatchGenerator, answer_each
from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.processor import Inputs, Processor
from mlx_llava.json_files import Place, decode, field, parse

_OPTIONS = {field.name for field in fields(Options)}
_KNOWN = {"prompt", "images", "id", *_OPTIONS}

T = TypeVar("T")


def answer_prompts(
    prompts: Iterable[T],
    read: Callable[[T], Mapping[str, Any]],
    generator: BatchGenerator,
    processor: Processor,
    defaults: Options,
    **prompt_options: Any,
) -> Iterator[dict[str, Any]]:
    """Answers prompts, reading only as far ahead as there are places.

    Args:
        prompts (iterable): What is to be asked.
        read (callable): One of them -> ``prompt``, and perhaps ``images`` (a list), ``id``, and
            fields of `Options` for it alone.
        generator (BatchGenerator): Answers them.
        processor (Processor): Prepares them.
        defaults (Options): For what one does not say.
        **prompt_options: ``raw``, ``system``, ``image_position`` of `Processor`.

    Yields:
        dict: ``index`` of the prompt from 0, its ``id`` if it has one, and either the answer with
        its figures or an ``error``. In the order in which answers end.
    """
    records: dict[int, dict[str, Any]] = {}

    def ask(index: int, prompt: T) -> tuple[Inputs, Options]:
        records[index] = {"index": index}
        data = read(prompt)
        records[index] |= {"id": data["id"]} if "id" in data else {}
        options = replace(defaults, **{k: data[k] for k in data.keys() & _OPTIONS})
        return processor(data["prompt"], data.get("images"), **prompt_options), options

    asks = (partial(ask, index, prompt) for index, prompt in enumerate(prompts))
    for index, outcome in answer_each(generator, asks):
        if isinstance(outcome, Exception):
            yield {**records.pop(index), "error": one_line(outcome)}
        elif outcome.finish_reason:
            yield {**records.pop(index), "text": outcome.answer, **outcome.figures()}


def in_order(lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What `answer_prompts` yields, by index: each waits for those before it."""
    waiting: dict[int, dict[str, Any]] = {}
    following = 0
    for line in lines:
        waiting[line["index"]] = line
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def read_line(name: str, numbered: tuple[int, bytes]) -> dict[str, Any]:
    """What a line of JSON asks.

    Args:
        name (str): The file, for errors.
        numbered (tuple): The line and its number, of `json_files.numbered_lines`.

    Raises:
        ValueError: It is no JSON, has unknown keys, or values of another kind.
    """
    number, line = numbered
    place = Place(name, "line", number)
    data: dict[str, Any] = parse(decode(line, name, number), name, number)
    prompt = field(data, "prompt", (str, list), place)
    unknown = sorted(data.keys() - _KNOWN)
    if unknown:
        known = ", ".join(sorted(_KNOWN))
        raise ValueError(f"{place} has unknown keys {', '.join(unknown):.200}; known: {known}.")
    if isinstance(prompt, list) and not all(isinstance(message, dict) for message in prompt):
        raise ValueError(f"{place} has a list as prompt that holds more than messages.")
    images = field(data, "images", (str, list, type(None)), place, default=None)
    if isinstance(images, list) and not all(isinstance(image, str) for image in images):
        raise ValueError(f"{place} has a list as images that holds more than texts.")
    field(data, "id", (str, int, float, bool, type(None)), place, default=None)
    return data
