"""What every rank but 0 does: whatever rank 0 tells, with the same code, and without a word."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from typing import Any

from mlx_llava.generation.batch import BatchGenerator
from mlx_llava.generation.orders import unpack
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.sampling import Options
from mlx_llava.generation.stream import stream_generate
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.llava import Llava
from mlx_llava.model.ranks import Ranks


def follow(model: Llava, processor: Processor, ranks: Ranks) -> None:
    """Does what rank 0 does, until that ends.

    Raises:
        Ended: It has.
    """
    follower = _Follower(model, processor)
    for order in ranks.orders():
        fields = unpack(order, processor.image_processor)
        # What comes of it, also of what cannot go on, rank 0 sees for itself.
        with suppress(ValueError, StopIteration):
            getattr(follower, fields.pop("do"))(**fields)


class _Follower:
    """Has a twin of whatever rank 0 has, by its number; each method is an order."""

    def __init__(self, model: Llava, processor: Processor) -> None:
        self._model, self._processor = model, processor
        self._caches: dict[int, PromptCache] = {}
        self._batches: dict[int, BatchGenerator] = {}
        self._streams: dict[int, Generator[GenerationResponse, None, None]] = {}

    def batch(self, of: int, cache: dict[str, Any] | None, **options: Any) -> None:
        reuse = self._cache(cache)
        self._batches[of] = BatchGenerator(
            self._model, self._processor, prompt_cache=reuse, **options
        )

    def insert(self, of: int, inputs: Inputs, options: Options) -> None:
        self._batches[of].insert(inputs, options)

    def remove(self, of: int, uid: int) -> None:
        self._batches[of].remove(uid)

    def next(self, of: int) -> None:
        self._batches[of].next()

    def stream(
        self,
        of: int,
        inputs: Inputs,
        options: Options,
        template: str,
        cache: dict[str, Any] | None,
        **how: Any,
    ) -> None:
        is_own = template == self._processor.template.name
        processor = self._processor if is_own else self._processor.with_template(template)
        how |= {"prompt_cache": self._cache(cache), **vars(options)}
        self._streams[of] = stream_generate(self._model, processor, inputs, **how)
        self.step(of)

    def step(self, of: int) -> None:
        next(self._streams[of])

    def close(self, of: int) -> None:
        if stream := self._streams.pop(of, None):  # once is enough
            stream.close()

    def _cache(self, cache: dict[str, Any] | None) -> PromptCache | None:
        if cache is None:
            return None
        number = cache.pop("number")
        if number not in self._caches:
            self._caches[number] = PromptCache(self._model, **cache)
        return self._caches[number]
