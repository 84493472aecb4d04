"""GPTQ, AWQ and GGUF: not a code is lost on the way to MLX's own quantisation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llava.checkpoint import gptq
from mlx_llava.checkpoint.tensors import from_array
from tests.conftest import load_as_stored as load

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
layouts = pytest.importorskip("tests.layouts")
tiny = pytest.importorskip("tests.tiny")

LINEAR = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column each nibble of a word holds


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along axis 0 as one little-endian stream of bits in int32 words, one by one."""
    rows, columns = codes.shape
    words = np.zeros((rows * bits // 32, columns), np.uint64)
    for i in range(rows):
        value = codes[i].astype(np.uint64) << np.uint64(bits * i % 32)
        words[bits * i // 32] |= value & np.uint64(0xFFFFFFFF)
        if bits * i % 32 + bits > 32:
            words[bits * i // 32 + 1] |= value >> np.uint64(32)
    return words.astype(np.uint32).view(np.int32)


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """AutoAWQ's gemm words along axis 1."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for nibble, column in enumerate(AWQ_ORDER):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def quantised_layer(out, inputs, bits, group_size, kind="gptq", scale_dtype=np.float32, seed=0):
    """Random codes: the tensors of a file, and the weights (out, in) that they mean."""
    rng = np.random.default_rng(seed)
    groups = math.ceil(inputs / group_size)
    codes = rng.integers(0, 2**bits, (inputs, out), dtype=np.uint8)
    zeros = rng.integers(1, 2**bits, (groups, out), dtype=np.uint8)
    scales = (rng.random((groups, out)) * 0.1 + 0.01).astype(scale_dtype)
    index = np.arange(inputs) // group_size
    tensors = {}
    if kind == "act-order":
        index = rng.permutation(index)
    if kind in ("act-order", "trivial", "v2"):
        tensors["g_idx"] = index.astype(np.int32)
    if kind == "awq":
        tensors |= {"qweight": pack_awq(codes), "qzeros": pack_awq(zeros)}
    else:
        stored = zeros if kind == "v2" else zeros - 1
        tensors |= {"qweight": pack_bits(codes, bits), "qzeros": pack_bits(stored.T, bits).T.copy()}
    tensors["scales"] = scales
    weights = scales.astype(np.float64)[index] * (codes.astype(np.float64) - zeros[index])
    return tensors, weights.T


def repacked(tensors: dict, config: dict | None = None) -> tuple[dict, gptq.Repacked]:
    lazy = {f"x.{k}": from_array(f"f:x.{k}", mx.array(v)) for k, v in tensors.items()}
    result = gptq.repack(lazy, config or {})
    arrays = {}
    for key, tensor in result.tensors.items():
        array = tensor.read()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
        arrays[key.removeprefix("x.")] = array
    return arrays, result


def dequantised(arrays: dict, settings: dict) -> np.ndarray:
    weights = mx.dequantize(arrays["weight"], arrays["scales"], arrays["biases"], **settings)
    weights = np.array(weights.astype(mx.float32))
    if "input_permutation" in arrays:
        back = np.empty_like(weights)
        back[:, np.array(arrays["input_permutation"])] = weights
        return back
    return weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["gptq", "trivial", "act-order", "v2"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_gptq_means_the_same_weights(bits, kind, group_size):
    tensors, weights = quantised_layer(64, 256, bits, group_size, kind)
    config = {"checkpoint_format": "gptq_v2"} if kind == "v2" else {}
    arrays, result = repacked(tensors, config)
    settings = result.settings["x"]
    assert settings == {"bits": bits, "group_size": min(group_size, 128)}
    assert ("input_permutation" in arrays) == (kind == "act-order" and group_size < 256)
    error = np.abs(dequantised(arrays, settings) - weights).max()
    assert error < 2e-7 * np.abs(weights).max() * 2**bits


def test_gptq_with_float16_scales_stays_float16():
    tensors, weights = quantised_layer(64, 128, 4, 64, scale_dtype=np.float16)
    arrays, result = repacked(tensors)
    assert arrays["scales"].dtype == arrays["biases"].dtype == mx.float16
    error = np.abs(dequantised(arrays, result.settings["x"]) - weights).max()
    assert error < 2e-3 * np.abs(weights).max()


def test_the_zero_that_overflows_is_16():
    """GPTQ-for-LLaMa stores zero - 1 and adds 1 without a mask: a stored 15 means 16."""
    tensors, _ = quantised_layer(32, 32, 4, 32)
    tensors["qzeros"] = np.full_like(tensors["qzeros"], -1)
    arrays, _ = repacked(tensors)
    assert np.allclose(np.array(arrays["biases"]), -16 * np.array(arrays["scales"]))


def test_one_group_for_a_whole_column_is_divided():
    tensors, weights = quantised_layer(32, 256, 4, 256)
    arrays, result = repacked(tensors)
    assert arrays["scales"].shape == (32, 2)
    assert np.abs(dequantised(arrays, result.settings["x"]) - weights).max() < 1e-6


@pytest.mark.parametrize(("inputs", "group_size"), [(64, 16), (48, 48), (96, 64)])
def test_groups_that_mlx_has_not_become_plain_weights(inputs, group_size):
    tensors, weights = quantised_layer(32, inputs, 4, group_size)
    arrays, result = repacked(tensors, {"group_size": group_size})
    assert set(arrays) == {"weight"}
    assert not result.settings
    assert np.abs(np.array(arrays["weight"]) - weights).max() < 1e-6


def test_biases_of_zero_are_left_out_and_others_kept():
    tensors, _ = quantised_layer(32, 64, 4, 32)
    _, result = repacked({**tensors, "bias": np.zeros(32, np.float32)})
    assert result.dropped == {"f:x.bias": "is zero"}
    arrays, _ = repacked({**tensors, "bias": np.ones(32, np.float32)})
    assert arrays["bias"].shape == (32,)


@pytest.mark.parametrize("group_size", [32, 128])
def test_awq_means_the_same_weights(group_size):
    tensors, weights = quantised_layer(64, 256, 4, group_size, "awq")
    arrays, result = repacked(tensors, {"version": "GEMM"})
    error = np.abs(dequantised(arrays, result.settings["x"]) - weights).max()
    assert error < 1e-6
    with pytest.raises(ValueError, match="gemv"):
        repacked(tensors, {"version": "gemv"})


def test_incomplete_layers_are_named():
    tensors, _ = quantised_layer(32, 64, 4, 32)
    del tensors["scales"]
    with pytest.raises(ValueError, match="x lacks scales"):
        repacked(tensors)


def test_scattered_groups_of_unequal_size_become_plain_weights():
    tensors, _ = quantised_layer(32, 64, 4, 32, "act-order")
    tensors["g_idx"][:] = 0
    arrays, result = repacked(tensors)
    assert set(arrays) == {"weight"}
    assert not result.settings


def quantised_model(kind: str, bits: int, original: bool):
    """A reference model whose decoder has quantised weights, and the tensors of its file."""
    reference = tiny.make_model(layouts.case())
    tensors = layouts.state_dict(reference)
    with torch.no_grad():
        for i, layer in enumerate(reference.model.language_model.layers):
            for j, name in enumerate(LINEAR):
                module = layer.get_submodule(name)
                out, inputs = module.weight.shape
                parts, weights = quantised_layer(out, inputs, bits, 32, kind, seed=10 * i + j)
                smaller = np.float32(1.6 / 2**bits)  # weights of usual size at any bits
                module.weight.copy_(torch.tensor(weights * smaller))
                parts["scales"] = parts["scales"] * smaller
                path = f"language_model.model.layers.{i}.{name}"
                del tensors[f"{path}.weight"]
                tensors |= {f"{path}.{k}": torch.tensor(v) for k, v in parts.items()}
    return reference, layouts.to_original(tensors) if original else tensors


CHECKPOINTS = [(kind, bits) for kind in ("gptq", "act-order") for bits in (2, 3, 4, 8)]
CHECKPOINTS += [("trivial", 8), ("awq", 4)]


@pytest.mark.parametrize(("kind", "bits"), CHECKPOINTS)
@pytest.mark.parametrize("original", [False, True], ids=["llava-hf", "original"])
def test_whole_checkpoints_give_the_logits_of_their_weights(kind, bits, original, tmp_path):
    reference, tensors = quantised_model(kind, bits, original)
    method = "awq" if kind == "awq" else "gptq"
    settings = {"quant_method": method, "bits": bits, "group_size": 32}
    if original:
        config = layouts.original_config(reference)
        folder = layouts.write_folder(tmp_path / "x", tensors, config, "safetensors", 2)
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    else:
        folder = tmp_path / "x"
        tiny.save(layouts.case(), folder)
        data = {key: tensor.contiguous() for key, tensor in tensors.items()}
        layouts.save_file(data, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = settings
        config["image_token_index"] = 4
        (folder / "config.json").write_text(json.dumps(config))
        reference.config.image_token_id = 4
    model, processor = load(folder)
    layer = model.language_model.model.layers[1].mlp.down_proj
    assert (layer.bits, layer.group_size) == (bits, 32)
    assert ("input_permutation" in layer) == (kind == "act-order")
    inputs = layouts.inputs_of(processor)
    ours = np.array(model(**inputs))[..., : layouts.VOCABULARY]
    theirs = layouts.reference_logits(reference, inputs)
    assert np.abs(ours - theirs).max() < 2e-4 * np.abs(theirs).max()


gguf = pytest.importorskip("gguf")

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of Q and K (convert_hf_to_gguf.py, permute)."""
    out, inputs = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, inputs).swapaxes(1, 2).reshape(out, inputs)


def write_text(path: Path, reference, kind: str, tensors: dict, tied: bool = False) -> dict:
    """The decoder's GGUF; returns the weights that its tensors mean, by canonical name."""
    import sentencepiece

    text = reference.config.text_config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(text.head_dim)
    spm = sentencepiece.SentencePieceProcessor(model_proto=layouts.sentencepiece_model())
    kinds = [
        2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1
        for i in range(layouts.VOCABULARY)
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([spm.id_to_piece(i) for i in range(layouts.VOCABULARY)])
    writer.add_token_scores([spm.get_score(i) for i in range(layouts.VOCABULARY)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
        **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
    }
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    meant = {}
    for key, tensor in tensors.items():
        if not key.startswith("language_model."):
            continue
        module = key.removeprefix("language_model.").removesuffix(".weight")
        if tied and module == "lm_head":
            continue
        weight = tensor.float().numpy()
        if module in outer:
            name = outer[module]
            weight = weight[: layouts.VOCABULARY] if weight.ndim == 2 else weight
        else:
            _, _, layer, inner = module.split(".", 3)
            name = f"blk.{layer}.{names[inner]}"
        heads = 4 if "q_proj" in module else 2 if "k_proj" in module else None
        stored = permute(weight, heads) if heads else weight
        qtype = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else kind]
        data = gguf.quants.quantize(stored, qtype)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=qtype)
        exact = gguf.quants.dequantize(data, qtype).reshape(stored.shape)
        if heads:  # back to transformers' order
            out, inputs = exact.shape
            exact = exact.reshape(heads, out // heads // 2, 2, inputs).swapaxes(1, 2)
            exact = exact.reshape(out, inputs)
        meant[key] = exact
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def write_vision(path: Path, reference, tensors: dict, layers: int, swapped: bool, **extra) -> None:
    """The mmproj file, legacy (fc1 called ffn_down) or new."""
    vision = reference.config.vision_config
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)
    for key, value in {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "projection_dim": 64,
        "block_count": layers,
        "attention.head_count": vision.num_attention_heads,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", [0.4, 0.5, 0.6])
    writer.add_array("clip.vision.image_std", [0.3, 0.25, 0.2])
    for key, value in extra.items():
        if isinstance(value, str):
            writer.add_string(f"clip.vision.{key}", value)
        else:
            writer.add_array(f"clip.vision.{key}", value)
    inner = {
        "layer_norm1": "ln1",
        "layer_norm2": "ln2",
        "mlp.fc1": "ffn_down" if swapped else "ffn_up",
        "mlp.fc2": "ffn_up" if swapped else "ffn_down",
        "self_attn.out_proj": "attn_out",
        **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
    }
    outer = {
        "embeddings.class_embedding": "v.class_embd",
        "embeddings.patch_embedding.weight": "v.patch_embd.weight",
        "embeddings.position_embedding.weight": "v.position_embd.weight",
        "pre_layrnorm.weight": "v.pre_ln.weight",
        "pre_layrnorm.bias": "v.pre_ln.bias",
        "multi_modal_projector.linear_1.weight": "mm.0.weight",
        "multi_modal_projector.linear_1.bias": "mm.0.bias",
        "multi_modal_projector.linear_2.weight": "mm.2.weight",
        "multi_modal_projector.linear_2.bias": "mm.2.bias",
        "image_newline": "model.image_newline",
    }
    for key, tensor in tensors.items():
        short = key.removeprefix("vision_tower.vision_model.")
        if short.startswith("encoder.layers."):
            _, _, layer, rest = short.split(".", 3)
            module, _, part = rest.rpartition(".")
            name = f"v.blk.{layer}.{inner[module]}.{part}" if int(layer) < layers else None
        else:
            name = outer.get(short)
        if name:
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", TYPES)
def test_gguf_is_the_dequantisers_to_the_bit(kind, tmp_path):
    reference = tiny.make_model(layouts.case())
    tensors = layouts.state_dict(reference)
    meant = write_text(tmp_path / "llm.gguf", reference, kind, tensors)
    write_vision(tmp_path / "mm.gguf", reference, tensors, 3, swapped=True)
    model, processor = load(tmp_path / "llm.gguf", mmproj=tmp_path / "mm.gguf")
    assert processor.image_processor.mode == "pad"
    assert processor.image_processor.mean == pytest.approx((0.4, 0.5, 0.6))
    ours = dict(tree_flatten(model.parameters()))
    for name, weights in meant.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" in ours:
            assert kind in ("Q4_0", "Q4_1", "Q8_0")
            settings = {"group_size": 32, "bits": 8 if kind == "Q8_0" else 4}
            parts = (ours[f"{path}.{p}"].astype(mx.float32) for p in ("scales", "biases"))
            found = mx.dequantize(ours[name], *parts, **settings)
            assert np.abs(np.array(found) - weights).max() < 1e-6
        else:
            found = np.array(ours[name].astype(mx.float32))
            is_half = ours[name].dtype == mx.float16
            assert np.array_equal(found, weights.astype(np.float16) if is_half else weights)
    with torch.no_grad():
        state = reference.state_dict()
        for name, weights in meant.items():
            key = name.replace("language_model.model", "model.language_model")
            key = key.replace("language_model.lm_head", "lm_head")
            state[key][: len(weights)] = torch.tensor(weights)
    inputs = layouts.inputs_of(processor)
    ours_logits = np.array(model(**inputs).astype(mx.float32))
    theirs = layouts.reference_logits(reference, inputs)
    tolerance = 1e-4 if kind == "F32" else 2e-2
    assert np.abs(ours_logits - theirs).max() < tolerance * np.abs(theirs).max()


OTHER_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "MXFP4"]


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_every_other_type_goes_through_the_dequantiser(kind, tmp_path):
    """On random blocks: gguf-py cannot quantise to most of these."""
    from mlx_llava.checkpoint import gguf as reader

    qtype = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    data = np.random.default_rng(0).integers(0, 256, (3, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("output.weight", data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = reader.open_reader(tmp_path / "x.gguf", "llama").tensors
    model = reader.GGUFModel({}, {}, {}, {}, {}, {}, {})
    reader._add(model, tmp_path / "x.gguf", tensor, "language_model.lm_head.weight", None)
    lazy = model.tensors["language_model.lm_head.weight"]
    with np.errstate(all="ignore"):  # random scales are infinite now and then
        ours = np.array(lazy.read())
        theirs = gguf.quants.dequantize(data, qtype).astype(np.float16)
    assert ours.shape == lazy.shape == (3, 512)
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_gguf_of_llava_16_with_the_new_names(tmp_path):
    reference = tiny.make_model(layouts.case(next=True))
    tensors = layouts.state_dict(reference)
    write_text(tmp_path / "llm.gguf", reference, "F32", tensors)
    pairs = [n for pair in reference.config.image_grid_pinpoints for n in pair]
    extra = {"image_grid_pinpoints": pairs, "mm_patch_merge_type": "spatial_unpad"}
    extra["feature_layer"] = [3]
    write_vision(tmp_path / "mm.gguf", reference, tensors, 4, swapped=False, **extra)
    model, processor = load(tmp_path / "llm.gguf", mmproj=tmp_path / "mm.gguf")
    assert model.config.feature_layers == (3,)
    assert processor.image_processor.mode == "anyres"
    inputs = layouts.inputs_of(processor)
    ours = np.array(model(**inputs))
    assert np.abs(ours - layouts.reference_logits(reference, inputs)).max() < 1e-4


def test_gguf_without_an_output_layer_is_tied(tmp_path):
    reference = tiny.make_model(layouts.case(tie_word_embeddings=True))
    tensors = layouts.state_dict(reference)
    write_text(tmp_path / "llm.gguf", reference, "F16", tensors, tied=True)
    write_vision(tmp_path / "mm.gguf", reference, tensors, 3, swapped=True)
    model, processor = load(tmp_path / "llm.gguf", mmproj=tmp_path / "mm.gguf")
    assert model.config.tie_word_embeddings
    inputs = layouts.inputs_of(processor)
    ours = np.array(model(**inputs).astype(mx.float32))
    theirs = layouts.reference_logits(reference, inputs)
    assert np.abs(ours - theirs).max() < 2e-2 * np.abs(theirs).max()


def test_gguf_tokens_are_sentencepieces(tmp_path):
    import sentencepiece

    reference = tiny.make_model(layouts.case())
    tensors = layouts.state_dict(reference)
    write_text(tmp_path / "llm.gguf", reference, "F16", tensors)
    write_vision(tmp_path / "mm.gguf", reference, tensors, 3, swapped=True)
    _, processor = load(tmp_path / "llm.gguf", mmproj=tmp_path / "mm.gguf")
    spm = sentencepiece.SentencePieceProcessor(model_proto=layouts.sentencepiece_model())
    for text in ("How many cats?", "  two  spaces", "naïve 🦙\n", ""):
        assert processor.tokenizer.encode(text) == [1, *spm.encode(text)]
    assert processor.eos_ids == {2}


def test_what_is_no_gguf_pair_is_named(tmp_path):
    reference = tiny.make_model(layouts.case())
    tensors = layouts.state_dict(reference)
    write_text(tmp_path / "llm.gguf", reference, "F16", tensors)
    write_vision(tmp_path / "mm.gguf", reference, tensors, 3, swapped=True)
    with pytest.raises(ValueError, match="needs its mmproj too: --mmproj"):
        load(tmp_path / "llm.gguf")
    with pytest.raises(ValueError, match="is a GGUF of 'clip', expected 'llama'"):
        load(tmp_path / "mm.gguf", mmproj=tmp_path / "mm.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load(tmp_path / "text.gguf", mmproj=tmp_path / "mm.gguf")
