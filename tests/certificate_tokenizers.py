"""Tokenizers of published families, small inside and with the published ids outside.

What stands between a few hundred learned pieces and the special tokens is filled up. The real
LLaMA tokenizer takes the place of its family's where the test data have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import jinja2
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from mlx_llava.checkpoint.verify import QUESTION
from mlx_llava.inputs.vocabulary import UNUSED, USER_DEFINED
from tests import layouts, tiny
from tests.conftest import SHARED
from tests.inputs.test_chat_template import RENDERED
from tests.published.row import Published

Spec = dict[str, Any]

#: Special tokens of a family by id; the first two begin and end a text.
SPECIAL: dict[str, dict[str, int]] = {
    "llama": {"<s>": 1, "</s>": 2, "<unk>": 0},
    "LLaMA": {"<s>": 1, "</s>": 2, "<unk>": 0},
    "small": {"<s>": 1, "</s>": 2, "<unk>": 0},
    "yi": {
        "<|startoftext|>": 1,
        "<|endoftext|>": 2,
        "<unk>": 0,
        "<|im_start|>": 6,
        "<|im_end|>": 7,
    },
    "llama3": {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eot_id|>": 128009,
    },
    "phi3": {
        "<s>": 1,
        "<|endoftext|>": 32000,
        "<unk>": 0,
        "</s>": 2,
        "<|assistant|>": 32001,
        "<|system|>": 32006,
        "<|end|>": 32007,
        "<|user|>": 32010,
    },
    "qwen2": {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|im_start|>": 151644},
}
SIZES = {"llama": 32000, "LLaMA": 32000, "small": layouts.VOCABULARY, "yi": 64000}
BOS = {family: family not in ("yi", "qwen2") for family in SPECIAL}


@cache
def sentencepiece_model(family: str) -> bytes:
    """A tokenizer.model: the real LLaMA's, or a small one that is filled up to its size."""
    real = SHARED / "tokenizers" / "llama-2.model"
    if family == "LLaMA" and real.exists():
        return real.read_bytes()
    model = proto.ModelProto()
    model.ParseFromString(layouts.sentencepiece_model())
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    for text, i in sorted(SPECIAL[family].items(), key=lambda item: item[1]):
        if i < len(("<unk>", "<s>", "</s>")):
            pieces[i] = (text, *pieces[i][1:])
        else:
            pieces.insert(i, (text, 0.0, USER_DEFINED))
    pieces += [(f"<{i}>", 0.0, UNUSED) for i in range(len(pieces), SIZES[family])]
    del model.pieces[:]
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    return bytes(model.SerializeToString())


def fast_tokenizer(family: str, marks: Mapping[str, int] | None = None) -> Spec:
    """The content of a tokenizer.json with the published ids of a family's special tokens."""
    spec: Spec = json.loads(tiny.tokenizer().to_str())
    special = {**SPECIAL[family], **(marks or {})}
    learned = [piece for piece, i in spec["model"]["vocab"].items() if i > 4]
    vocabulary = {piece: 10 + i for i, piece in enumerate(learned)}
    spec["model"] |= {"vocab": vocabulary | special, "unk_token": None}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] = [
        {"id": i, "content": text, "special": True, **flags}
        for text, i in sorted(special.items(), key=lambda item: item[1])
    ]
    if BOS[family]:
        bos = next(iter(special))
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}},
        }
    return spec


def tokenizer_config(row: Published) -> Spec:
    """The content of tokenizer_config.json."""
    bos, eos, *_ = SPECIAL[row.vocabulary]
    if row.vocabulary == "yi":
        eos = "<|im_end|>"
    config: Spec = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "LlamaTokenizer"}
    if row.vocabulary != "llama3":
        config["add_bos_token"] = BOS[row.vocabulary]
    if row.chat_template:
        config["chat_template"] = row.chat_template
    return config | row.tokenizer_config


def prompt_of(row: Published) -> str:
    """The question about a picture as the row's template writes it."""
    asked = f"<image>\n{QUESTION}"
    if row.template == "own":
        bos, eos, *_ = SPECIAL[row.vocabulary]
        turn = {"role": "user", "content": asked}
        return jinja2.Template(row.chat_template or "").render(
            messages=[turn], bos_token=bos, eos_token=eos, add_generation_prompt=True
        )
    text = RENDERED[row.template][0].replace("Q", asked)
    is_wrapped = row.config.get("mm_use_im_start_end")
    return text.replace("<image>", "<im_start><image><im_end>") if is_wrapped else text


def ids_of_original(row: Published, tokens: int, image: int) -> list[int]:
    """LLaVA's tokenizer_image_token (mm_utils.py) with sentencepiece as the tokenizer.

    Each piece between pictures is tokenised on its own, with a begin of text of which the first
    alone is kept; special tokens cut pieces as transformers' slow tokenizers do.
    """
    special = {**SPECIAL[row.vocabulary], **row.added_tokens}
    if row.vocabulary in ("llama3", "qwen2"):
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(json.dumps(fast_tokenizer(row.vocabulary)))
        encode = lambda piece: backend.encode(piece, add_special_tokens=False).ids  # noqa: E731
    else:
        model = sentencepiece_model(row.vocabulary)
        encode = sentencepiece.SentencePieceProcessor(model_proto=model).encode
    cut = re.compile(f"({'|'.join(map(re.escape, special))})")
    ids: list[int] = []
    for i, chunk in enumerate(prompt_of(row).split("<image>")):
        ids += [image] * tokens if i else []
        for piece in cut.split(chunk):
            ids += [special[piece]] if piece in special else encode(piece) if piece else []
    bos = special[next(iter(SPECIAL[row.vocabulary]))]
    return ids if ids[0] == bos or not BOS[row.vocabulary] else [bos, *ids]


def ids_of_transformers(folder: Any, row: Published, picture: Any) -> Any:
    """What transformers' processor makes of a folder's own files: ids and pixels."""
    import transformers as hf

    if row.config["model_type"] == "llava_onevision":
        processor = tiny.read_onevision_processor(folder)
    elif row.config["model_type"] == "llava_next_video":  # whose own wants torchvision
        processor = hf.LlavaNextProcessor.from_pretrained(folder)
    else:
        processor = hf.AutoProcessor.from_pretrained(folder)
    if row.template != "own":
        text = prompt_of(row)
    else:
        content: Any = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        if ".type" not in str(row.chat_template):
            content = f"<image>\n{QUESTION}"
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    bos = processor.tokenizer.bos_token
    is_whole = bos is not None and text.startswith(bos)
    return processor(
        text=text, images=picture, add_special_tokens=not is_whole, return_tensors="pt"
    )
