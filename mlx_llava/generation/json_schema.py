"""Answers that are JSON of a given schema: what would break it is never chosen. V vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_llava.files import expand_home
from mlx_llava.inputs.tokenizer import Tokenizer
from mlx_llava.json_files import parse, read_json

#: All white space there is, so that no answer ends in blanks without end.
_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
#: A character that merges with no other.
_BEFORE = "\x02"
#: The schema of any object.
ANY_OBJECT: dict[str, Any] = {"type": "object"}


def read_schema(text: str) -> dict[str, Any]:
    """A JSON schema, as text or in a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON object.
    """
    if not text.lstrip().startswith("{"):
        path = expand_home(text)
        if not path.exists():
            raise FileNotFoundError(f"There is no schema file {text}.")
        return read_json(path)
    schema: dict[str, Any] = parse(text, "The JSON schema")
    return schema


class JsonConstraint:
    """Makes impossible, at every step, what no text of a schema could go on with.

    A logits processor for one answer. What can follow is computed by llguidance
    (github.com/guidance-ai/llguidance); it is applied without kernels, on any device.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        tokenizer: Tokenizer,
        eos_ids: Collection[int],
        vocab_size: int,
    ) -> None:
        """Compiles a schema.

        Args:
            schema (dict): A JSON schema.
            tokenizer (Tokenizer): The model's.
            eos_ids (collection of int): What ends an answer; can only follow a whole text.
            vocab_size (int): V.

        Raises:
            ValueError: The schema makes no sense or uses what llguidance does not know,
                llguidance is missing, or no id ends an answer.
        """
        if not eos_ids:
            raise ValueError("This model has no end-of-answer token, which JSON answers need.")
        try:
            text = json.dumps(dict(schema), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The JSON schema cannot be used: {error}") from error
        self._matcher = _compiled(text, tokenizer, frozenset(eos_ids), vocab_size).deep_copy()
        self._begun = False

    def __call__(self, seen: mx.array, logits: mx.array) -> mx.array:
        """Takes logits (1, V) after all ids so far; the first call is that of the prompt.

        Raises:
            ValueError: The schema turns out to be too complex.
        """
        if self._begun:
            self._matcher.consume_token(cast("int", seen[-1].item()))
        self._begun = True
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        _check(self._matcher)
        allowed = np.unpackbits(mask, bitorder="little")[: logits.shape[-1]].astype(np.bool_)
        return mx.where(mx.array(allowed), logits, mx.array(-mx.inf, logits.dtype))


class _Vocabulary:
    """What llguidance asks of a tokenizer (its TokenizerWrapper)."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_id: int, vocab_size: int) -> None:
        self.eos_token_id = eos_id
        self.special_token_ids = sorted({eos_id, *tokenizer.special_tokens.values()})
        self.tokens = [tokenizer.bytes_of(i) for i in range(vocab_size)]
        self._tokenizer = tokenizer
        self._before = tokenizer.encode(_BEFORE)

    def __call__(self, text: str) -> list[int]:
        """The ids of text within a text: without begin of text, and no space added."""
        ids = self._tokenizer.encode(_BEFORE + self._tokenizer.protect(text))
        return ids[len(self._before) :]


def _check(matcher: Any) -> None:
    if matcher.is_error():
        why = matcher.get_error().partition("<state>")[0].split()
        raise ValueError(f"The JSON schema cannot be used: {' '.join(why)}")


@lru_cache(maxsize=16)
def _compiled(schema: str, tokenizer: Tokenizer, eos_ids: frozenset[int], vocab_size: int) -> Any:
    """What follows a schema from its beginning; compiled once, as that can take a second."""
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise ValueError(
            "Answers of a JSON schema need llguidance: pip install 'mlx_llava[json]'."
        ) from error
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_LAYOUT)
    matcher = LLMatcher(_vocabulary(tokenizer, eos_ids, vocab_size), grammar, log_level=0)
    _check(matcher)
    return matcher


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Tokenizer, eos_ids: frozenset[int], vocab_size: int) -> Any:
    """The vocabulary as llguidance searches it; takes a while, and serves all answers."""
    from llguidance import LLTokenizer, TokenizerWrapper

    ids = sorted(eos_ids)
    as_llguidance: Callable[[Any], Any] = TokenizerWrapper
    vocabulary = as_llguidance(_Vocabulary(tokenizer, ids[0], vocab_size))
    return LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=ids)
