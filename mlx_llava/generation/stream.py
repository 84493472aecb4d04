"""Embed, prefill, decode: the answer to one prompt, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_llava.generation.detokenizer import Answer
from mlx_llava.generation.memory import check_request
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.response import GenerationResponse, Meter
from mlx_llava.generation.sampling import MAX_TOKENS, Options
from mlx_llava.generation.steps import PREFILL_STEP, generate_step, make_cache
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
    max_tokens = check_request(
        model,
        inputs,
        max_tokens,
        processor.context_length,
        prefill_step=prefill_step,
        kv_bits=kv_bits,
        max_kv_size=max_kv_size,
    )
    options = Options(
        max_tokens, temp, top_p, min_p, top_k, repetition_penalty, seed, (*stop,), json_schema
    )
    sampler, processors = options.sampler(), options.logits_processors(processor)
    started = time.perf_counter()
    known, length = 0, inputs.input_ids.shape[1]
    cache = make_cache(model.language_model, length, kv_bits, max_kv_size)
    if prompt_cache is None:
        embeddings = model.embed(**inputs)
    else:
        content = prompt_cache.prompt(inputs)
        cache, known = prompt_cache.begin(content, cache)
        (embeddings,) = prompt_cache.embed([content], [known])
    mx.eval(embeddings)
    meter = Meter(inputs, time.perf_counter() - started, known)
    ids = inputs.input_ids[0]
    steps = generate_step(
        embeddings,
        model.language_model,
        cache=cache,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=processors,
        prompt_ids=mx.array(ids[ids != model.config.image_token_index]),
        prefill_step=prefill_step,
    )
    stops = [*processor.template.stops, *stop]
    answer = Answer(processor.tokenizer, processor.eos_ids, stops, max_tokens)
    tokens: list[int] = []
    try:
        for token, logprobs in steps:
            tokens.append(token)
            response = meter.response(token, logprobs, *answer.add(token))
            yield response
            if response.finish_reason:
                return
    finally:
        if prompt_cache is not None:
            prompt_cache.store(content, tokens, cache)


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
