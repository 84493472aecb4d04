"""Embed, prefill, decode: the answer to one prompt, piece by piece."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import mlx.core as mx

from mlx_llava.generation.orders import Orders
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.row import Row, embedded
from mlx_llava.generation.sampling import Options
from mlx_llava.generation.steps import PREFILL_STEP, PromptProgress, decode
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.messages import Conversation
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.llava import Llava
from mlx_llava.signatures import takes


@takes(Options, others=True)
def stream_generate(
    model: Llava,
    processor: Processor,
    prompt: Conversation | Inputs,
    image: Any = None,
    *,
    prefill_step: int = PREFILL_STEP,
    kv_bits: int | None = None,
    max_kv_size: int | None = None,
    prompt_cache: PromptCache | None = None,
    prompt_progress_callback: PromptProgress | None = None,
    **options: Any,
) -> Generator[GenerationResponse, None, None]:
    """Answers a prompt, piece by piece.

    Args:
        model (Llava): The model.
        processor (Processor): Its processor.
        prompt (str, list of dict or Inputs): What `Processor` takes, or what it made.
        image (image or list of images, optional): What `load_image` takes.
        prefill_step (int): The length of the chunks in which the prompt is read.
        kv_bits (int, optional): Stores keys and values in 2, 4 or 8 bits.
        max_kv_size (int, optional): Stores that many positions at most: the prompt, and the last
            ones of the answer.
        prompt_cache (PromptCache, optional): What was read before, of which nothing is read
            again; keeps this prompt and its answer.
        prompt_progress_callback (callable, optional): Is told how many tokens of the prompt have
            been read, and how many there are to read: none when the pictures are encoded, all
            before the first token. In between, a GPU is asked after each `prefill_step`, and a
            CPU after each layer, which counts as its share of the tokens. What `prompt_cache`
            knows is not counted.
        **options: ``video``, ``frames``, ``raw``, ``system``, ``image_position``,
            ``image_tokens`` of `Processor`.

    Yields:
        GenerationResponse: The last one has a ``finish_reason``.

    Raises:
        ValueError: The prompt is longer than the context or memory, or `Processor` refuses it.
    """
    how, inputs = Options.take(options), prompt
    if not isinstance(inputs, Inputs):
        inputs = processor(inputs, image, **options)
    elif image is not None or options:
        raise ValueError("Inputs are complete; images and options belong to the processor's call.")
    row = Row(
        *(model, processor, inputs, how),
        prefill_step=prefill_step,
        kv_bits=kv_bits,
        max_kv_size=max_kv_size,
    )
    orders = Orders(model.ranks)

    def choices() -> Iterator[tuple[int, mx.array]]:
        orders(
            *("stream", inputs, how),
            template=processor.template.name,
            cache=None if prompt_cache is None else prompt_cache.order,
            prefill_step=prefill_step,
            kv_bits=kv_bits,
            max_kv_size=max_kv_size,
        )
        reuse = prompt_cache or PromptCache(model, max_feature_bytes=0)
        ((_, embeddings),) = embedded([row], reuse)
        for choice in decode(
            *(embeddings, model.language_model, row.cache, row.choose),
            max_tokens=row.max_tokens,
            prefill_step=prefill_step,
            prompt_progress_callback=prompt_progress_callback,
        ):
            yield choice
            orders("step")

    try:
        for token, logprobs in model.ranks.steps(choices()):
            response = row.respond(token, logprobs)
            yield response
            if response.finish_reason:
                orders("close")
                return
    except (GeneratorExit, KeyboardInterrupt):
        orders("close")
        raise
    finally:
        if prompt_cache is not None and row.started:
            with model.ranks.working():
                row.store(prompt_cache)


@takes(Options, others=True)
def generate(
    model: Llava,
    processor: Processor,
    prompt: Conversation | Inputs,
    image: Any = None,
    **options: Any,
) -> str:
    """Answers a prompt.

    Args:
        model (Llava): The model.
        processor (Processor): Its processor.
        prompt (str, list of dict or Inputs): What `Processor` takes, or what it made.
        image (image or list of images, optional): What `load_image` takes.
        **options: Others of `stream_generate`, among them ``prompt_progress_callback``.

    Returns:
        str: The answer.

    Raises:
        ValueError: The prompt is longer than the context or memory, or `Processor` refuses it.
    """
    return "".join(
        part.text for part in stream_generate(model, processor, prompt, image, **options)
    )
