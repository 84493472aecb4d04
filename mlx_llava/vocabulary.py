"""Vocabularies of other formats -> tokenizer.json: SentencePiece's, and llama.cpp's two kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: SentencePiece's kinds of pieces (sentencepiece_model.proto), which llama.cpp keeps.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

#: Llama 3's way to cut text before BPE (tokenizer.json of Meta-Llama-3-8B).
_LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Piece:
    """One entry of a vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


def spec_from_sentencepiece(model: bytes, added_tokens: Mapping[str, int]) -> dict[str, Any]:
    """Writes a SentencePiece BPE model (LLaMA, Mistral, Yi) as a tokenizer.json.

    Args:
        model (bytes): The content of tokenizer.model.
        added_tokens (dict): The content of added_tokens.json: text -> id.

    Returns:
        dict: See `spec_from_pieces`.

    Raises:
        ValueError: It is no SentencePiece BPE model, or one that normalises its text.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise ValueError("tokenizer.model is not a SentencePiece model.") from error
    rules = proto.normalizer_spec
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ValueError("tokenizer.model is not a BPE model; only BPE is supported.")
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise ValueError("tokenizer.model normalises its text, which is not supported.")
    pieces = [Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    return spec_from_pieces(pieces, added_tokens, rules.add_dummy_prefix)


def spec_from_pieces(
    pieces: Sequence[Piece], added_tokens: Mapping[str, int], add_prefix: bool
) -> dict[str, Any]:
    """Writes SentencePiece's BPE as a tokenizer.json that gives sentencepiece's ids.

    Every piece between special tokens is tokenised on its own ("legacy" in transformers'
    words), as the original LLaVA does.

    Args:
        pieces (list of Piece): The vocabulary.
        added_tokens (dict): More special tokens: text -> id.
        add_prefix (bool): Whether text begins with a space that it does not have.
    """
    normal = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    merges = [
        (-score, text[:cut], text[cut:])
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    merges.sort(key=lambda merge: merge[0])
    prepend = [{"type": "Prepend", "prepend": "▁"}] if add_prefix else []
    space_to_bar = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    bar_to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [bar_to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    return {
        "version": "1.0",
        "added_tokens": _added_tokens(pieces, added_tokens),
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, space_to_bar]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, strip] if prepend else decoders},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == BYTE for piece in pieces),
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": [[left, right] for _, left, right in merges],
        },
    }


def spec_from_byte_bpe(pieces: Sequence[Piece], merges: Sequence[str], pre: str) -> dict[str, Any]:
    """Writes a byte-level BPE (Llama 3) as a tokenizer.json.

    Args:
        pieces (list of Piece): The vocabulary.
        merges (list of str): Pairs, separated by a space, the first merge first.
        pre (str): llama.cpp's name for the way to cut text.

    Raises:
        ValueError: That way is not known here.
    """
    if pre not in ("llama-bpe", "llama3", "llama-v3"):
        raise ValueError(f"tokenizer.ggml.pre={pre!r} is not supported, only Llama 3's.")
    split = {
        "type": "Split",
        "pattern": {"Regex": _LLAMA_3_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "added_tokens": _added_tokens(pieces, {}),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {p.text: i for i, p in enumerate(pieces) if p.kind == NORMAL},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }


def _added_tokens(pieces: Sequence[Piece], more: Mapping[str, int]) -> list[dict[str, Any]]:
    """A control piece is a token of its own; a user-defined one counts as text."""
    special = {
        piece.text: (i, piece.kind != USER_DEFINED)
        for i, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    special |= {text: (i, True) for text, i in more.items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": text, "special": is_special, **flags}
        for text, (i, is_special) in special.items()
    ]
