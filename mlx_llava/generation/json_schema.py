"""Answers that are JSON of a given schema: what would break it is never chosen. V vocabulary."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llava.files import expand_home
from mlx_llava.inputs.tokenizer import Tokenizer
from mlx_llava.json_files import parse, read_json

logger = logging.getLogger(__name__)

#: All white space there is, so that no answer ends in blanks without end; of what is not known
#: there are warnings.
_SETTINGS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": True,
}
#: The schema of any object.
ANY_OBJECT: dict[str, Any] = {"type": "object"}
#: What makes of a schema a hint, in llguidance's own words: what it does not know is no error.
LENIENT: dict[str, Any] = {"x-guidance": {"lenient": True}}
#: What never was a constraint, unless it is known (JSON Schema 2020-12, Validation, 7.2.1).
_UNKNOWN_FORMAT = "Unknown format"


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

    What can follow is computed by llguidance (github.com/guidance-ai/llguidance); it is applied
    without kernels, on any device. Where only one text can, its tokens are those into which the
    tokenizer cuts it.

    Attributes:
        vocab_size: V.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        tokenizer: Tokenizer,
        eos_ids: Collection[int],
        vocab_size: int,
    ) -> None:
        """Compiles a schema; a token of `eos_ids` can only follow a whole text.

        A `format` that is not known is no constraint, and with `LENIENT` no keyword is.

        Raises:
            ValueError: The schema makes no sense or uses what llguidance does not know,
                llguidance is missing, or no id ends an answer.
        """
        if not eos_ids:
            raise ValueError("This model has no end-of-answer token, which JSON answers need.")
        try:
            text = json.dumps(dict(schema), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise _unusable(error) from error
        self._matcher = _compiled(
            *(text, _is_lenient(schema), tokenizer, frozenset(eos_ids), vocab_size)
        ).deep_copy()
        self._eos_ids, self.vocab_size = tuple(eos_ids), vocab_size

    def follow(self, token: int) -> None:
        """Takes the next token of the answer, which is no end."""
        self._matcher.consume_token(token)

    def forced(self, limit: int) -> list[int]:
        """The next tokens, at most `limit`, where there is no choice; they are followed.

        Raises:
            ValueError: The schema turns out to be too complex.
        """
        tokens: list[int] = self._matcher.compute_ff_tokens()[:limit]
        _check(self._matcher)
        for token in tokens:
            self.follow(token)
        if len(tokens) < limit and len(self._eos_ids) == 1 and self._matcher.is_stopped():
            tokens.extend(self._eos_ids)
        return tokens

    def __call__(self, logits: mx.array) -> mx.array:
        """Leaves of logits (1, V) after the tokens so far those that can follow.

        Raises:
            ValueError: The schema turns out to be too complex.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        _check(self._matcher)
        allowed = np.unpackbits(mask, bitorder="little")[: logits.shape[-1]].astype(np.bool_)
        return mx.where(mx.array(allowed), logits, mx.array(-mx.inf, logits.dtype))


def _check(matcher: Any) -> None:
    if matcher.is_error():
        why = " ".join(matcher.get_error().partition("<state>")[0].split())
        if why == "NoExtensionBias":
            why = "No text can follow it, as it refers to itself without end."
        raise _unusable(why)


def _unusable(why: object) -> ValueError:
    return ValueError(f"The JSON schema cannot be used: {why}")


def _is_lenient(schema: Mapping[str, Any]) -> bool:
    guidance = schema.get("x-guidance")
    return isinstance(guidance, Mapping) and guidance.get("lenient") is True


def _check_enforced(matcher: Any, is_lenient: bool) -> None:
    """Says which keywords are not enforced, or refuses them."""
    left_out = [
        warning.partition(", falling back")[0]
        for warning in matcher.get_grammar_warnings()
        if not warning.startswith(_UNKNOWN_FORMAT)
    ]
    if left_out and not is_lenient:
        raise _unusable("; ".join(left_out))
    if left_out:
        logger.warning(f"A JSON schema is not enforced in all it says: {'; '.join(left_out)}")


@lru_cache(maxsize=16)
def _compiled(
    schema: str,
    is_lenient: bool,
    tokenizer: Tokenizer,
    eos_ids: frozenset[int],
    vocab_size: int,
) -> Any:
    """What follows a schema from its beginning; compiled once, as that can take a second."""
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise ValueError(
            "Answers of a JSON schema need llguidance: pip install 'mlx_llava[json]'."
        ) from error
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_SETTINGS)
    matcher = LLMatcher(_vocabulary(tokenizer, eos_ids, vocab_size), grammar, log_level=0)
    _check(matcher)
    _check_enforced(matcher, is_lenient)
    return matcher


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Tokenizer, eos_ids: frozenset[int], vocab_size: int) -> Any:
    """The vocabulary as llguidance searches it; takes a while, and serves all answers."""
    from llguidance import LLTokenizer

    spec = json.dumps(tokenizer.spec)
    return LLTokenizer(spec, n_vocab=vocab_size, eos_token=sorted(eos_ids))
