"""llama.cpp's GGUF pairs: no code is lost, and what changes the maths is read or refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llava import convert
from mlx_llava.checkpoint import gguf as reader
from mlx_llava.checkpoint.gguf_blocks import BLOCKS
from mlx_llava.checkpoint.tensors import Canonical
from mlx_llava.inputs.vocabulary import CONTROL, NORMAL, USER_DEFINED, Piece, spec_from_byte_bpe
from mlx_llava.model.llama import rope_frequencies
from tests.conftest import load_as_stored as load

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
gguf = pytest.importorskip("gguf")
layouts = pytest.importorskip("tests.layouts")
tiny = pytest.importorskip("tests.tiny")
from tests.gguf_files import sentencepieces, write_text, write_vision  # noqa: E402

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
OTHER_TYPES = ["Q2_K", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "MXFP4"]


def make_pair(folder: Path, reference=None, kind: str = "F32", vision=None, **text):
    """A pair in a folder: the reference model, the two files, and what the first one means."""
    reference = reference or tiny.make_model(layouts.case())
    files = folder / "llm.gguf", folder / "mm.gguf"
    meant = write_text(files[0], reference, kind, **text)
    write_vision(files[1], reference, **(vision or {}))
    return reference, files, meant


def load_pair(folder: Path, **options):
    return load(folder / "llm.gguf", mmproj=folder / "mm.gguf", **options)


def error_of(model, processor, reference) -> float:
    """How far logits are from the reference's, relative to the largest."""
    inputs = layouts.inputs_of(processor)
    ours = np.array(model(**inputs).astype(mx.float32))
    theirs = layouts.reference_logits(reference, inputs)
    size = min(ours.shape[-1], theirs.shape[-1])
    return float(np.abs(ours[..., :size] - theirs[..., :size]).max() / np.abs(theirs).max())


@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_the_dequantisers_to_the_bit(kind, tmp_path):
    reference, _, meant = make_pair(tmp_path, kind=kind)
    model, processor = load_pair(tmp_path)
    assert processor.image_processor.mode == "pad"
    assert processor.image_processor.mean == pytest.approx((0.4, 0.5, 0.6))
    ours = dict(tree_flatten(model.parameters()))
    for name, weights in meant.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" in ours:
            assert kind in BLOCKS
            settings = {"group_size": 32, "bits": BLOCKS[kind].bits}
            parts = (ours[f"{path}.{p}"].astype(mx.float32) for p in ("scales", "biases"))
            found = mx.dequantize(ours[name], *parts, **settings)
            assert np.abs(np.array(found) - weights).max() < 1e-6
        else:
            found = np.array(ours[name].astype(mx.float32))[: len(weights)]
            is_half = ours[name].dtype == mx.float16
            assert np.array_equal(found, weights.astype(np.float16) if is_half else weights)
    with torch.no_grad():
        state = reference.state_dict()
        for name, weights in meant.items():
            key = name.replace("language_model.model", "model.language_model")
            key = key.replace("language_model.lm_head", "lm_head")
            state[key][: len(weights)] = torch.tensor(weights)
    assert error_of(model, processor, reference) < (1e-4 if kind == "F32" else 2e-2)


def tensor_of(folder: Path, kind: str, data: np.ndarray):
    """The one tensor of a file as read, and the settings of its layer."""
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    writer.add_tensor("output.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = reader.open_reader(folder / "x.gguf", "llama").tensors
    model = Canonical()
    reader._add(model, folder / "x.gguf", tensor, "language_model.lm_head.weight", None)
    for lazy in model.tensors.values():
        array = lazy.read()
        assert (array.shape, array.dtype) == (lazy.shape, lazy.dtype)
    return {name.rpartition(".")[2]: t.read() for name, t in model.tensors.items()}, model.layers


def random_blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    shape = (rows, columns // block * size)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_every_other_type_goes_through_the_dequantiser(kind, tmp_path):
    """On random blocks: gguf-py cannot quantise to most of these."""
    data = random_blocks(kind, 3, 512)
    with np.errstate(all="ignore"):  # random scales are infinite now and then
        tensors, settings = tensor_of(tmp_path, kind, data)
        theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float16)
    assert not settings
    assert np.array_equal(np.array(tensors["weight"]), theirs, equal_nan=True)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("rows", [1, 300])
def test_blocks_that_mlx_has_keep_their_codes(kind, rows, tmp_path):
    """On random codes and scales, in more rows than are read at a time."""
    blocks, columns = BLOCKS[kind], 2048
    data = random_blocks(kind, rows, columns).reshape(-1, blocks.nbytes)
    halves = 2 if kind.endswith(("_1", "_K")) else 1  # a minimum beside the scale
    scales = np.random.default_rng(1).uniform(-0.1, 0.1, (len(data), halves)).astype(np.float16)
    data[:, : 2 * halves] = scales.view(np.uint8)
    tensors, settings = tensor_of(tmp_path, kind, data.reshape(rows, -1))
    (setting,) = settings.values()
    ours = mx.dequantize(
        tensors["weight"],
        *(tensors[part].astype(mx.float32) for part in ("scales", "biases")),
        **setting,
    )
    qtype = gguf.GGMLQuantizationType[kind]
    theirs = gguf.quants.dequantize(data.reshape(rows, -1), qtype)
    assert np.abs(np.array(ours) - theirs).max() < 1e-6 * np.abs(theirs).max()


def test_llava_16_with_the_new_names(tmp_path):
    reference = tiny.make_model(layouts.case(next=True))
    pairs = [n for pair in reference.config.image_grid_pinpoints for n in pair]
    extra = {"image_grid_pinpoints": pairs, "mm_patch_merge_type": "spatial_unpad"}
    vision = {**extra, "feature_layer": [3], "layers": 4, "swapped": False}
    make_pair(tmp_path, reference, vision=vision)
    model, processor = load_pair(tmp_path)
    assert model.config.feature_layers == (3,)
    assert processor.image_processor.mode == "anyres"
    assert error_of(model, processor, reference) < 1e-5


def test_without_an_output_layer_it_is_tied(tmp_path):
    reference = tiny.make_model(layouts.case(tie_word_embeddings=True))
    make_pair(tmp_path, reference, "F16", tied=True)
    model, processor = load_pair(tmp_path)
    assert model.config.tie_word_embeddings
    assert error_of(model, processor, reference) < 2e-2


def test_biases_are_read_and_permuted(tmp_path):
    reference = tiny.make_model(layouts.case(attention_bias=True, mlp_bias=True))
    make_pair(tmp_path, reference)
    assert error_of(*load_pair(tmp_path), reference) < 1e-4


def llama_3_factors(theta: float, dims: int, scaling: dict) -> np.ndarray:
    """What convert_hf_to_gguf.py writes as rope_freqs.weight (LlamaModel)."""
    factors = []
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    for i in range(0, dims, 2):
        wavelength = 2 * math.pi * theta ** (i / dims)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(scaling["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def test_rope_freqs_are_llama_31s_scaling(tmp_path):
    reference = tiny.make_model(layouts.case(rope_parameters=LLAMA_3))
    factors = llama_3_factors(500.0, 16, LLAMA_3)
    assert len({*factors.tolist()}) > 3
    make_pair(tmp_path, reference, extra={"rope_freqs.weight": factors})
    model, processor = load_pair(tmp_path)
    assert error_of(model, processor, reference) < 1e-4
    convert(tmp_path / "llm.gguf", tmp_path / "out", mmproj=tmp_path / "mm.gguf")
    assert error_of(*load(tmp_path / "out"), reference) < 1e-4
    hf = pytest.importorskip("transformers")
    theirs = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    periods = 1 / theirs.model.language_model.rotary_emb.inv_freq.numpy()
    assert np.allclose(rope_frequencies(model.config.text_config), periods, rtol=1e-6)
    assert error_of(model, processor, theirs) < 1e-4


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 4.0},
        {"rope.scale_linear": 4.0},
    ],
    ids=["linear", "no type", "old key"],
)
def test_linear_scaling_is_read_under_its_new_and_old_keys(keys, tmp_path):
    scaling = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    reference = tiny.make_model(layouts.case(rope_parameters=scaling))
    make_pair(tmp_path, reference, keys=keys)
    assert error_of(*load_pair(tmp_path), reference) < 1e-4


REFUSED = {
    "experts": ({"expert_count": 8}, "llama.expert_count=8 is not supported"),
    "logit scale": ({"logit_scale": 0.25}, r"llama.logit_scale=0.25 is not"),
    "attention factor": ({"rope.scaling.attn_factor": 1.2}, "attn_factor=1.2.* is not supported"),
    "attention": ({"attention.scale": 1.0}, "llama.attention.scale=1.0 is not supported"),
    "yarn": ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn' is not"),
    "partial rotary": ({"rope.dimension_count": 8}, r"rope.dimension_count=8 is not .* heads' 16"),
    "by layer": ({"attention.head_count_kv": [2, 2, 4]}, r"head_count_kv .*is \[2, 2, 4\]"),
    "no width": ({"embedding_length": None}, "llama.embedding_length of the GGUF is missing"),
    "no heads": ({"attention.head_count": 0}, "head_count of the GGUF is 0; expected a positive"),
    "odd heads": (
        {"attention.head_count": 3, "rope.dimension_count": 21},
        "64 rows, which 3 heads",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_maths_is_refused_by_name(name, tmp_path):
    keys, message = REFUSED[name]
    make_pair(tmp_path, keys=keys)
    with pytest.raises(ValueError, match=message):
        load_pair(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.0.attn_q_norm.weight", "has a tensor blk.0.attn_q_norm.weight, which no LLaVA has"),
        ("rope_factors_long.weight", "needs short_factor"),
    ],
)
def test_unknown_tensors_are_refused(name, message, tmp_path):
    make_pair(tmp_path, extra={name: np.ones(16, np.float32)})
    with pytest.raises(ValueError, match=message):
        load_pair(tmp_path)


PHI_3 = {"pad_token_id": 3, "num_key_value_heads": 2, "original_max_position_embeddings": 90}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1 + i / 4 for i in range(8)],
    "long_factor": [2 + i for i in range(8)],
    "original_max_position_embeddings": 90,
    "attention_factor": 1.25,
}
DECODERS = {
    "qwen2": ("qwen2", {}, {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "phi3": ("phi3", PHI_3, {"attention.sliding_window": 0}),
    "phi3, window": ("phi3", {**PHI_3, "sliding_window": 13}, {"attention.sliding_window": 13}),
    "phi3, longrope": (
        "phi3",
        {**PHI_3, "rope_parameters": LONGROPE},
        {"rope.scaling.original_context_length": 90, "rope.scaling.attn_factor": 1.25},
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "F32") for name in DECODERS), ("qwen2", "Q8_0"), ("phi3, window", "Q4_1")],
)
def test_other_decoders_have_their_names_and_rows(name, kind, tmp_path):
    """Nothing is permuted; Phi-3's layers are fused, and its factors stand in tensors."""
    family, text, keys = DECODERS[name]
    case = replace(layouts.case(head_dim=16, **text), family=family)
    reference = tiny.make_model(case)
    extra = {
        f"rope_factors_{length}.weight": np.array(LONGROPE[f"{length}_factor"], np.float32)
        for length in ("short", "long")
        if "longrope" in name
    }
    tied = "tied" in name
    _, _, meant = make_pair(tmp_path, reference, kind, tied=tied, keys=keys, extra=extra)
    state = reference.state_dict()
    for key, weights in meant.items():
        own = key.replace("language_model.model", "model.language_model")
        state[own.replace("language_model.lm_head", "lm_head")][: len(weights)] = torch.tensor(
            weights
        )
    model, processor = load_pair(tmp_path, dtype="float32")
    assert model.config.text_config.context_length == (90 if "longrope" in name else 777)
    assert error_of(model, processor, reference) < 1e-4


def test_towers_that_are_not_clips_are_refused_by_name(tmp_path):
    make_pair(tmp_path, vision={"without": "v.class_embd"})
    with pytest.raises(ValueError, match="a tower without a class token, as SigLIP is"):
        load_pair(tmp_path)


def test_neutral_keys_and_rotation_tables_do_nothing(tmp_path):
    keys = {"expert_count": 0, "logit_scale": 1.0, "attention.key_length": 16}
    table = {"blk.0.attn_rot_embd.weight": np.ones(8, np.float32)}
    reference, _, _ = make_pair(tmp_path, keys=keys, extra=table)
    assert error_of(*load_pair(tmp_path), reference) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_type": [1]}, "360 tokens, 360 scores and 1 types; expected as many of each"),
        ({"tokens": [str(i) for i in range(390)]}, "390 tokens but embeddings of 384 only"),
        ({"tokens": None}, "no vocabulary"),
        ({"model": "rwkv"}, "tokenizer.ggml.model='rwkv' is not supported"),
    ],
)
def test_broken_vocabularies_are_named(change, message, tmp_path):
    make_pair(tmp_path, vocabulary={**sentencepieces(), **change})
    with pytest.raises(ValueError, match=message):
        load_pair(tmp_path)


def test_tokens_are_sentencepieces(tmp_path):
    import sentencepiece

    make_pair(tmp_path, kind="F16")
    _, processor = load_pair(tmp_path)
    spm = sentencepiece.SentencePieceProcessor(model_proto=layouts.sentencepiece_model())
    for text in ("How many cats?", "  two  spaces", "naïve 🦙\n", ""):
        assert processor.tokenizer.encode(text) == [1, *spm.encode(text)]
    assert processor.eos_ids == {2}


def byte_pieces() -> dict:
    """A byte-level vocabulary whose control pieces come first, as SmolLM2's do."""
    model = json.loads(tiny.tokenizer().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens[:4] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>"]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [CONTROL] * 3 + [USER_DEFINED, CONTROL] + [NORMAL] * (len(tokens) - 5),
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "eot_token_id": 3,
    }


def test_control_pieces_of_byte_level_vocabularies_are_special(tmp_path):
    make_pair(tmp_path, vocabulary=byte_pieces())
    _, processor = load_pair(tmp_path)
    tokenizer = processor.tokenizer
    assert processor.eos_ids == {2, 3}
    assert tokenizer.bos_ids == []  # as llama.cpp, where the file does not say and it is no Llama 3
    assert tokenizer.encode("<|im_start|>")[0] == 1
    text = "How many cats are there, on a chair?"
    ids = tiny.tokenizer().encode(text).ids
    assert tokenizer.encode(f"<|im_start|>{text}<|im_end|>") == [1, *ids, 2]
    assert tokenizer.decode([1, *ids, 2]) == text
    assert 2 not in tokenizer.encode(tokenizer.protect("<|im_end|>"))


def test_ids_of_control_pieces_survive_conversion(tmp_path):
    make_pair(tmp_path, vocabulary=byte_pieces())
    convert(tmp_path / "llm.gguf", tmp_path / "out", mmproj=tmp_path / "mm.gguf")
    _, processor = load(tmp_path / "out")
    assert processor.tokenizer.special_tokens["<|im_end|>"] == 2
    hf = pytest.importorskip("transformers")
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.convert_tokens_to_ids("<|im_end|>") == 2


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED, NORMAL])
def test_a_vocabulary_may_have_the_placeholder_anywhere(kind, tmp_path):
    vocabulary = byte_pieces()
    vocabulary["token_type"][4] = kind
    reference, _, _ = make_pair(tmp_path, vocabulary=vocabulary)
    reference.config.image_token_id = 4
    model, processor = load_pair(tmp_path)
    assert model.config.image_token_index == 4
    assert error_of(model, processor, reference) < 1e-4


DIGITS = "It's 2024, they'VE 12345 cats!\n\n  x = f(a)[7]; naïve 猫が好き <tag>"
#: How each family's own tokenizer cuts a text (their tokenizer.json).
CUTS = {
    "gpt-2": "It|'s| 2024|,| they|'|VE| 12345| cats|!",
    "smollm": "It|'s| |2|0|2|4|,| they|'|VE| |1|2|3|4|5| cats|!",
    "llama-bpe": "It|'s| |202|4|,| they|'VE| |123|45| cats|!",
    "qwen2": "It|'s| |2|0|2|4|,| they|'VE| |1|2|3|4|5| cats|!",
    "default": "It|'|s| |202|4|,| they|'|VE| |123|45| cats|!",
    "tekken": "It|'s| |2|0|2|4|,| they|'VE| |1|2|3|4|5| cats|!",
    "deepseek-coder": "It|'|s| |2|0|2|4|,| they|'|VE| |1|2|3|4|5| cats|!",
}


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_the_models_family_does(pre):
    from tokenizers import Tokenizer as Backend

    spec = spec_from_byte_bpe([Piece("a", 0.0, NORMAL)], [], pre)
    cuts = Backend.from_str(json.dumps(spec)).pre_tokenizer.pre_tokenize_str(DIGITS)
    found = [DIGITS[slice(*where)] for _, where in cuts]
    assert "".join(found) == DIGITS
    assert "|".join(found).startswith(CUTS[pre])


def test_other_cuts_are_refused_by_name(tmp_path):
    make_pair(tmp_path, vocabulary={**byte_pieces(), "pre": "falcon"})
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre='falcon' is not supported; known: "):
        load_pair(tmp_path)


def test_files_from_before_the_key_are_llama_3s_or_said(tmp_path):
    vocabulary = {**byte_pieces(), "pre": None}
    make_pair(tmp_path, vocabulary=vocabulary)
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre"):
        load_pair(tmp_path)
    vocabulary["tokens"][1] = "<|begin_of_text|>"
    make_pair(tmp_path, vocabulary=vocabulary)
    _, processor = load_pair(tmp_path)
    assert processor.tokenizer.bos_ids == [1]


def test_a_folder_with_a_pair_is_read(tmp_path):
    reference, (text, vision), _ = make_pair(tmp_path)
    for name in ("._llm.gguf", "._model.safetensors"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "README.md").write_text("# LLaVA")
    assert error_of(*load(tmp_path), reference) < 1e-4
    text.rename(tmp_path / "b.gguf")
    vision.rename(tmp_path / "a.gguf")
    assert error_of(*load(tmp_path), reference) < 1e-4
    (tmp_path / "c.gguf").write_bytes((tmp_path / "b.gguf").read_bytes())
    message = "holds 2 language model GGUFs, b.gguf, c.gguf; name one: --model FILE"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    (tmp_path / "c.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    with pytest.raises(ValueError, match="2 mmproj GGUFs, a.gguf, c.gguf; name one: --mmproj FILE"):
        load(tmp_path)
    assert error_of(*load(tmp_path, mmproj=tmp_path / "c.gguf"), reference) < 1e-4
    (tmp_path / "c.gguf.aria2").touch()
    with pytest.raises(ValueError, match=r"c.gguf is not whole: there is c.gguf.aria2"):
        load(tmp_path, mmproj=tmp_path / "c.gguf")
    (tmp_path / "b.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="no language model GGUF; name one: --model"):
        load(tmp_path)


def test_what_is_no_pair_is_named(tmp_path):
    make_pair(tmp_path)
    with pytest.raises(ValueError, match="needs its mmproj too: --mmproj"):
        load(tmp_path / "llm.gguf")
    with pytest.raises(ValueError, match="is a GGUF of 'clip', expected 'llama'"):
        load(tmp_path / "mm.gguf", mmproj=tmp_path / "mm.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load(tmp_path / "text.gguf", mmproj=tmp_path / "mm.gguf")
    (tmp_path / "mm.gguf").unlink()
    (tmp_path / "text.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="no mmproj GGUF; name one: --mmproj FILE"):
        load(tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.98])
def test_half_a_download_is_said(share, tmp_path):
    _, (text, _), _ = make_pair(tmp_path)
    data = text.read_bytes()
    text.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="is not a GGUF file, or not all of one"):
        load_pair(tmp_path)


def test_parts_and_other_machines_files_are_refused(tmp_path):
    make_pair(tmp_path)
    for name, order, count in (("big", gguf.GGUFEndian.BIG, 1), ("part", None, 3)):
        options = {"endianess": order} if order else {}
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama", **options)
        writer.add_uint16("split.count", count)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    for name, message in (("big", "for big-endian machines"), ("part", "is one of 3 parts")):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / f"{name}.gguf", mmproj=tmp_path / "mm.gguf")


def test_the_template_is_guessed_by_the_files_name(tmp_path):
    _, (text, _), _ = make_pair(tmp_path)
    text.rename(tmp_path / "llava-llama-2-13b-chat.Q4_0.gguf")
    model, processor = load(tmp_path)
    assert model.config.conv_mode == processor.template.name == "llava_llama_2"
