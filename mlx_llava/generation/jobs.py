"""Many prompts -> their answers, or a record for each as it is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

from mlx_llava.files import one_line
from mlx_llava.generation.batch import AnswerError, BatchGenerator
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.sampling import BATCH_SIZE, Options
from mlx_llava.generation.steps import PromptProgress
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.messages import Conversation
from mlx_llava.inputs.processor import Processor
from mlx_llava.json_files import Place, decode, field, parse
from mlx_llava.model.llava import Llava
from mlx_llava.signatures import takes

_OPTIONS = {field.name for field in fields(Options)}
_KEYS = {"prompt", "images", "videos", "id", *_OPTIONS}

T = TypeVar("T")
#: Makes what a `BatchGenerator` takes.
Request: TypeAlias = "Callable[[], tuple[Inputs, Options]]"


@takes(Options)
def batch_generate(
    model: Llava,
    processor: Processor,
    prompts: Sequence[Conversation],
    images: Sequence[Any] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    prompt_cache: PromptCache | None = None,
    prompt_options: dict[str, Any] | None = None,
    prompt_progress_callback: PromptProgress | None = None,
    **options: Any,
) -> list[str]:
    """Answers several prompts; each as if it were alone.

    Pictures are read when there is a place for their prompt, not all of them at first. How to
    answer is said by one value for all rows, or by a list with one for each.

    Args:
        model (Llava): The model.
        processor (Processor): Its processor.
        prompts (list): What `Processor` takes for a batch.
        images (list, optional): For each prompt, its pictures or None.
        batch_size (int): How many are answered at a time.
        prompt_cache (PromptCache, optional): What to reuse.
        prompt_options (dict, optional): ``frames``, ``raw``, ``system``, ``image_position``,
            ``image_tokens`` of `Processor`.
        prompt_progress_callback (callable, optional): See `stream_generate`; is told of all
            prompts that are read together.
        **options: Fields of `Options`.

    Returns:
        list[str]: The answers.

    Raises:
        ValueError: A prompt is longer than the context, or `Processor` refuses it.
    """
    images = [None] * len(prompts) if images is None else images
    if len(images) != len(prompts):
        raise ValueError(f"There are {len(prompts)} prompts but images for {len(images)}.")

    def prepare(prompt: Conversation, image: Any, row: Options) -> tuple[Inputs, Options]:
        return processor(prompt, image, **(prompt_options or {})), row

    rows = zip(prompts, images, _split_options(options, len(prompts)), strict=True)
    generator = BatchGenerator(
        *(model, processor),
        batch_size=batch_size,
        prompt_cache=prompt_cache,
        prompt_progress_callback=prompt_progress_callback,
    )
    texts = [""] * len(prompts)
    for index, outcome in _answer_each(generator, (partial(prepare, *row) for row in rows)):
        if isinstance(outcome, Exception):
            raise outcome
        texts[index] = outcome.answer
    return texts


def _split_options(options: dict[str, Any], rows: int) -> list[Options]:
    """The options of each row; ``stop`` is a list of texts, or one such list for each."""
    split: list[dict[str, Any]] = [{} for _ in range(rows)]
    for name, value in options.items():
        is_shared = not isinstance(value, (list, tuple)) or (
            name == "stop" and all(isinstance(text, str) for text in value)
        )
        values = [value] * rows if is_shared else value
        if len(values) != rows:
            raise ValueError(f"There are {rows} prompts but {len(values)} values of {name}.")
        for row, one in zip(split, values, strict=True):
            row[name] = one
    return [Options(**row) for row in split]


def _answer_each(
    generator: BatchGenerator, requests: Iterable[Request]
) -> Iterator[tuple[int, GenerationResponse | Exception]]:
    """Answers requests, which are made only as far ahead as there are places.

    Yields:
        tuple: The number of a request from 0, and what comes of it: responses, or one error.
    """
    remaining = enumerate(requests)
    running: dict[int, int] = {}
    while True:
        while generator.free > 0 and (following := next(remaining, None)):
            index, prepare = following
            try:
                running[generator.insert(*prepare())] = index
            except (ValueError, OSError, TypeError, RecursionError) as error:
                yield index, error
        if generator.is_idle:
            return
        try:
            for uid, response in generator.next():
                yield running[uid], response
        except AnswerError as error:
            yield running[error.uid], error


def answer_prompts(
    prompts: Iterable[T],
    read: Callable[[T], Mapping[str, Any]],
    generator: BatchGenerator,
    defaults: Options,
    **prompt_options: Any,
) -> Iterator[dict[str, Any]]:
    """Answers prompts, reading only as far ahead as there are places.

    Args:
        prompts (iterable): What is to be answered.
        read (callable): One of them -> ``prompt``, and perhaps ``images`` and ``videos`` (lists),
            ``id``, and fields of `Options` for it alone.
        generator (BatchGenerator): Answers them.
        defaults (Options): For what one does not say.
        **prompt_options: ``frames``, ``raw``, ``system``, ``image_position``, ``image_tokens`` of
            `Processor`.

    Yields:
        dict: ``index`` of the prompt from 0, its ``id`` if it has one, and either the answer with
        its figures or an ``error``. In the order in which answers end.
    """
    records: dict[int, dict[str, Any]] = {}

    def prepare(index: int, prompt: T) -> tuple[Inputs, Options]:
        records[index] = {"index": index}
        data = read(prompt)
        records[index] |= {"id": data["id"]} if "id" in data else {}
        options = replace(defaults, **{k: data[k] for k in data.keys() & _OPTIONS})
        images, videos = data.get("images"), data.get("videos")
        return generator.processor(data["prompt"], images, video=videos, **prompt_options), options

    requests = (partial(prepare, *numbered) for numbered in enumerate(prompts))
    for index, outcome in _answer_each(generator, requests):
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
    """The request in a line of JSON.

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
    unknown = sorted(data.keys() - _KEYS)
    if unknown:
        keys = ", ".join(sorted(_KEYS))
        raise ValueError(f"{place} has unknown keys {', '.join(unknown):.200}; known: {keys}.")
    if isinstance(prompt, list) and not all(isinstance(message, dict) for message in prompt):
        raise ValueError(f"{place} has a list as prompt that holds more than messages.")
    for key in ("images", "videos"):
        names = field(data, key, (str, list, type(None)), place, default=None)
        if isinstance(names, list) and not all(isinstance(name, str) for name in names):
            raise ValueError(f"{place} has a list as {key} that holds more than texts.")
    field(data, "id", (str, int, float, bool, type(None)), place, default=None)
    return data
