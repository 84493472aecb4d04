"""Phi-3's fused layers, plain, as codes and with adapters, are the layers that they are."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llava.checkpoint.convert import Quantization, convert
from mlx_llava.checkpoint.save import save
from mlx_llava.fuse import main as fuse
from mlx_llava.json_files import read_json, write_json
from tests.conftest import load_as_stored as load

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
peft = pytest.importorskip("peft", reason="the oracle: pip install '.[test]'")
hf = pytest.importorskip("transformers")
tiny = pytest.importorskip("tests.tiny")
layouts = pytest.importorskip("tests.layouts")

from tests.checkpoint.test_adapters import same_as, trained  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 128}
CASE = tiny.Case("phi3", family="phi3", text={**tiny.PHI_3, **SIZES, "sliding_window": 6})
FUSED = ("qkv_proj", "gate_up_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("fused") / "phi3"
    return folder, tiny.save(CASE, folder)


def layers_of(model) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in tree_flatten(model.parameters())}


@pytest.mark.parametrize("how", ["save", "convert"])
def test_transformers_reads_what_we_write(how, base, tmp_path):
    folder, reference = base
    if how == "save":
        save(*load(folder), tmp_path / "again")
    else:
        convert(folder, tmp_path / "again")
    again = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    assert again.config.text_config.sliding_window == 6
    model, processor = load(tmp_path / "again")
    same_as(reference, model, processor)
    same_as(again.eval(), model, processor)


def test_codes_of_a_fused_layer_are_those_of_its_parts(base, tmp_path):
    """As others quantise it: one setting for all, and another for some."""
    tensors = mx.load(str(base[0] / "model.safetensors"))
    settings = {"group_size": 32, "bits": 8}
    told = {"language_model.model.layers.1.self_attn.qkv_proj": {"group_size": 64, "bits": 4}}
    for name in [name for name in tensors if any(fused in name for fused in FUSED)]:
        path = name.removesuffix(".weight")
        codes = mx.quantize(tensors.pop(name), **told.get(path, settings))
        tensors |= {f"{path}.{part}": array for part, array in zip(
            ("weight", "scales", "biases"), codes, strict=True
        )}  # fmt: skip
    folder = shutil.copytree(base[0], tmp_path / "codes")
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "quantization": {**settings, **told}})
    found, (model, _) = layers_of(load(folder)[0]), load(base[0])
    layers = model.language_model.layers
    for i, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        for path, part in (
            *((f"self_attn.{name}_proj", attention[f"{name}_proj"]) for name in "qkv"),
            *((f"mlp.{name}_proj", mlp[f"{name}_proj"]) for name in ("gate", "up")),
        ):
            own = {"group_size": 64, "bits": 4} if (i, path[:4]) == (1, "self") else settings
            weight, scales, biases = mx.quantize(part.weight, **own)
            prefix = f"language_model.model.layers.{i}.{path}"
            assert np.array_equal(found[f"{prefix}.weight"], np.array(weight))
            assert np.array_equal(found[f"{prefix}.scales"], np.array(scales))
            assert np.array_equal(found[f"{prefix}.biases"], np.array(biases))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]},
        {"target_modules": ["qkv_proj"], "use_dora": True},
        {"target_modules": ["o_proj"], "modules_to_save": ["gate_up_proj"]},
    ],
    ids=["all", "fused", "dora", "whole"],
)
def test_an_adapter_of_fused_layers(settings, base, tmp_path):
    folder, reference = base
    model = trained(reference, tmp_path / "lora", **settings)
    same_as(model, *load(folder, adapter_path=tmp_path / "lora"))
    same_as(model, *load(tmp_path / "lora", base=folder))
    arguments = {"--model": folder, "--adapter-path": tmp_path / "lora", "--output": tmp_path / "f"}
    assert fuse([str(part) for pair in arguments.items() for part in pair]) == 0
    same_as(model, *load(tmp_path / "f"))


def test_an_adapter_stays_beside_the_codes_of_its_parts(base, tmp_path):
    folder, reference = base
    convert(folder, tmp_path / "codes", quantization=Quantization(bits=8, group_size=32))
    trained(reference, tmp_path / "lora", target_modules=["qkv_proj", "gate_up_proj"])
    model, _ = load(tmp_path / "codes", adapter_path=tmp_path / "lora")
    beside = {path for path, layer in model.named_modules() if "lora_a" in layer}
    assert len(beside) == 5 * len(model.language_model.layers)


def test_a_fused_layer_of_another_shape_is_named(base, tmp_path):
    folder = shutil.copytree(base[0], tmp_path / "x")
    config = copy.deepcopy(read_json(folder / "config.json"))
    config["text_config"]["num_key_value_heads"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"qkv_proj.* has 128 rows, where text_config says 192"):
        load(folder)
