"""Embeddings -> ids: prefill, then one id at a time. What every way of answering shares.

L tokens of the prompt, D decoder width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, cast

import mlx.core as mx

from mlx_llava.generation.json_schema import JsonConstraint
from mlx_llava.generation.sampling import MAX_TOKENS, LogitsProcessor, Sampler, greedy
from mlx_llava.model.cache import Cache, room
from mlx_llava.model.device import on_cpu
from mlx_llava.model.llama import LanguageModel
from mlx_llava.model.ranks import ALONE, Alone

PREFILL_STEP = 2048

#: Is told how many tokens of a prompt have been read, of how many: mlx-lm's.
PromptProgress: TypeAlias = "Callable[[int, int], object]"
#: An id (1,), and the log-probabilities (1, V) that it was chosen from.
Choice: TypeAlias = "tuple[mx.array, mx.array]"


def prefill(
    embeddings: mx.array,
    language_model: LanguageModel,
    cache: Cache,
    step: int,
    tell: PromptProgress | None = None,
) -> mx.array:
    """Reads a prompt in chunks, so that memory does not grow with its square.

    Args:
        embeddings (mx.array): The prompt, (1, L, D).
        language_model (LanguageModel): The decoder.
        cache (list): What came before; is extended.
        step (int): The length of a chunk.
        tell (callable, optional): Is told what has been read: after each chunk or, on a CPU,
            which loses nothing by that, after each layer by its share of the chunk.

    Returns:
        mx.array: The logits after its last token, (1, V).
    """
    length, parts = embeddings.shape[1], len(language_model.layers) + 1  # and the head

    def read(start: int) -> mx.array:
        """What the last layer makes of a chunk's last token, (1, 1, D)."""
        chunk = embeddings[:, start : start + step]
        for done, x in enumerate(language_model.hidden_states(chunk, cache, last_only=True)):
            if tell is not None and (done == 0 or on_cpu()):
                mx.eval(x)
                tell(start + chunk.shape[1] * done // parts, length)
        return x

    *before, last = range(0, length, step)
    for start in before:
        read(start)
        mx.eval([(layer.keys, layer.values) for layer in cache])
        mx.clear_cache()
    logits = language_model.logits(read(last))[:, -1]
    if tell is not None:
        mx.eval(logits)
        tell(length, length)
    return logits


def queues_ahead() -> bool:
    """Whether to queue a step before the last one's token is read.

    It keeps a GPU busy. On a CPU, where a step is done when the call returns, it would only delay
    the token, and do a step too many.
    """
    return not on_cpu()


def log_softmax(logits: mx.array) -> mx.array:
    """Logits (B, V) -> log-probabilities; in 16 bits, subtracting would make ties."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Chooser:
    """Takes the tokens of one answer from logits, or from a schema that leaves no choice.

    Attributes:
        constraint: what the answer has to follow, if anything.
        is_plain: whether the likeliest token is taken as it is.
    """

    def __init__(
        self,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor],
        prompt_ids: mx.array,
        constraint: JsonConstraint | None = None,
        ranks: Alone = ALONE,
    ) -> None:
        self.constraint = constraint
        self.is_plain = sampler is greedy and not processors and constraint is None
        self._sampler, self._processors, self._seen = sampler, processors, prompt_ids
        self._ranks = ranks

    def __call__(self, logits: mx.array) -> Choice:
        """Logits (1, V) -> an id (1,), and the log-probabilities (1, V) it was chosen from."""
        token, logprobs = self.draw(logits)
        token = self._ranks.agreed(token)
        self.remember(token)
        return token, logprobs

    def draw(self, logits: mx.array) -> Choice:
        """The same, before ranks agree on it and it is to be remembered.

        What a constraint allows is found while the logits are computed.
        """
        logits = logits.astype(mx.float32)
        for process in self._processors:
            logits = process(self._seen, logits)
        if self.constraint is not None:
            mx.async_eval(logits)
            logits = self.constraint(logits)
        logprobs = log_softmax(logits)
        return self._sampler(logprobs), logprobs

    def follow(self, token: int | None, limit: int) -> list[tuple[int, mx.array]]:
        """The tokens, at most `limit`, that have to follow one that was read, or the prompt.

        Returns:
            list of tuple: Their ids and log-probabilities (V,): nothing else was possible. The
            model is not asked for them; to it, they are as if it had said them.
        """
        if self.constraint is None:
            return []
        if token is not None:
            self.constraint.follow(token)
        forced = []
        for one in self.constraint.forced(max(0, limit)):
            is_it = mx.arange(self.constraint.vocab_size) == one
            logprobs = mx.where(is_it, 0.0, -mx.inf)
            if self._sampler is not greedy:
                self._sampler(logprobs[None])  # a draw of one, so that later draws stay the same
            self.remember(mx.array([one], mx.uint32))
            forced.append((one, logprobs))
        return forced

    def remember(self, token: mx.array) -> None:
        """Lets what follows depend on a token, where it does."""
        if self._processors:
            self._seen = mx.concatenate([self._seen, token])


def begin(
    embeddings: mx.array,
    language_model: LanguageModel,
    cache: Cache,
    choose: Chooser,
    *,
    max_tokens: int,
    prefill_step: int,
    tell: PromptProgress | None = None,
) -> tuple[list[tuple[int, mx.array]], mx.array]:
    """Reads a prompt, and with it the first tokens of the answer where they are forced.

    Returns:
        tuple: These tokens as `Chooser.follow` gives them, and the logits (1, V) after them.
    """
    forced = choose.follow(None, min(max_tokens, room(cache) - embeddings.shape[1]))
    if forced:
        ids = mx.array([[token for token, _ in forced]])
        embeddings = mx.concatenate([embeddings, language_model.embed(ids)], axis=1)
    return forced, prefill(embeddings, language_model, cache, prefill_step, tell)


def decode(
    embeddings: mx.array,
    language_model: LanguageModel,
    cache: Cache,
    choose: Chooser,
    *,
    max_tokens: int,
    prefill_step: int = PREFILL_STEP,
    prompt_progress_callback: PromptProgress | None = None,
) -> Generator[tuple[int, mx.array], None, None]:
    """Continues a prompt (1, L, D); yields as `generate_step`."""

    def take(logits: mx.array) -> Choice:
        choice = choose(logits)
        mx.async_eval(choice)
        return choice

    def following(ids: mx.array) -> Choice:
        return take(language_model(ids, cache=cache)[:, -1])

    forced, logits = begin(
        *(embeddings, language_model, cache, choose),
        max_tokens=max_tokens,
        prefill_step=prefill_step,
        tell=prompt_progress_callback,
    )
    # A constraint may force tokens to be read with the next one, which is therefore awaited.
    ahead = queues_ahead() and choose.constraint is None
    choice, remaining = take(logits), max_tokens - len(forced)
    if forced:
        mx.eval(choice)
    yield from forced
    while remaining:
        queued = following(choice[0][:, None]) if ahead and remaining > 1 else None
        token = cast("int", choice[0].item())
        yield token, choice[1][0]
        forced = choose.follow(token, min(remaining, room(cache)) - 1)
        remaining -= 1 + len(forced)
        yield from forced
        if remaining:
            ids = [token, *(one for one, _ in forced)]
            choice = queued or following(mx.array([ids]))


def generate_step(
    embeddings: mx.array,
    language_model: LanguageModel,
    *,
    cache: Cache | None = None,
    max_tokens: int = MAX_TOKENS,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    prompt_ids: mx.array | None = None,
    prefill_step: int = PREFILL_STEP,
    prompt_progress_callback: PromptProgress | None = None,
) -> Generator[tuple[int, mx.array], None, None]:
    """Continues a prompt, one id at a time.

    Args:
        embeddings (mx.array): The prompt, (1, L, D); `Llava.embed` makes them.
        language_model (LanguageModel): The decoder.
        cache (list, optional): What came before; is extended.
        max_tokens (int): How many tokens to make.
        sampler (callable, optional): Log-probabilities -> ids. Default: the likeliest.
        logits_processors (list of callables): (ids so far, logits) -> logits, as in mlx-lm.
        prompt_ids (mx.array, optional): The prompt's text for the logits processors, (L,).
        prefill_step (int): The length of the chunks in which the prompt is read.
        prompt_progress_callback (callable, optional): See `stream_generate`.

    Yields:
        tuple[int, mx.array]: A token and the log-probabilities that it was chosen from, (V,).
    """
    cache = language_model.make_cache() if cache is None else cache
    seen = mx.zeros((0,), mx.int32) if prompt_ids is None else prompt_ids
    choose = Chooser(sampler or greedy, logits_processors, seen)
    yield from decode(
        *(embeddings, language_model, cache, choose),
        max_tokens=max_tokens,
        prefill_step=prefill_step,
        prompt_progress_callback=prompt_progress_callback,
    )
