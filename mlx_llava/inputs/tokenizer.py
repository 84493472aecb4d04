"""Text <-> token ids, from tokenizer.json, a SentencePiece tokenizer.model or Qwen2's vocab.json.

A prompt mixes text that may hold special tokens (the template's) with text that must not
(the user's): `Tokenizer.protect` marks the second, `Tokenizer.encode` honours the mark.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from mlx_llava.inputs.vocabulary import spec_from_qwen2, spec_from_sentencepiece
from mlx_llava.json_files import read_json, read_text

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
IM_START, IM_END = "<im_start>", "<im_end>"

#: A Unicode noncharacter, which no text holds; it breaks up special tokens in users' text.
_MARK = "\ufdd0"

#: A byte in a SentencePiece vocabulary.
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
#: How GPT-2 writes bytes: those that can be seen as themselves, others from 256 on
#: (openai/gpt-2, src/encoder.py, bytes_to_unicode).
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES_OF = {chr(byte): bytes([byte]) for byte in _VISIBLE} | {
    chr(256 + i): bytes([b]) for i, b in enumerate(b for b in range(256) if b not in _VISIBLE)
}


class Tokenizer:
    """A fast tokenizer with LLaVA's rules for special tokens.

    Attributes:
        special_tokens: text -> id of every special token, ``<image>`` included.
        bos_ids: what every prompt starts with (one id, or nothing).
        eos_id: the tokenizer's own end of text, if it has one.
        chat_template: the checkpoint's own Jinja template, if it has one.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        config: Mapping[str, Any],
        image_token_id: int,
        chat_template: str | None = None,
    ) -> None:
        """Builds a tokenizer of a tokenizer.json and a tokenizer_config.json.

        Raises:
            ValueError: Tokenizer and model disagree on the id of ``<image>``.
        """
        special = {IMAGE_TOKEN, *_named_special(config)}
        tokens = _added_tokens(spec, config)
        for token in tokens:
            token["special"] = token["special"] or token["content"] in special
        self.spec = {**spec, "added_tokens": tokens}
        self.config, self.chat_template = dict(config), chat_template
        self._added = {token["content"] for token in tokens}
        added = [token for token in tokens if token["special"]]
        self.special_tokens = {token["content"].strip(): int(token["id"]) for token in added}
        found = self.special_tokens.setdefault(IMAGE_TOKEN, image_token_id)
        if found != image_token_id:
            raise ValueError(
                f"The tokenizer gives {IMAGE_TOKEN} the id {found}, config.json "
                f"image_token_index={image_token_id}."
            )
        self._special = _special_pattern(added)
        self._backend = _backend(self.spec)
        inner = _without_first_prefix(self.spec)
        same = inner["pre_tokenizer"] == self.spec.get("pre_tokenizer")
        self._inner_backend = self._backend if same else _backend(inner)
        self._is_byte_level = '"ByteLevel"' in json.dumps(spec.get("decoder"))
        self.bos_ids = self._read_bos()
        self.eos_id = self._id_of("eos_token")

    @classmethod
    def from_folder(
        cls, folder: Path, image_token_id: int, prefer_sentencepiece: bool = False
    ) -> Tokenizer:
        """Reads tokenizer.json, tokenizer.model or vocab.json, and the files beside it.

        Where there are both, the original LLaVA reads tokenizer.model (``use_fast=False``).

        Raises:
            FileNotFoundError: The folder has none of them.
        """
        config = read_json(folder / "tokenizer_config.json")
        template = _read_chat_template(folder, config)
        fast, slow = folder / "tokenizer.json", folder / "tokenizer.model"
        if fast.exists() and not (prefer_sentencepiece and slow.exists()):
            return cls(read_json(fast), config, image_token_id, template)
        if not slow.exists():
            return cls(_read_qwen2(folder, config), config, image_token_id, template)
        spec = spec_from_sentencepiece(slow.read_bytes(), _read_added(folder, config))
        ends = {key: config.get(key) for key in ("bos_token", "eos_token")}
        if not all(ends.values()) or ends["bos_token"] == ends["eos_token"]:
            # LLaMA's first conversions to Hugging Face name no ends, or the wrong ones.
            ends = {"bos_token": "<s>", "eos_token": "</s>"}
        config = {"add_bos_token": True, **config, **ends}
        return cls(spec, config, image_token_id, template)

    def to_spec(self) -> dict[str, Any]:
        """The tokenizer.json that says the same to others, who do not know LLaVA's rules.

        They need ``<image>`` in it, and the begin of text where the original's code adds it.
        """
        spec = dict(self.spec)
        if IMAGE_TOKEN not in self._added:
            image, model = self.special_tokens[IMAGE_TOKEN], self.spec["model"]
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            token = {"id": image, "content": IMAGE_TOKEN, "special": True, **flags}
            spec["added_tokens"] = [*self.spec["added_tokens"], token]
            # There too: tokenizers gives those that are missing here the next free ids.
            if isinstance(vocabulary := model.get("vocab"), dict):
                spec["model"] = {**model, "vocab": {**vocabulary, IMAGE_TOKEN: image}}
        if self.bos_ids and not spec.get("post_processor"):
            spec["post_processor"] = self._beginning()
        return spec

    def _beginning(self) -> dict[str, Any]:
        bos = self._backend.id_to_token(self.bos_ids[0])
        start, *texts = (
            {kind: {"id": name, "type_id": 0}}
            for kind, name in (("SpecialToken", bos), ("Sequence", "A"), ("Sequence", "B"))
        )
        return {
            "type": "TemplateProcessing",
            "single": [start, texts[0]],
            "pair": [start, *texts],
            "special_tokens": {bos: {"id": bos, "ids": self.bos_ids, "tokens": [bos]}},
        }

    def _id_of(self, key: str) -> int | None:
        token = self.config.get(key)
        text = token_text(token)
        if text is None and not isinstance(token, (Mapping, type(None))):
            raise ValueError(f"tokenizer_config.json has {key}={token!r:.80}, expected a text.")
        return None if text is None else self._backend.token_to_id(text)

    def _read_bos(self) -> list[int]:
        """The begin of text: as tokenizer_config.json says, else as tokenizer.json does it."""
        bos_id, is_added = self._id_of("bos_token"), self.config.get("add_bos_token")
        if is_added is None:
            begin = self._backend.encode("").ids[:1]
            return begin if bos_id in (None, *begin) else []
        return [bos_id] if is_added and bos_id is not None else []

    def protect(self, text: str, keep: Iterable[str] = ()) -> str:
        """Marks a user's text so that no special token in it has an effect, but those to `keep`."""
        kept = set(keep)
        text = text.replace(_MARK, "")

        def mark(match: re.Match[str]) -> str:
            token = match.group()
            if token.strip() in kept:
                return token
            return token[:-1] + _MARK + token[-1]  # before the one, or between two characters

        while (marked := self._special.sub(mark, text)) != text:
            text = marked
        return text

    def unprotect(self, text: str) -> str:
        """Takes the marks of `protect` away again, to show the text."""
        return text.replace(_MARK, "")

    def encode(self, text: str) -> list[int]:
        """Tokenises a prompt: begin of text, special tokens, and the text between them.

        As in the original (mm_utils.py, tokenizer_image_token) and in transformers, each piece
        between special tokens is tokenised on its own.

        Raises:
            ValueError: The text holds half a surrogate pair, which no encoding has.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"The text holds {half!a}, which is half of a character.") from error
        ids: list[int] = []
        for i, piece in enumerate(self._special.split(text)):
            if i % 2:
                ids.append(self.special_tokens[piece.strip()])
            elif piece:
                backend = self._inner_backend if i else self._backend
                ids += backend.encode(self.unprotect(piece), add_special_tokens=False).ids
        return ids if ids[: len(self.bos_ids)] == self.bos_ids else self.bos_ids + ids

    @cached_property
    def longest_piece(self) -> int:
        """How many characters the longest token has; a longer text takes several tokens."""
        return max(map(len, self._backend.get_vocab()))

    def text_of(self, token: int) -> str:
        """The text of one id as it stands within a text, or the name of a special token."""
        inside = self.encode("a")[-1:]
        text = self.decode([*inside, token])[len(self.decode(inside)) :]
        is_text = text and "\ufffd" not in text  # which is what a single byte decodes to
        return text if is_text else str(self._backend.id_to_token(token) or "")

    def bytes_of(self, token: int) -> bytes:
        """The bytes that one id stands for; nothing for ids that no text has."""
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if piece in self._added:
            return piece.encode()
        if self._is_byte_level:
            return b"".join(BYTES_OF.get(char, char.encode()) for char in piece)
        if _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("\u2581", " ").encode()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))


def _read_qwen2(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of Qwen2's own files."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.exists() and merges.exists()):
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, no tokenizer.model and no vocab.json with merges.txt."
        )
    kind = str(config.get("tokenizer_class"))
    if not kind.startswith("Qwen2Tokenizer"):
        raise ValueError(
            f"{folder} has the vocab.json of a {kind}; mlx_llava reads Qwen2Tokenizer's, and any "
            "tokenizer.json (save_pretrained of transformers writes one)."
        )
    return spec_from_qwen2(read_json(vocabulary), read_text(merges), _read_added(folder, config))


def _read_added(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """What added_tokens.json adds to the tokens of tokenizer_config.json, which have flags."""
    added = read_json(folder / "added_tokens.json")
    flagged = {token["content"] for token in (config.get("added_tokens_decoder") or {}).values()}
    return {text: i for text, i in added.items() if text not in flagged}


def find_image_token(folder: Path) -> int | None:
    """The id that a tokenizer's files give ``<image>``, if any of them does."""
    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    spec, config, added = (read_json(folder / name) for name in names)
    ids = {token["content"]: int(token["id"]) for token in _added_tokens(spec, config)}
    return {**ids, **added}.get(IMAGE_TOKEN)


def _added_tokens(spec: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens of tokenizer.json, and those that only tokenizer_config.json has."""
    tokens = [dict(token) for token in spec.get("added_tokens", [])]
    listed = {token["content"] for token in tokens}
    flags = ("special", "single_word", "lstrip", "rstrip", "normalized")
    tokens += [
        {"id": int(i), "content": token["content"], **{key: token.get(key, False) for key in flags}}
        for i, token in config.get("added_tokens_decoder", {}).items()
        if token["content"] not in listed
    ]
    return sorted(tokens, key=lambda token: int(token["id"]))


def token_text(token: Any) -> str | None:
    """A token of tokenizer_config.json, which is a text or an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _named_special(config: Mapping[str, Any]) -> set[str | None]:
    """What tokenizer_config.json says is special, whatever the vocabulary calls it.

    Yi's has ``<|im_end|>`` as a word of the user's, which ends answers all the same.
    """
    decoder = (config.get("added_tokens_decoder") or {}).values()
    named = [config.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
    named += config.get("additional_special_tokens") or []
    return {*map(token_text, named), *(t["content"] for t in decoder if t.get("special"))}


def _backend(spec: Mapping[str, Any]) -> Backend:
    try:
        backend = Backend.from_str(json.dumps(spec))
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(f"tokenizer.json cannot be used: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # `Tokenizer.encode` finds them itself
    return backend


def _special_pattern(added: Iterable[Mapping[str, Any]]) -> re.Pattern[str]:
    """Finds every special token, the longest first, with the spaces that it swallows.

    One of a single character cannot be broken up; after a mark it is not matched.
    """
    patterns = {IMAGE_TOKEN: re.escape(IMAGE_TOKEN)}
    for token in added:
        left, right = (r"\s*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
        patterns[token["content"]] = left + re.escape(token["content"]) + right
    longest_first = sorted(patterns, key=len, reverse=True)
    return re.compile(f"(?<!{_MARK})({'|'.join(map(patterns.__getitem__, longest_first))})")


def _without_first_prefix(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer for text that does not open the prompt.

    Some tokenizer.json put a space before the first piece only (Metaspace, scheme "first").
    """
    pre = copy.deepcopy(spec.get("pre_tokenizer")) or {}
    for step in [pre, *pre.get("pretokenizers", [])]:
        if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return {**spec, "pre_tokenizer": pre or None}


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template, from the places where transformers has put it over the years."""
    if (jinja := folder / "chat_template.jinja").exists():
        return read_text(jinja)
    files = (read_json(folder / name) for name in ("chat_template.json", "processor_config.json"))
    template = next(
        (found for file in files if (found := file.get("chat_template"))),
        config.get("chat_template"),
    )
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return template.get("default") if isinstance(template, dict) else template
