"""SentencePiece's vocabularies, in its own files and in llama.cpp's -> tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: SentencePiece's kinds of pieces (sentencepiece_model.proto), which llama.cpp keeps.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


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
        "added_tokens": special_pieces(pieces, added_tokens),
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


def special_pieces(pieces: Sequence[Piece], more: Mapping[str, int]) -> list[dict[str, Any]]:
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
