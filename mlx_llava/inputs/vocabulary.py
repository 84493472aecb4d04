"""Vocabularies of SentencePiece's files, Qwen2's and llama.cpp's -> tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

#: SentencePiece's kinds of pieces (sentencepiece_model.proto), which llama.cpp keeps.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

#: How GPT-2 cuts text into words (openai/gpt-2, src/encoder.py).
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: How to cut text before BPE, one pattern after another, by the names of ``tokenizer.ggml.pre``
#: that LLaMA's and Mistral's families have (llama.cpp, src/llama-vocab.cpp).
_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "deepseek-coder": (
        *(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+"),
        *(r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    ),
    **dict.fromkeys(("gpt-2", "trillion"), (GPT_2,)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0", "pixtral", "smaug-bpe"),
        (_LLAMA_3,),
    ),
    **dict.fromkeys(("megrez", "qwen2"), (_LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"),)),
    **dict.fromkeys(("smollm", "minerva-7b"), (r"\p{N}", GPT_2)),
    "tekken": (_TEKKEN,),
}
#: Whose words are taken whole where the vocabulary has them, and whose prompts begin with a
#: begin of text unless the file says otherwise.
_LLAMA_3_LIKE = frozenset("llama-bpe llama3 llama-v3 falcon3 midm-2.0 pixtral tekken".split())


class Piece(NamedTuple):
    """One entry of a vocabulary; its id is its index."""

    text: str
    score: float
    kind: int


def spec_from_sentencepiece(model: bytes, added_tokens: Mapping[str, int]) -> dict[str, Any]:
    """Writes tokenizer.model, a SentencePiece BPE (LLaMA, Mistral, Yi), and added_tokens.json.

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
    """Writes SentencePiece's BPE so that it gives sentencepiece's ids.

    Every piece between special tokens is tokenised on its own ("legacy" in transformers' words),
    as the original LLaVA does. With `add_prefix`, text begins with a space that it does not have.
    """
    normal = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    merges = [
        (-score, text[:cut], text[cut:])
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    merges.sort(key=lambda merge: merge[0])
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    ]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if add_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _spec(
        pieces,
        added_tokens,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            "unk_token": next((piece.text for piece in pieces if piece.kind == UNKNOWN), None),
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == BYTE for piece in pieces),
            "merges": [[left, right] for _, left, right in merges],
        },
    )


def begins_with_bos(pre: str) -> bool:
    """Whether prompts begin with a begin of text where a file does not say."""
    return pre in _LLAMA_3_LIKE


def spec_from_qwen2(
    vocabulary: Mapping[str, int], merges: str, added_tokens: Mapping[str, int]
) -> dict[str, Any]:
    """Writes Qwen2's vocab.json, merges.txt and added_tokens.json.

    Raises:
        ValueError: The ids of the vocabulary are not 0, 1, 2, ...
    """
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[text] for text in texts] != [*range(len(texts))]:
        raise ValueError("vocab.json has gaps: its ids are not 0, 1, 2, ...")
    pieces = [Piece(text, 0.0, NORMAL) for text in texts]
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    spec = spec_from_byte_bpe(pieces, lines, "qwen2", added_tokens)
    return {**spec, "normalizer": {"type": "NFC"}}


def spec_from_byte_bpe(
    pieces: Sequence[Piece],
    merges: Sequence[str],
    pre: str,
    added_tokens: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Writes a byte-level BPE (Llama 3, Qwen2), whose merges are pairs with a space between.

    Raises:
        ValueError: llama.cpp's name `pre` for the way to cut text is not known here.
    """
    if pre not in _PATTERNS:
        known = ", ".join(sorted(_PATTERNS))
        raise ValueError(f"tokenizer.ggml.pre={pre!r} is not supported; known: {known}.")
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        for cut in _PATTERNS[pre]
    ]
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    byte_level = {"type": "ByteLevel", **flags}
    return _spec(
        pieces,
        added_tokens or {},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        decoder=byte_level,
        model={
            "byte_fallback": False,
            "ignore_merges": pre in _LLAMA_3_LIKE,
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    )


def _spec(
    pieces: Sequence[Piece], more: Mapping[str, int], model: Mapping[str, Any], **parts: Any
) -> dict[str, Any]:
    """A control piece is a token of its own; a user-defined one counts as text."""
    special = {
        piece.text: (i, piece.kind != USER_DEFINED)
        for i, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    special |= {text: (i, True) for text, i in more.items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": text, "special": is_special, **flags}
        for text, (i, is_special) in special.items()
    ]
    # Special tokens too: tokenizers gives those that are missing here the next free ids.
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    nothing = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor"))
    model = {"type": "BPE", "vocab": vocabulary, **model}
    return {"version": "1.0", "added_tokens": added, **nothing, **parts, "model": model}
