"""One prompt and its answer as it grows, alone or beside others. V vocabulary."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import cast

import mlx.core as mx

from mlx_llava.generation.memory import check_request
from mlx_llava.generation.prompt_cache import Prompt, PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.sampling import Options
from mlx_llava.generation.steps import PREFILL_STEP, Choice, Chooser
from mlx_llava.generation.stops import Answer
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.cache import make_cache
from mlx_llava.model.llava import Llava

#: Last ids of a prompt after which an answer that it begins goes on; a character has at most 4.
BEGUN = 4


class Row:
    """What happens to one prompt: it is embedded, read, continued token by token, and kept.

    Attributes:
        uid: by which others know it.
        prompt: its content, and
        cached: how many of its first positions were read before.
        max_tokens: the longest answer.
        length: how many positions prompt and answer can take.
        choose: takes its tokens from logits.
        tokens: its answer so far.
        logits: those that the next token is to be chosen from, (1, V).
        choice: the next token, if it was chosen and not read.
        drawn: the same before it is taken.
        feed: what the model reads next, (n,).
        encode_seconds: how long embedding took, and
        started: when that was done.
    """

    prompt: Prompt
    logits: mx.array | None = None
    choice: Choice | None = None
    drawn: Choice | None = None
    feed: mx.array

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
        text_ids = mx.array(ids[~model.config.are_placeholders(ids)])
        vocab_size = processor.config.text_config.vocab_size
        penalties = options.processors(text_ids.size, vocab_size)
        constraint = options.constraint(processor)
        self.choose = Chooser(options.sampler(), penalties, text_ids, constraint, model.ranks)
        self.cache = make_cache(model.config.text_config, len(ids), kv_bits, max_kv_size)
        self.length = len(ids) + self.max_tokens
        self.cached = 0
        stops = [*processor.template.stops, *options.stop]
        begun = ids[-BEGUN:].tolist() if inputs.prefill else ()
        self._answer = Answer(
            *(processor.tokenizer, processor.eos_ids, stops, self.max_tokens, begun),
            max_repeats=None if options.json_schema else options.max_repeats,
        )
        self.encode_seconds = self.started = 0.0
        self._first: float | None = None

    @property
    def unread(self) -> int:
        """How many positions of the prompt are to be read."""
        return self.inputs.input_ids.shape[1] - self.cached

    def draw(self) -> tuple[()]:
        """Draws the next token where there are logits, unless a constraint awaits the last."""
        if self.logits is not None and (self.choice is None or self.choose.constraint is None):
            self.drawn, self.logits = self.choose.draw(self.logits), None
        return ()

    def take(self, token: mx.array) -> None:
        """Takes a token in the place of the one that was drawn."""
        assert self.drawn is not None
        self.choice, self.drawn, self.feed = (token, self.drawn[1]), None, token
        self.choose.remember(token)

    def read(self, choice: Choice, was_fed: bool) -> list[GenerationResponse]:
        """Reads a token that was chosen, and says it and what follows for certain.

        Args:
            choice (tuple): The token, and what it was chosen from.
            was_fed (bool): Logits after it are there, or another token that was chosen from them.
        """
        token = cast("int", choice[0].item())
        responses = self.say([(token, choice[1][0])])
        if responses[-1].finish_reason:
            return responses
        forced = self.choose.follow(token, self.max_tokens - len(self.tokens))
        if forced:
            unread = [token, *(one for one, _ in forced)]
            self.feed, self.logits = mx.array(unread[was_fed:], mx.uint32), None
        if forced or self.choice is choice:
            self.choice = None
        return responses + self.say(forced)

    def say(self, tokens: Sequence[tuple[int, mx.array]]) -> list[GenerationResponse]:
        """What there is to say of tokens, up to one that ends the answer."""
        responses: list[GenerationResponse] = []
        for token, logprobs in tokens:
            responses.append(self.respond(token, logprobs))
            if responses[-1].finish_reason:
                break
        return responses

    def respond(self, token: int, logprobs: mx.array) -> GenerationResponse:
        """What there is to say of the next token, with log-probabilities (V,)."""
        now = time.perf_counter()
        self._first = self._first or now
        self.tokens.append(token)
        text, finish_reason = self._answer.add(token)
        prefill_seconds, decode_seconds = self._first - self.started, now - self._first
        return GenerationResponse(
            text=text,
            token=token,
            logprobs=logprobs,
            prompt_tokens=self.inputs.input_ids.shape[1],
            prompt_tps=self.unread / max(prefill_seconds, 1e-9),
            generation_tokens=len(self.tokens),
            generation_tps=(len(self.tokens) - 1) / max(decode_seconds, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            stop=self._answer.stop,
            goes_round=self._answer.goes_round,
            image_tokens=sum(self.inputs.image_tokens),
            whole_image_tokens=sum(self.inputs.whole_image_tokens),
            cached_tokens=self.cached,
            preprocess_seconds=self.inputs.seconds,
            encode_seconds=self.encode_seconds,
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
    reuse.model.ranks.read(sum(row.inputs.input_ids.size for row in rows))
    for row in rows:
        row.prompt, row.cache, row.cached = reuse.begin(row.inputs, row.cache)
    embeddings = reuse.embed([(row.prompt, row.cache) for row in rows])
    mx.eval(embeddings)
    seconds = (time.perf_counter() - started) / len(rows)
    for row, embedding in zip(rows, embeddings, strict=True):
        row.encode_seconds, row.started = seconds, time.perf_counter()
        yield row, embedding
