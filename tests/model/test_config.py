"""Configs mean what transformers takes them to mean, or are refused by name."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava.model import layers
from mlx_llava.model.config import LlavaConfig, unknown_keys
from mlx_llava.model.config_values import read_pinpoints
from mlx_llava.model.llama import rope_frequencies
from mlx_llava.model.text_config import TextConfig
from mlx_llava.model.vision_config import ACTIVATIONS, VisionConfig
from tests.published.llava_hf import VICUNA_7B
from tests.published.row import CLIP_336

# The published llava-hf configs: what differs from the defaults of their classes.
LLAVA_15 = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": VICUNA_7B,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {**CLIP_336, "vocab_size": 32000},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
BAKLLAVA_TEXT = {
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "vocab_size": 32064,
}
MISTRAL_16_TEXT = {**BAKLLAVA_TEXT, "rope_theta": 1000000.0, "sliding_window": None}
YI_34B_TEXT = {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000000.0,
    "vocab_size": 64064,
}
#: llava-hf/llava-interleave-qwen-0.5b-hf's.
QWEN_05B_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 152000,
}


def text(**data) -> TextConfig:
    return TextConfig.from_dict(data)


def test_published_llava_15():
    config = LlavaConfig.from_dict(LLAVA_15)
    assert config.text_config == TextConfig(
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        num_key_value_heads=32,
        head_dim=128,
    )
    assert config.vision_config == VisionConfig("clip_vision_model", 1024, 4096, 24, 16, 336, 14)
    assert (config.feature_layers, config.tokens_per_tile) == ((23,), 576)
    assert not config.is_anyres


def test_published_text_models():
    bakllava = text(**BAKLLAVA_TEXT)
    assert (bakllava.intermediate_size, bakllava.kv_heads) == (14336, 8)
    assert (bakllava.sliding_window, bakllava.rope_theta) == (4096, 10000)
    assert text(**MISTRAL_16_TEXT).sliding_window is None
    qwen = text(**QWEN_05B_TEXT)
    assert (qwen.sliding_window, qwen.attention_bias, qwen.output_bias) == (None, True, False)
    yi = text(**YI_34B_TEXT)
    assert (yi.dims_per_head, yi.kv_heads, yi.rope_theta) == (128, 8, 5e6)


def test_an_empty_config_is_the_default_model():
    config = LlavaConfig.from_dict({"model_type": "llava_next"})
    assert config.vision_config == VisionConfig("clip_vision_model", 1024, 4096, 24, 16, 336, 14)
    assert config.text_config == TextConfig(num_key_value_heads=32, head_dim=128)
    assert config.image_grid_pinpoints[:2] == ((336, 672), (672, 336))


def test_an_empty_onevision_is_that_of_transformers():
    hf = pytest.importorskip("transformers")
    theirs = hf.LlavaOnevisionConfig()
    config = LlavaConfig.from_dict({"model_type": "llava_onevision"})
    for key in "image_token_index vision_feature_layer vision_feature_select_strategy".split():
        assert getattr(config, key) == getattr(theirs, key), key
    assert [*map(list, config.image_grid_pinpoints)] == theirs.image_grid_pinpoints
    assert config.vision_aspect_ratio == theirs.vision_aspect_ratio == "anyres_max_9"
    for key, value in vars(config.vision_config).items():
        assert value == getattr(theirs.vision_config, key), key
    assert config.text_config == text(model_type="qwen2")
    assert (config.max_tiles, config.tokens_per_tile, config.has_newline) == (9, 729, True)
    again = hf.LlavaOnevisionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert replace(LlavaConfig.from_dict(again.to_dict()), eos_token_id=()) == config


def test_parts_of_onevision_that_name_no_kind_are_siglip_and_qwen2():
    data = {"text_config": {"hidden_size": 64}, "vision_config": {"image_size": 56}}
    config = LlavaConfig.from_dict({"model_type": "llava_onevision", "image_token_id": 7, **data})
    assert config.vision_config == VisionConfig.from_dict(
        {"model_type": "siglip_vision_model", "image_size": 56}
    )
    assert config.text_config.model_type == "qwen2"
    assert config.image_token_index == 7


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_defaults_are_those_of_transformers(family):
    hf = pytest.importorskip("transformers")
    theirs = hf.AutoConfig.for_model(family)
    ours = text(model_type=family)
    for key in (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings"
    ).split():
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_defaults_of_a_tower_are_those_of_transformers(tower):
    hf = pytest.importorskip("transformers")
    theirs = hf.AutoConfig.for_model(tower)
    for key, value in vars(VisionConfig.from_dict({"model_type": tower})).items():
        assert value == getattr(theirs, key), key


def test_transformers_reads_what_we_write():
    hf = pytest.importorskip("transformers")
    texts = LLAVA_15["text_config"], BAKLLAVA_TEXT, MISTRAL_16_TEXT, YI_34B_TEXT, QWEN_05B_TEXT
    for text_config in texts:
        ours = LlavaConfig.from_dict({**LLAVA_15, "text_config": text_config})
        assert LlavaConfig.from_dict(ours.to_dict()) == ours
        theirs = hf.LlavaConfig.from_dict(ours.to_dict())
        again = LlavaConfig.from_dict(theirs.to_dict())
        assert replace(again, eos_token_id=()) == ours  # theirs spells LlamaConfig's 2 out


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # llava-hf/vip-llava-13b-hf and -7b-hf, whose linear_1 both read five layers
        ({"vision_feature_layers": [-2, -5, -8, -11, 6]}, (23, 20, 17, 14, 6)),
        ({"vision_feature_layer": -2, "projector_layernorm": False}, (23, 20, 17, 14, 6)),
        ({"transformers_version": "5.24.0", "vision_feature_layer": [4, -2]}, (4, 23)),
        ({"transformers_version": "5.24.0", "vision_feature_layer": 3}, (3,)),
    ],
)
def test_layers_of_vip_llava(keys, expected):
    data = {**LLAVA_15, "model_type": "vipllava", "transformers_version": "4.36.0.dev0", **keys}
    config = LlavaConfig.from_dict({**data, "vision_feature_select_strategy": "full"})
    assert config.feature_layers == expected
    assert (config.projector_layernorm_eps, config.tokens_per_tile) == (1e-5, 576)
    assert unknown_keys(data) == {}
    assert LlavaConfig.from_dict(config.to_dict()) == config
    hf = pytest.importorskip("transformers")
    written = hf.VipLlavaConfig.from_dict(config.to_dict())
    assert written.architectures == ["VipLlavaForConditionalGeneration"]
    assert LlavaConfig.from_dict(written.to_dict()).feature_layers == expected


def test_a_llava_has_no_norm_before_its_projector():
    data = {**LLAVA_15, "projector_layernorm_eps": 1e-5}
    assert LlavaConfig.from_dict(data).projector_layernorm_eps is None


ROPES = {
    "default": {},
    "theta": {"rope_theta": 5e5},
    "parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "theta_beside": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 700.0},
    "linear_5": {
        "rope_parameters": {
            "rope_type": "linear",
            "type": "linear",
            "factor": 4.0,
            "rope_theta": 7e2,
        }
    },
    "llama3": {
        "rope_theta": 5e5,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "longrope": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1 + i / 7 for i in range(64)],
            "long_factor": [1 + i / 7 for i in range(64)],
            "attention_factor": 1.0,
            "original_max_position_embeddings": 2048,
        },
    },
}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES["llama3_original_outside"] = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 64,
    "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
}
ROPES["longrope_of_one_length"] = {
    **ROPES["longrope"],
    "max_position_embeddings": 2048,
    "rope_scaling": {**ROPES["longrope"]["rope_scaling"], "attention_factor": None},
}
ROPES["longrope_of_two_lengths"] = {
    **ROPES["longrope"],
    "rope_scaling": {**ROPES["longrope"]["rope_scaling"], "long_factor": [9.0] * 64},
}
ROPES["llama3_original_nowhere"] = {"max_position_embeddings": 512, "rope_scaling": LLAMA3}
ROPES["original_without_scaling"] = {"original_max_position_embeddings": 64, "rope_scaling": None}
ROPES["both_spellings"] = {
    "rope_scaling": {"type": "linear", "factor": 4.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_frequencies_are_those_of_transformers(name):
    hf = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(hf.LlamaConfig(**copy.deepcopy(ROPES[name]))).inv_freq.numpy()
    ours = 1 / np.array(rope_frequencies(text(**ROPES[name])), np.float64)
    assert np.abs(ours / theirs - 1).max() < 1e-6


def test_linear_rope_stretches_the_context():
    assert text(**ROPES["linear"]).context_length == 4 * 2048
    assert text(**ROPES["llama3"]).context_length == 131072


@pytest.mark.parametrize(
    ("layer", "expected"),
    [(-2, (23,)), (-1, (24,)), (0, (0,)), (3, (3,)), ([-2, 0, 5], (23, 0, 5)), (-25, (0,))],
)
def test_feature_layers_count_from_the_embedding(layer, expected):
    config = LlavaConfig.from_dict({"model_type": "llava", "vision_feature_layer": layer})
    assert config.feature_layers == expected


def test_every_activation_that_a_config_may_name_exists():
    assert {*ACTIVATIONS} == {*layers.ACTIVATIONS}


def test_pinpoints_may_be_text():
    assert read_pinpoints("[[336, 672], (672, 336)]") == ((336, 672), (672, 336))


def test_both_names_of_the_image_token():
    for data in (
        {"image_token_index": 7},
        {"image_token_id": 7},
        {"image_token_id": 7, "image_token_index": 7},
    ):
        assert LlavaConfig.from_dict({"model_type": "llava", **data}).image_token_index == 7
    with pytest.raises(ValueError, match=r"two ids: \[7, 8\]"):
        LlavaConfig.from_dict({"model_type": "llava", "image_token_id": 7, "image_token_index": 8})


def test_ends_of_answer():
    for data, expected in (
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [7, 9]}, (7, 9)),
        ({"eos_token_id": None, "text_config": {"eos_token_id": [5, 6]}}, (5, 6)),
        ({"text_config": {"eos_token_id": 5}}, (5,)),
        ({}, ()),
    ):
        assert LlavaConfig.from_dict({"model_type": "llava", **data}).eos_token_id == expected


WINDOWS = {
    "unused": {"sliding_window": 7, "max_window_layers": 2},
    "of the last layers": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
    "of none": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 9},
    "of its class": {"use_sliding_window": True, "num_hidden_layers": 30},
    "by name": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "null": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 3},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_of_qwen2_are_those_of_its_class(name):
    hf = pytest.importorskip("transformers")
    data = {"num_hidden_layers": 6, **WINDOWS[name]}
    theirs = hf.Qwen2Config(**data)
    text = {**data, "model_type": "qwen2"}
    config = LlavaConfig.from_dict({"model_type": "llava", "text_config": text})
    assert list(config.text_config.windows) == [
        theirs.sliding_window if kind == "sliding_attention" else None
        for kind in theirs.layer_types
    ]
    written = json.loads(json.dumps(config.to_dict()))
    assert LlavaConfig.from_dict(written) == config
    again = hf.Qwen2Config(**written["text_config"])
    assert (again.sliding_window, again.layer_types) == (theirs.sliding_window, theirs.layer_types)


def test_phi_3s_context_is_that_of_its_short_factors():
    scaling = {
        "type": "longrope",
        "short_factor": [1.0 + i / 50 for i in range(48)],
        "long_factor": [1.0 + i for i in range(48)],
    }
    text = {
        "model_type": "phi3",
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
    }
    lengths = {}
    for long in (scaling["long_factor"], scaling["short_factor"]):
        data = {**text, "rope_scaling": {**scaling, "long_factor": long}}
        config = LlavaConfig.from_dict({"model_type": "llava", "text_config": data}).text_config
        assert config.attention_factor == pytest.approx(
            math.sqrt(1 + math.log(32) / math.log(4096))
        )
        lengths[tuple(long)] = config.context_length
    assert [*lengths.values()] == [4096, 131072]


REFUSED = {
    "model_type": ({"model_type": "qwen2_vl"}, "model_type='qwen2_vl'"),
    "no_model_type": ({"model_type": None}, "model_type='None'"),
    "text_model": ({"text_config": {"model_type": "qwen3"}}, "model_type='qwen3'"),
    "windows_of_llama": ({"text_config": {"use_sliding_window": True}}, "use_sliding_window=True"),
    "window_of_some_layers": (
        {"text_config": {"layer_types": ["full_attention", "sliding_attention"]}},
        "layer_types=.*layers of several kinds",
    ),
    "windows_that_are_not_used": (
        {
            "text_config": {
                "model_type": "qwen2",
                "layer_types": ["full_attention", "sliding_attention"],
                "num_hidden_layers": 2,
            }
        },
        "layer_types=.*'full_attention' alone without use_sliding_window",
    ),
    "windows_of_too_few_layers": (
        {
            "text_config": {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            }
        },
        "layer_types=.* supports 32 of 'sliding_attention' and 'full_attention'",
    ),
    "vision_model": (
        {"vision_config": {"model_type": "siglip2_vision_model"}},
        "'siglip2_vision_model'; mlx_llava supports 'clip_vision_model' and 'siglip_vision_model'",
    ),
    "unknown": ({"mm_resampler": "perceiver"}, "mm_resampler='perceiver'"),
    "unknown_text": ({"text_config": {"qk_norm": True}}, "text_config .* qk_norm=True"),
    "unknown_vision": ({"vision_config": {"use_rope": 1}}, "vision_config .* use_rope=1"),
    "unknown_rope": ({"text_config": {"rope_scaling": {"beta_fast": 3}}}, "beta_fast=3"),
    "yarn": ({"text_config": {"rope_scaling": {"type": "yarn", "factor": 2}}}, "'yarn'"),
    "other_factors": (
        {
            "text_config": {
                "rope_scaling": {**ROPES["longrope"]["rope_scaling"], "long_factor": [2]}
            }
        },
        "long_factor=1; mlx_llava supports lists of 64 factors",
    ),
    "factor_of_0": (
        {
            "text_config": {
                "rope_scaling": {
                    **ROPES["longrope"]["rope_scaling"],
                    "short_factor": [1.0] * 63 + [0],
                }
            }
        },
        "short_factor=.* supports positive numbers",
    ),
    "attention_factor": (
        {
            "text_config": {
                "rope_scaling": {**ROPES["longrope"]["rope_scaling"], "attention_factor": "1"}
            }
        },
        "attention_factor='1'; mlx_llava supports positive numbers",
    ),
    "no_factor": ({"text_config": {"rope_scaling": {"type": "linear"}}}, "needs factor"),
    "partial": ({"text_config": {"rope_parameters": {"partial_rotary_factor": 0.5}}}, "partial"),
    "act": ({"text_config": {"hidden_act": "gelu"}}, "hidden_act='gelu'"),
    "vision_act": ({"vision_config": {"hidden_act": "swish"}}, "hidden_act='swish'"),
    "projector_act": ({"projector_hidden_act": "mish"}, "projector_hidden_act='mish'"),
    "strategy": ({"vision_feature_select_strategy": "cls"}, "'cls'"),
    "next_full": (
        {"model_type": "llava_next", "vision_feature_select_strategy": "full"},
        "default with llava_next",
    ),
    "next_siglip": (
        {"model_type": "llava_next", "vision_config": {"model_type": "siglip_vision_model"}},
        "'default'; .* full with llava_next",
    ),
    "no_newline": (
        {"model_type": "llava_next", "use_image_newline_parameter": False},
        "use_image_newline_parameter",
    ),
    "layer": ({"vision_feature_layer": 25}, "vision_feature_layer=25.*-25 to 24"),
    "no_layer": ({"vision_feature_layer": []}, "vision_feature_layer"),
    "heads": ({"text_config": {"num_key_value_heads": 5}}, "num_key_value_heads=5"),
    "channels": ({"vision_config": {"num_channels": 4}}, "num_channels=4"),
    "patch": ({"vision_config": {"patch_size": 300}}, "patch_size=300"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
    "quantized": ({"quantization": True}, "quantization=True; .* an object"),
    "text_size": ({"text_config": {"hidden_size": "big"}}, "hidden_size='big'; .* a int"),
    "no_size": ({"text_config": {"num_attention_heads": 0}}, "positive numbers"),
    "negative_size": ({"vision_config": {"image_size": -336}}, "image_size=-336"),
    "layer_name": ({"vision_feature_layer": ["last"]}, "vision_feature_layer"),
    "projector": ({"mm_projector_type": "mlp0x_gelu"}, "mm_projector_type='mlp0x_gelu'"),
    "merge": ({"mm_patch_merge_type": "unpad"}, "mm_patch_merge_type='unpad'"),
    "pinpoints": ({"image_grid_pinpoints": "(1x1)"}, "no range of grids"),
    "pinpoint_text": ({"image_grid_pinpoints": "[[1, 2"}, "no list of pairs"),
    "ends": ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
    "ratio": (
        {"model_type": "llava_onevision", "vision_aspect_ratio": "anyres"},
        "vision_aspect_ratio='anyres'; .*'anyres_max_N' with llava_onevision",
    ),
    "no_tiles": (
        {"model_type": "llava_onevision", "vision_aspect_ratio": "anyres_max_0"},
        "vision_aspect_ratio='anyres_max_0'",
    ),
    "ratio_of_another": (
        {"model_type": "llava_next", "vision_aspect_ratio": "anyres_max_9"},
        "vision_aspect_ratio='anyres_max_9'; .* with llava_onevision",
    ),
    "convention": ({"anyres_convention": "mine"}, "anyres_convention='mine'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name):
    data, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        LlavaConfig.from_dict({"model_type": "llava", **data})


def test_other_keys_are_named_and_the_model_is_the_same():
    other = {"favourite": 7, "text_config": {**LLAVA_15["text_config"], "colour": "red"}}
    data = {**LLAVA_15, **other, "rope_note": None}
    assert LlavaConfig.from_dict(data) == LlavaConfig.from_dict(LLAVA_15)
    assert unknown_keys(data) == {"favourite": 7, "text_config.colour": "red"}


def test_unknown_keys_that_are_off_are_harmless():
    off = {"use_thing": False, "other": None, "list": [], "map": {}, "_private": "note"}
    assert LlavaConfig.from_dict({**LLAVA_15, **off}) == LlavaConfig.from_dict(LLAVA_15)


def test_null_is_the_default_where_a_default_exists():
    assert text(hidden_size=None, rms_norm_eps=None, head_dim=None) == text()


def test_frequencies_are_float32():
    assert rope_frequencies(text()).dtype == mx.float32
