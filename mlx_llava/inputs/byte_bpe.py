"""Byte-level BPE as llama.cpp stores it -> tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_llava.inputs.sentencepiece import Piece, special_pieces

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


def begins_with_bos(pre: str) -> bool:
    """Whether prompts begin with a begin of text where a file does not say."""
    return pre in _LLAMA_3_LIKE


def spec_from_byte_bpe(pieces: Sequence[Piece], merges: Sequence[str], pre: str) -> dict[str, Any]:
    """Writes a byte-level BPE (Llama 3, SmolLM) as a tokenizer.json.

    Args:
        pieces (list of Piece): The vocabulary.
        merges (list of str): Pairs, separated by a space, the first merge first.
        pre (str): llama.cpp's name for the way to cut text.

    Raises:
        ValueError: That way is not known here.
    """
    if pre not in _PATTERNS:
        known = ", ".join(sorted(_PATTERNS))
        raise ValueError(f"tokenizer.ggml.pre={pre!r} is not supported; known: {known}.")
    cuts = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        for cut in _PATTERNS[pre]
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "added_tokens": special_pieces(pieces, {}),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "ignore_merges": pre in _LLAMA_3_LIKE,
            # Special tokens too: tokenizers gives those that are missing here the next free ids.
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
