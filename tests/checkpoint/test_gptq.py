"""GPTQ and AWQ: not a code is lost on the way to MLX's own quantisation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llava.checkpoint import gptq
from mlx_llava.checkpoint.tensors import Canonical, from_array
from tests.conftest import GOLDENS
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


def repacked(tensors: dict, config: dict | None = None) -> tuple[dict, Canonical]:
    lazy = {f"x.{k}": from_array(f"f:x.{k}", mx.array(v)) for k, v in tensors.items()}
    result = Canonical(lazy)
    gptq.repack(result, config or {})
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
    settings = result.layers["x"]
    assert settings == {"bits": bits, "group_size": min(group_size, 128)}
    assert ("input_permutation" in arrays) == (kind == "act-order" and group_size < 256)
    error = np.abs(dequantised(arrays, settings) - weights).max()
    assert error < 2e-7 * np.abs(weights).max() * 2**bits


def test_gptq_with_float16_scales_stays_float16():
    tensors, weights = quantised_layer(64, 128, 4, 64, scale_dtype=np.float16)
    arrays, result = repacked(tensors)
    assert arrays["scales"].dtype == arrays["biases"].dtype == mx.float16
    error = np.abs(dequantised(arrays, result.layers["x"]) - weights).max()
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
    assert np.abs(dequantised(arrays, result.layers["x"]) - weights).max() < 1e-6


@pytest.mark.parametrize(("inputs", "group_size"), [(64, 16), (48, 48), (96, 64)])
def test_groups_that_mlx_has_not_become_plain_weights(inputs, group_size):
    tensors, weights = quantised_layer(32, inputs, 4, group_size)
    arrays, result = repacked(tensors, {"group_size": group_size})
    assert set(arrays) == {"weight"}
    assert not result.layers
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
    error = np.abs(dequantised(arrays, result.layers["x"]) - weights).max()
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
    assert not result.layers


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


def with_bitsandbytes(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A golden checkpoint whose config speaks of bitsandbytes, with some more tensors."""
    shutil.copytree(GOLDENS / "llava", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    stored = mx.load(str(folder / "model.safetensors"))
    stored |= {name: mx.array(array) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), stored, {"format": "pt"})
    return folder


def test_plain_weights_are_read_whatever_quantisation_their_config_speaks_of(tmp_path):
    """As merging a QLoRA leaves it."""
    model, _ = load(with_bitsandbytes(tmp_path / "plain", {}))
    expected, _ = load(GOLDENS / "llava")
    pairs = zip(tree_flatten(model.parameters()), tree_flatten(expected.parameters()), strict=True)
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize(
    "codes",
    [
        {"language_model.model.layers.0.mlp.up_proj.weight": np.zeros((4, 1), np.uint8)},
        {"language_model.model.layers.0.mlp.up_proj.weight.absmax": np.zeros(4, np.float32)},
        {"language_model.model.layers.0.mlp.up_proj.weight_scale": np.zeros(4, np.float32)},
    ],
    ids=["codes", "absmax", "scale"],
)
def test_other_libraries_codes_are_refused_by_name(tmp_path, codes):
    folder = with_bitsandbytes(tmp_path / "codes", codes)
    (name,) = codes
    with pytest.raises(ValueError, match=rf"'bitsandbytes' \({name}\), which is not read; take"):
        load(folder)
