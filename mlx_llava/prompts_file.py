"""Many prompts -> a record for each, as they are answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from mlx_llava.batch import AnswerError, BatchGenerator
from mlx_llava.command import one_line
from mlx_llava.decoding import Options
from mlx_llava.json_files import Place, decode, field, parse
from mlx_llava.processor import Processor

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
    remaining = enumerate(prompts)
    running: dict[int, dict[str, Any]] = {}
    more = True
    while more or not generator.is_idle:
        while more and generator.free > 0:
            following = next(remaining, None)
            if following is None:
                more = False
                break
            index, prompt = following
            record: dict[str, Any] = {"index": index}
            try:
                data = read(prompt)
                record |= {"id": data["id"]} if "id" in data else {}
                options = replace(defaults, **{k: data[k] for k in data.keys() & _OPTIONS})
                inputs = processor(data["prompt"], data.get("images"), **prompt_options)
                uid = generator.insert(inputs, options)
            except (ValueError, OSError, TypeError, RecursionError) as error:
                yield {**record, "error": one_line(error)}
            else:
                running[uid] = record
        try:
            responses = generator.next()
        except AnswerError as error:
            yield {**running.pop(error.uid), "error": one_line(error)}
            continue
        for uid, response in responses:
            if response.finish_reason:
                yield {**running.pop(uid), "text": response.answer, **response.figures()}


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
