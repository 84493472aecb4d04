"""Embed, prefill, decode: the answer to one prompt, piece by piece."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.row import Row, embedded
from mlx_llava.generation.sampling import MAX_TOKENS, Options
from mlx_llava.generation.steps import PREFILL_STEP, decode, prefill
from mlx_llava.inputs.processor import Conversation, Inputs, Processor
from mlx_llava.model.llava import Llava


def stream_generate(
    model: Llava,
    processor: Processor,
    prompt: Conversation | Inputs,
    image: Any = None,
    *,
    max_tokens: int = MAX_TOKENS,
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    top_k: int = 0,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    json_schema: Mapping[str, Any] | None = None,
    prefill_step: int = PREFILL_STEP,
    kv_bits: int | None = None,
    max_kv_size: int | None = None,
    prompt_cache: PromptCache | None = None,
    **prompt_options: Any,
) -> Generator[GenerationResponse, None, None]:
    """Answers a prompt, piece by piece.

    Args:
        model (Llava): The model.
        processor (Processor): Its processor.
        prompt (str, list of dict or Inputs): What `Processor` takes, or what it made.
        image (image or list of images, optional): What `load_image` takes.
        max_tokens (int): The longest answer; less if the context is full before.
        temp (float): Temperature; 0 takes the likeliest token.
        top_p (float): Samples from the likeliest tokens of this total probability.
        min_p (float): Drops tokens below this fraction of the likeliest one's probability.
        top_k (int): Samples from that many likeliest tokens.
        repetition_penalty (float, optional): Above 1, tokens of the last 20 become less likely.
        seed (int, optional): Makes sampling repeatable.
        stop (list of str): Texts that end the answer, beside the template's own.
        json_schema (dict, optional): Makes the answer JSON of this schema, if it is not cut off.
        prefill_step (int): The length of the chunks in which the prompt is read.
        kv_bits (int, optional): Stores keys and values in 2, 4 or 8 bits.
        max_kv_size (int, optional): Stores that many positions at most: the prompt, and the last
            ones of the answer.
        prompt_cache (PromptCache, optional): What was read before, of which nothing is read
            again; keeps this prompt and its answer.
        **prompt_options: ``raw``, ``system``, ``image_position`` of `Processor`.

    Yields:
        GenerationResponse: The last one has a ``finish_reason``.

    Raises:
        ValueError: The prompt is longer than the context or memory, or `Processor` refuses it.
    """
    inputs = prompt
    if not isinstance(inputs, Inputs):
        inputs = processor(inputs, image, **prompt_options)
    elif image is not None or prompt_options:
        raise ValueError("Inputs are complete; images and options belong to the processor's call.")
    options = Options(
        max_tokens, temp, top_p, min_p, top_k, repetition_penalty, seed, (*stop,), json_schema
    )
    row = Row(
        *(model, processor, inputs, options),
        prefill_step=prefill_step,
        kv_bits=kv_bits,
        max_kv_size=max_kv_size,
    )
    ((_, embeddings),) = embedded([row], prompt_cache or PromptCache(model, max_feature_bytes=0))
    try:
        logits = prefill(embeddings, model.language_model, row.cache, prefill_step)
        steps = decode(
            logits, model.language_model, row.cache, row.choose, max_tokens=row.max_tokens
        )
        for token, logprobs in steps:
            response = row.respond(token, logprobs)
            yield response
            if response.finish_reason:
                return
    finally:
        if prompt_cache is not None:
            row.store(prompt_cache)


def generate(
    model: Llava,
    processor: Processor,
    prompt: Conversation | Inputs,
    image: Any = None,
    **options: Any,
) -> str:
    """Answers a prompt; arguments as in `stream_generate`.

    Returns:
        str: The answer.
    """
    return "".join(
        part.text for part in stream_generate(model, processor, prompt, image, **options)
    )
