"""One prompt and its answer as it grows, alone or beside others. V vocabulary."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlx_llava.generation.detokenizer import Answer
from mlx_llava.generation.memory import check_request, kv_bytes
from mlx_llava.generation.prompt_cache import Prompt, PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.sampling import Options
from mlx_llava.generation.steps import PREFILL_STEP, Chooser
from mlx_llava.inputs.processor import Inputs, Processor
from mlx_llava.model.cache import make_cache
from mlx_llava.model.llava import Llava


class Row:
    """What happens to one prompt: it is embedded, read, continued token by token, and kept.

    Attributes:
        uid: by which others know it.
        prompt: its content, and
        cached: how many of its first positions were read before.
        max_tokens: the longest answer.
        kv_bytes: what keys and values of prompt and answer can take.
        choose: takes its tokens from logits.
        tokens: its answer so far.
        token: the one that comes next, (1,), with
        logprobs: the log-probabilities that it was chosen from, (1, V).
    """

    prompt: Prompt
    token: mx.array
    logprobs: mx.array

    def __init__(
        self,
        model: Llava,
        processor: Processor,
        inputs: Inputs,
        options: Options,
        *,
        uid: int = 0,
        prefill_step: int = PREFILL_STEP,
        kv_bits: int | None = None,
        max_kv_size: int | None = None,
    ) -> None:
        """Checks that a prompt can be answered.

        Raises:
            ValueError: It does not fit context or memory, or its options make no sense.
        """
        self.uid, self.inputs, self.tokens = uid, inputs, list[int]()
        self.max_tokens = check_request(
            model,
            inputs,
            options.max_tokens,
            processor.context_length,
            prefill_step=prefill_step,
            kv_bits=kv_bits,
            max_kv_size=max_kv_size,
        )
        ids = inputs.input_ids[0]
        text_ids = mx.array(ids[ids != model.config.image_token_index])
        self.choose = Chooser(options.sampler(), options.logits_processors(processor), text_ids)
        self.cache = make_cache(model.config.text_config, len(ids), kv_bits, max_kv_size)
        dtype, positions = model.language_model.dtype, len(ids) + self.max_tokens
        self.kv_bytes = kv_bytes(model.config, positions, dtype.size, kv_bits)
        self.cached = 0
        stops = [*processor.template.stops, *options.stop]
        self._answer = Answer(processor.tokenizer, processor.eos_ids, stops, self.max_tokens)
        self._encode_seconds = self._started = 0.0
        self._first: float | None = None

    def begin(self, reuse: PromptCache) -> None:
        """Takes over what was read of the prompt before."""
        self.prompt, self.cache, self.cached = reuse.begin(self.inputs, self.cache)

    def start_clock(self, encode_seconds: float) -> None:
        """Begins to measure: the prompt is embedded, and is read next."""
        self._encode_seconds, self._started = encode_seconds, time.perf_counter()

    def take(self, logits: mx.array) -> None:
        """Takes the next token from logits (1, V)."""
        self.token, self.logprobs = self.choose(logits)

    def respond(self, token: int, logprobs: mx.array) -> GenerationResponse:
        """What there is to say of the next token, with log-probabilities (V,)."""
        now = time.perf_counter()
        self._first = self._first or now
        self.tokens.append(token)
        text, finish_reason = self._answer.add(token)
        prefill_seconds, decode_seconds = self._first - self._started, now - self._first
        prompt_tokens = self.inputs.input_ids.shape[1]
        return GenerationResponse(
            text=text,
            token=token,
            logprobs=logprobs,
            prompt_tokens=prompt_tokens,
            prompt_tps=(prompt_tokens - self.cached) / max(prefill_seconds, 1e-9),
            generation_tokens=len(self.tokens),
            generation_tps=(len(self.tokens) - 1) / max(decode_seconds, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            image_tokens=sum(self.inputs.image_tokens),
            cached_tokens=self.cached,
            preprocess_seconds=self.inputs.seconds,
            encode_seconds=self._encode_seconds,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            answer=self._answer.text,
            inputs=self.inputs,
        )

    def store(self, reuse: PromptCache) -> None:
        """Keeps the prompt and its answer for others that begin so."""
        reuse.store(self.prompt, self.tokens, self.cache)


def embedded(rows: Sequence[Row], reuse: PromptCache) -> Iterator[tuple[Row, mx.array]]:
    """Embeds what was not read of some prompts before, their pictures together.

    Yields:
        tuple[Row, mx.array]: Each row as its clock starts, and what is to be read, (1, L, D).
    """
    started = time.perf_counter()
    for row in rows:
        row.begin(reuse)
    embeddings = reuse.embed([(row.prompt, row.cached) for row in rows])
    mx.eval(embeddings)
    seconds = (time.perf_counter() - started) / len(rows)
    for row, embedding in zip(rows, embeddings, strict=True):
        row.start_clock(seconds)
        yield row, embedding
