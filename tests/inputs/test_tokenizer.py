"""Ids are sentencepiece's and the original LLaVA's; users' text has no special powers."""

from __future__ import annotations

import inspect
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llava.generation.detokenizer import StreamingDecoder
from mlx_llava.generation.stops import StopMatcher
from mlx_llava.inputs.tokenizer import Tokenizer
from mlx_llava.inputs.vocabulary import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    spec_from_byte_bpe,
    spec_from_pieces,
    spec_from_sentencepiece,
)
from tests.conftest import GOLDENS, SHARED

IMAGE = 32000
# The vectors of the original tokenizer_image_token (mm_utils.py), its -200 as IMAGE.
VECTORS = {
    "USER: <image>\nWhat is this? ASSISTANT:": (
        [1, 3148, 1001, 29901, 29871, IMAGE, 29871, 13, 5618, 338, 445, 29973]
        + [319, 1799, 9047, 13566, 29901]
    ),
    "[INST] <image>\nWhat is shown in this image? [/INST]": (
        [1, 518, 25580, 29962, 29871, IMAGE, 29871, 13, 5618, 338, 4318, 297, 445]
        + [1967, 29973, 518, 29914, 25580, 29962]
    ),
    "USER: <image>\nWhat are these?\nASSISTANT:": (
        [1, 3148, 1001, 29901, 29871, IMAGE, 29871, 13, 5618, 526, 1438, 29973, 13]
        + [22933, 9047, 13566, 29901]
    ),
    "USER: hi ASSISTANT: yes</s>USER: ok ASSISTANT:": (
        [1, 3148, 1001, 29901, 7251, 319, 1799, 9047, 13566, 29901, 4874, 2]
        + [3148, 1001, 29901, 3431, 319, 1799, 9047, 13566, 29901]
    ),
    "naïve café 🦙 日本語": (
        [1, 1055, 30085, 345, 274, 28059, 29871, 243, 162, 169, 156, 29871, 30325, 30346, 30968]
    ),
    "Hello world": [1, 15043, 3186],
    "  leading spaces": [1, 259, 8236, 8162],
    "###": [1, 835],
}


@pytest.fixture(scope="module")
def llama(llama_tokenizer_model, tmp_path_factory) -> Tokenizer:
    """LLaMA's tokenizer from its tokenizer.model."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(llama_tokenizer_model)
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": IMAGE}))
    return Tokenizer.from_folder(folder, IMAGE)


@pytest.fixture(scope="module")
def llama_again(llama, tmp_path_factory) -> Tokenizer:
    """The same from the tokenizer.json that we make of it."""
    folder = tmp_path_factory.mktemp("again")
    (folder / "tokenizer.json").write_text(json.dumps(llama.spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(llama.config))
    return Tokenizer.from_folder(folder, IMAGE)


@pytest.mark.parametrize("text", VECTORS)
@pytest.mark.parametrize("source", ["llama", "llama_again"])
def test_reference_vectors(text, source, request):
    assert request.getfixturevalue(source).encode(text) == VECTORS[text]


PIECES = ["a", "aa", " ", "   ", "▁", "\n", "\t", "é", "🦙", "the", "ing", "<0x0A>", "</s>", "<s>"]
PIECES += ["日本", "=", "==", "--", "0", "100", "<image>", "\u0000", "\u200d", "####"]


@pytest.fixture(scope="module")
def truth(llama_tokenizer_model):
    """sentencepiece on the same file."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=llama_tokenizer_model)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=20).map("".join)))
def test_ids_are_sentencepieces(llama, truth, text):
    text = text.replace("\x00", "").replace("\ufdd0", "")
    assert llama.encode(llama.protect(text)) == [1, *truth.encode(text)]


@pytest.fixture(scope="module")
def golden_tokenizers():
    """Ours and transformers'."""
    hf = pytest.importorskip("transformers")
    folder = GOLDENS / "llava"
    return Tokenizer.from_folder(folder, 4), hf.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*PIECES, "USER: ", "ASSISTANT:", "What is this?"])).map("".join))
def test_ids_are_transformers(golden_tokenizers, text):
    """On a tokenizer.json with special tokens that have effect."""
    ours, theirs = golden_tokenizers
    assert ours.encode(text) == theirs(text).input_ids


def test_transformers_written_llama_tokenizer_json(llama_tokenizer_model, tmp_path):
    """transformers 5 writes a tokenizer.json that puts a space before the first piece only."""
    hf = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(llama_tokenizer_model)
    theirs = hf.LlamaTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["<image>"], special_tokens=True)
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path, IMAGE)
    for text in ("USER: <image>\nWhat is this? ASSISTANT:", "a</s>b <image> c", "<s>a b"):
        assert ours.encode(text) == theirs(text).input_ids


def test_added_tokens_may_be_in_tokenizer_config_only(llama_tokenizer_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama_tokenizer_model)
    decoder = {str(IMAGE): {"content": "<image>", "special": True, "normalized": False}}
    decoder[str(IMAGE + 1)] = {"content": "<pad>", "special": True}
    config = {"added_tokens_decoder": decoder, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path, IMAGE)
    for text, ids in VECTORS.items():
        assert tokenizer.encode(text) == ids
    assert tokenizer.encode("<pad>") == [1, IMAGE + 1]


def test_added_tokens_have_the_flags_of_tokenizer_config(truth, llama_tokenizer_model, tmp_path):
    """Phi-3's marks of turns swallow the line's end behind them."""
    (tmp_path / "tokenizer.model").write_bytes(llama_tokenizer_model)
    added = {"<|end|>": 32001, "<|user|>": 32002, "<|assistant|>": 32000}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    decoder = {str(i): {"content": t, "rstrip": True, "special": True} for t, i in added.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    ours = Tokenizer.from_folder(tmp_path, IMAGE + 9)
    ids = ours.encode("<|user|>\nWhat is this?<|end|>\n<|assistant|>\n A dog.<|end|>\n")
    question, answer = map(truth.encode, ("What is this?", "A dog."))
    assert ids == [1, 32002, *question, 32001, 32000, *answer, 32001]
    assert ours.bytes_of(32001) == b"<|end|>"
    assert ours.decode(ids) == "What is this? A dog."


@pytest.mark.parametrize("config", [{}, {"bos_token": "<s>"}, {"bos_token": "<unk>"}])
def test_without_other_settings_the_begin_of_text_is_that_of_tokenizer_json(
    llama, config, tmp_path
):
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            begin,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({**llama.spec, "post_processor": processor})
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = Tokenizer.from_folder(tmp_path, IMAGE)
    assert found.bos_ids == ([] if config.get("bos_token") == "<unk>" else [1])


def test_bos_is_not_written_twice(llama):
    assert llama.encode("<s>Hello world") == llama.encode("Hello world")


@pytest.mark.parametrize("text", ["<image>", "</s>", "a<s>b", "<</s>/s>", "<image", "<s><image>"])
def test_protected_text_has_no_special_tokens(llama, text):
    special = set(llama.special_tokens.values())
    ids = llama.encode(llama.protect(text))
    assert ids[0] == 1
    assert not special & set(ids[1:])
    assert llama.decode(ids) == text


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "<|im_end|>"},
        {"eos_token": {"content": "<|im_end|>", "lstrip": False}},
        {"additional_special_tokens": ["<|im_end|>"]},
        {"added_tokens_decoder": {"3": {"content": "<|im_end|>", "special": True}}},
    ],
)
def test_what_tokenizer_config_names_is_special_whatever_the_vocabulary_says(config):
    """Yi's tokenizer.model has the mark as a word of the user's."""
    words = [*"<|im_end>ab", "▁"]
    marks = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<|im_end|>", USER_DEFINED)]
    pieces = [Piece(text, 0.0, kind) for text, kind in [*marks, *((w, NORMAL) for w in words)]]
    tokenizer = Tokenizer(spec_from_pieces(pieces, {}, False), config, 99)
    assert 3 in tokenizer.encode("a<|im_end|>b")
    typed = tokenizer.encode(tokenizer.protect("a<|im_end|>b"))
    assert 3 not in typed
    assert tokenizer.decode(typed) == "a<|im_end|>b"


def test_special_tokens_of_one_character_and_within_each_other(llama):
    added = [*llama.spec["added_tokens"]]
    flags = {"special": True, "single_word": False, "normalized": False}
    for i, (text, strips) in enumerate({"⌬": False, "<⌬>": False, "⌬⌬": True}.items()):
        token = {"id": 32001 + i, "content": text, "lstrip": strips, "rstrip": strips, **flags}
        added.append(token)
    tokenizer = Tokenizer({**llama.spec, "added_tokens": added}, llama.config, IMAGE)
    assert tokenizer.encode("a <⌬> b ⌬  ⌬⌬  c⌬") == [
        *[1, 263, 29871, 32002, 29871, 289, 29871, 32001, 32003, 274, 32001]
    ]
    special = {32001, 32002, 32003}
    for text in ("⌬", "a <⌬> ⌬⌬ ⌬", "<⌬⌬>", "  ⌬⌬  "):
        ids = tokenizer.encode(tokenizer.protect(text))
        assert not special & set(ids)
        assert tokenizer.decode(ids) == text


def test_protection_keeps_what_it_is_told_to(llama):
    text = llama.protect("</s><image>", keep={"<image>"})
    assert llama.encode(text)[-1] == IMAGE
    assert 2 not in llama.encode(text)


def test_tokenizer_and_model_must_agree_on_the_image_token():
    with pytest.raises(ValueError, match=r"the id 4, config.json\s+image_token_index=7"):
        Tokenizer.from_folder(GOLDENS / "llava", 7)


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        Tokenizer.from_folder(tmp_path, 4)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is not valid JSON"):
        Tokenizer.from_folder(tmp_path, 4)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="tokenizer.json cannot be used"):
        Tokenizer.from_folder(tmp_path, 4)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        spec_from_sentencepiece(b"\x01\x02\x03garbage", {})


def stream(tokenizer, ids) -> list[str]:
    decoder = StreamingDecoder(tokenizer)
    return [*(decoder.add(i) for i in ids), decoder.flush()]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=20).map("".join)))
def test_streamed_text_is_the_whole_text_in_whole_characters(llama, text):
    ids = llama.encode(llama.protect(text))[1:]
    parts = stream(llama, ids)
    assert "".join(parts) == llama.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_what_is_no_whole_character_is_flushed_at_the_end(llama):
    half_llama = llama.encode("🦙")[2:4]
    assert stream(llama, half_llama) == ["", "", "\ufffd\ufffd"]


def test_every_cut_of_a_stop_text_is_withheld():
    text, stop = "one ## two#### three", "###"
    for cut in range(1, len(text)):
        for second in range(cut, len(text)):
            matcher = StopMatcher([stop])
            shown = ""
            for part in (text[:cut], text[cut:second], text[second:]):
                new, stopped = matcher.add(part)
                shown += new
                if stopped:
                    break
            assert shown == "one ## two"


def test_what_only_began_like_a_stop_is_shown():
    matcher = StopMatcher(["</s>", "STOP"])
    assert matcher.add("a </") == ("a ", False)
    assert matcher.add("b> ST") == ("</b> ", False)
    assert matcher.flush() == "ST"


def test_the_earliest_of_several_stops_ends_the_text():
    assert StopMatcher(["later", "now"]).add("not now, later") == ("not ", True)


def test_shared_data_is_where_the_tests_look_for_it():
    """Says in the report whether the real tokenizer took part."""
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is missing; set MLX_LLAVA_TEST_DATA")


LLAMA_3_TEXTS = [
    "Hello world, it's 12345 o'clock!\n\n  What?  ",
    "naïve café 🦙 日本語\r\n\tdef f(x):\n    return x\n",
    "USER'LL DON'T 3.14159 ...   \n \n x",
]


def test_llama_3s_vocabulary_in_a_gguf_is_its_tokenizer_json():
    """Against transformers' own pattern for Llama 3's tokenizer."""
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    pattern = inspect.signature(convert.TikTokenConverter).parameters["pattern"].default
    theirs = Backend(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator(LLAMA_3_TEXTS * 3, trainer)
    model = json.loads(theirs.to_str())["model"]
    texts = sorted(model["vocab"], key=model["vocab"].__getitem__)
    pieces = [Piece(text, 0.0, NORMAL) for text in texts]
    end = len(pieces)
    pieces.append(Piece("<|eot_id|>", 0.0, CONTROL))
    merges = [" ".join(merge) for merge in model["merges"]]
    spec = spec_from_byte_bpe(pieces, merges, "llama-bpe")
    ours = Tokenizer(spec, {"add_bos_token": False}, end + 1)
    for text in LLAMA_3_TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
        assert ours.encode(f"{text}<|eot_id|>")[-1] == end
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre='falcon' is not supported"):
        spec_from_byte_bpe(pieces, merges, "falcon")


QWEN_TEXTS = [
    *LLAMA_3_TEXTS,
    "<|im_start|>user <image>\nHow many?<|im_end|><|im_start|>assistant\n",
    "e\u0301t\u00e9 \ufb01 \u212b",  # NFC joins the first, leaves the second, and makes an A-ring
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with vocab.json and merges.txt, and the tokenizer that transformers makes of it."""
    hf = pytest.importorskip("transformers")
    from tokenizers import trainers

    theirs = hf.Qwen2Tokenizer()
    backend = theirs.backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    backend.train_from_iterator(QWEN_TEXTS * 3, trainer)
    folder = tmp_path_factory.mktemp("qwen")
    model = json.loads(backend.to_str())["model"]
    ends = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    vocabulary = {text: i for text, i in model["vocab"].items() if text not in ends}
    vocabulary = {text: i for i, text in enumerate(sorted(vocabulary, key=vocabulary.get))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    added = {token: len(vocabulary) + i for i, token in enumerate(ends)}
    decoder = {str(i): {"content": token, "special": True} for token, i in added.items()}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None}
    config |= {"added_tokens_decoder": decoder, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, hf.Qwen2Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("source", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("text", QWEN_TEXTS)
def test_qwen2s_own_files_and_its_tokenizer_json(qwen, source, text, tmp_path):
    folder, theirs = qwen
    if source == "tokenizer.json":
        theirs.save_pretrained(folder := tmp_path)
    ours = Tokenizer.from_folder(folder, theirs.convert_tokens_to_ids("<image>"))
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.decode(ours.encode(text)) == theirs.decode(
        theirs(text).input_ids, skip_special_tokens=True
    )
    assert (ours.bos_ids, ours.eos_id) == ([], theirs.convert_tokens_to_ids("<|im_end|>"))
    special = {*ours.special_tokens.values()}
    assert not special & {*ours.encode(ours.protect(text))}


def test_qwen2s_files_that_are_not_whole_or_anothers_are_refused(qwen, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((qwen[0] / name).read_bytes())
    with pytest.raises(ValueError, match=r"vocab\.json of a None; .* Qwen2Tokenizer's"):
        Tokenizer.from_folder(tmp_path, 4)
    config = json.dumps({"tokenizer_class": "Qwen2TokenizerFast"})
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert Tokenizer.from_folder(tmp_path, 999).encode("a")
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 2}')
    with pytest.raises(ValueError, match=r"vocab\.json has gaps"):
        Tokenizer.from_folder(tmp_path, 4)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no vocab\.json with merges\.txt"):
        Tokenizer.from_folder(tmp_path, 4)


def test_half_a_character_is_named(loaded):
    with pytest.raises(ValueError, match=r"The text holds '\\udce9', which is half of a character"):
        loaded[1].tokenizer.encode("caf\udce9")
