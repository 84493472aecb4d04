"""Settings files as they are published: read to the values that transformers reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_llava.checkpoint import original
from mlx_llava.checkpoint.tower import tower_settings
from mlx_llava.model.config import LlavaConfig, unknown_keys
from tests.conftest import shared_data

hf = pytest.importorskip("transformers", reason="the oracle: pip install '.[test]'")

VERSIONS = ("4.37.2", "4.41.2", "4.45.2", "4.49.0", "4.53.3", "4.57.3")
TEXT = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads max_position_embeddings rms_norm_eps"
).split()
VISION = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size "
    "hidden_act layer_norm_eps"
).split()
TOP = (
    "image_token_index projector_hidden_act multimodal_projector_bias vision_feature_layer "
    "vision_feature_select_strategy"
).split()


def values(config, names):
    return {name: getattr(config, name) for name in names}


def same_text(ours, theirs):
    assert values(ours, TEXT) == values(theirs, TEXT)
    heads = theirs.num_attention_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert ours.sliding_window == getattr(theirs, "sliding_window", None) or (
        ours.model_type == "llama" and ours.sliding_window is None
    )
    rope = theirs.rope_parameters
    assert (ours.rope_theta, ours.rope_scaling) == (rope["rope_theta"], None)
    assert rope["rope_type"] == "default"


def same_config(data):
    """Ours and transformers' own class say the same of a llava-hf config.json."""
    ours = LlavaConfig.from_dict(data)
    assert unknown_keys(data) == {}
    name = "LlavaNextConfig" if data["model_type"] == "llava_next" else "LlavaConfig"
    theirs = getattr(hf, name).from_dict(json.loads(json.dumps(data)))
    assert values(ours, TOP) == values(theirs, TOP)
    assert values(ours.vision_config, VISION) == values(theirs.vision_config, VISION)
    same_text(ours.text_config, theirs.text_config)
    ends = data.get("eos_token_id") or data["text_config"].get("eos_token_id")
    assert list(ours.eos_token_id) == (
        ends if isinstance(ends, list) else [ends][: ends is not None]
    )
    for use_diff in (True, False):
        written = json.loads(theirs.to_json_string(use_diff=use_diff))
        again = LlavaConfig.from_dict(written)
        assert unknown_keys(written) == {}
        assert replace(again, eos_token_id=()) == replace(ours, eos_token_id=())
    if ours.is_anyres:
        assert [list(size) for size in ours.image_grid_pinpoints] == theirs.image_grid_pinpoints


@pytest.mark.parametrize("version", VERSIONS)
def test_what_transformers_wrote_is_read_as_it_was_meant(version):
    dumps = json.loads(shared_data(f"published/dumps/transformers-{version}.json").read_text())
    assert len(dumps) >= 8
    for data in dumps.values():
        same_config(data)


def published() -> list[Path]:
    return sorted(shared_data("published").glob("*/config.json"))


def test_what_trainers_and_converters_wrote_is_read_as_it_was_meant():
    read = {}
    for path in [*published(), shared_data("reports/unsloth_config/config.json")]:
        data = json.loads(path.read_text())
        read[path.parent.name] = kind = data["model_type"]
        if kind == "clip":
            settings = tower_settings(data)
            theirs = hf.CLIPConfig.from_dict(data).vision_config
            ours = LlavaConfig.from_dict({"model_type": "llava", "vision_config": settings})
            assert values(ours.vision_config, VISION) == values(theirs, VISION)
        elif original.is_original(data):
            read = original.translate(data, {}, data["vocab_size"])
            assert original.unknown_keys(read) == {}
            ours = LlavaConfig.from_dict(read)
            same_text(ours.text_config, hf.LlamaConfig.from_dict(data))
            assert ours.vision_feature_layer == data["mm_vision_select_layer"]
            assert ours.mm_projector_type == data["mm_projector_type"]
            assert ours.projector_hidden_act == "gelu"
            assert ours.eos_token_id == (data.get("eos_token_id", 2),)
        else:
            same_config(data)
    assert len(read) >= 12
