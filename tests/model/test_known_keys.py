"""Keys of config.json that mean nothing change nothing; those that change the maths are refused."""

from __future__ import annotations

import copy
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llava.checkpoint import original
from mlx_llava.model.config import LlavaConfig, unknown_keys
from tests.conftest import load_as_stored as load

#: Attributes of PreTrainedConfig, transformers 4.28 to 5.24, and of GenerationConfig, whose values
#: it held until 5; but for those that mean something: ends, tied heads, classes.
ATTRIBUTES = """
    _attn_implementation _attn_implementation_autoset _auto_class _commit_hash
    _experts_implementation _name_or_path _output_attentions add_cross_attention architectures
    attn_implementation attribute_map auto_map bad_words_ids base_config_key base_model_ep_plan
    base_model_pp_plan base_model_tp_plan begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size experts_implementation
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    has_no_defaults_at_init id2label is_composition is_decoder is_encoder_decoder
    keys_to_ignore_at_inference label2id length_penalty max_length max_new_tokens min_length min_p
    name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id stop_strings sub_configs suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_last_hidden_states tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache use_return_dict
    xla_device
""".split()
TRAINERS = """
    add_faster_video add_time_instruction attention_dropout delay_load faster_token_stride
    force_sample freeze_mm_mlp_adapter freeze_mm_vision_resampler hidden_dropout
    hidden_dropout_prob image_crop_resolution image_split_resolution initializer_factor
    initializer_range max_sequence_length mm_hidden_size mm_newline_position mm_perceiver_depth
    mm_projector_lr mm_qformer_latents mm_spatial_pool_mode mm_spatial_pool_stride
    mm_tunable_parts mm_use_im_patch_token mm_vision_tower_lr pos_skipping_range pretraining_tp
    sep_image_conv_front skip_vision skip_vision_non_divisible tokenizer_model_max_length
    tokenizer_padding_side tune_entire_model tune_mm_mlp_adapter tune_mm_vision_resampler
    tune_vision_tower unfreeze_mm_vision_tower unfreeze_vision_tower unsloth_fixed
    unsloth_version use_mm_proj use_pos_skipping vision_tower_lr vision_tower_pretrained
""".split()
SECTIONS = (None, "text_config", "vision_config")
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-2, 2) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
BASE = {
    "model_type": "llava",
    "image_token_index": 3,
    "text_config": {"model_type": "llama", "eos_token_id": 2, "rms_norm_eps": 1e-5},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7},
}


def with_key(data, section, key, value):
    data = copy.deepcopy(data)
    (data if section is None else data[section])[key] = value
    return data


def test_the_attributes_are_those_of_transformers():
    hf = pytest.importorskip("transformers")
    theirs = hf.PreTrainedConfig()
    known = {*ATTRIBUTES, "model_type"}
    assert {key for key in theirs.to_dict() if not key.startswith("_")} <= known


@settings(deadline=None, max_examples=300, database=None, derandomize=True)
@given(st.sampled_from(ATTRIBUTES + TRAINERS), PLAIN, st.sampled_from(SECTIONS))
def test_what_means_nothing_changes_nothing(key, value, section):
    data = with_key(BASE, section, key, value)
    assert LlavaConfig.from_dict(data) == LlavaConfig.from_dict(BASE)
    assert unknown_keys(data) == {}


V15 = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "pad",
    "hidden_size": 64,
    "num_attention_heads": 4,
}


@settings(deadline=None, max_examples=200, database=None, derandomize=True)
@given(st.sampled_from(ATTRIBUTES + TRAINERS).filter(lambda key: key != "architectures"), PLAIN)
def test_what_means_nothing_to_the_original_changes_nothing(key, value):
    data = with_key(V15, None, key, value)
    read = original.translate(data, {}, 99)
    expected = LlavaConfig.from_dict(original.translate(V15, {}, 99))
    assert LlavaConfig.from_dict(read) == expected
    assert original.unknown_keys(read) == {}


def logits(folder):
    model, processor = load(folder)
    pixels = np.full((30, 40, 3), 90, np.uint8)
    return np.array(model(**processor("<image>\nWhat?", [pixels], raw=True)).astype(mx.float32))


@pytest.mark.parametrize("value", [True, 7, "text", [1], {"a": 1}])
def test_all_that_means_nothing_at_once_leaves_the_logits(golden, value, tmp_path):
    shutil.copytree(golden, tmp_path / "copy")
    data = json.loads((golden / "config.json").read_text())
    for section in SECTIONS:
        for key in ATTRIBUTES + TRAINERS:
            data = with_key(data, section, key, value)
    (tmp_path / "copy" / "config.json").write_text(json.dumps(data))
    assert np.array_equal(logits(tmp_path / "copy"), logits(golden))


#: Section, key, a value that changes the maths, one that does not.
CHANGES = [
    ("text_config", "attn_logit_softcapping", 50.0, None),
    ("text_config", "final_logit_softcapping", 30.0, None),
    ("text_config", "logits_soft_cap", 30.0, 0.0),
    ("text_config", "attention_logit_cap", 5.0, None),
    ("text_config", "qk_norm", True, False),
    ("text_config", "use_qk_norm", True, False),
    ("text_config", "qk_layernorm", True, False),
    ("text_config", "qk_rms_norm", True, False),
    ("text_config", "rotary_base", 5e5, 10000),
    ("text_config", "clip_qkv", 8.0, None),
    ("text_config", "partial_rotary_factor", 0.5, 1.0),
    ("text_config", "rotary_pct", 0.25, 1.0),
    ("text_config", "rope_interleave", True, False),
    ("text_config", "rope_traditional", True, False),
    ("text_config", "rope_local_base_freq", 10000.0, None),
    ("text_config", "no_rope_layers", [1, 1, 0], []),
    ("text_config", "use_rope", False, True),
    ("text_config", "alibi", True, False),
    ("text_config", "use_alibi", True, False),
    ("text_config", "position_embedding_type", "alibi", "rope"),
    ("text_config", "embedding_multiplier", 12.0, 1.0),
    ("text_config", "residual_multiplier", 0.22, 1.0),
    ("text_config", "attention_multiplier", 1.0, None),
    ("text_config", "logits_scaling", 8.0, 1),
    ("text_config", "logit_scale", 0.0625, 1.0),
    ("text_config", "scale_emb", 12, 1),
    ("text_config", "scale_depth", 1.4, None),
    ("text_config", "dim_model_base", 256, None),
    ("text_config", "query_pre_attn_scalar", 256, None),
    ("text_config", "num_local_experts", 8, 0),
    ("text_config", "num_experts", 64, 1),
    ("text_config", "n_routed_experts", 64, None),
    ("text_config", "num_experts_per_tok", 2, None),
    ("text_config", "moe_intermediate_size", 1407, None),
    ("text_config", "experts_per_token", 2, None),
    ("text_config", "output_multiplier_scale", 0.5, 1.0),
    ("text_config", "softmax_scale", 0.1, None),
    ("text_config", "attn_config", {"attn_impl": "torch"}, None),
    ("text_config", "use_moe", True, False),
    ("text_config", "kv_lora_rank", 512, None),
    ("text_config", "q_lora_rank", 1536, None),
    ("text_config", "qk_rope_head_dim", 64, None),
    ("text_config", "layer_types", ["full_attention", "sliding_attention"], ["full_attention"]),
    ("text_config", "mlp_layer_types", ["dense", "sparse"], ["dense"]),
    ("text_config", "sliding_window_pattern", 6, None),
    ("text_config", "per_layer_config", {"0": {"head_dim": 64}}, {}),
    ("text_config", "use_sliding_window", True, False),
    ("text_config", "attention_chunk_size", 8192, None),
    ("text_config", "attn_temperature_tuning", True, False),
    ("text_config", "attention_sink", True, None),
    ("text_config", "is_causal", False, True),
    ("text_config", "num_kv_shared_layers", 15, 0),
    ("text_config", "mamba_d_state", 16, None),
    ("text_config", "linear_num_value_heads", 32, None),
    ("text_config", "use_parallel_residual", True, False),
    ("text_config", "parallel_attn", True, False),
    ("text_config", "use_post_norm", True, False),
    ("text_config", "add_unit_offset", True, False),
    ("text_config", "swiglu_limit", 7.0, None),
    ("text_config", "norm_type", "layernorm_1p", "rmsnorm"),
    ("text_config", "hidden_activation", "gelu_pytorch_tanh", "silu"),
    ("text_config", "activation_function", "gelu_new", None),
    ("text_config", "hidden_act", "gelu", "swish"),
    ("text_config", "qkv_bias", True, False),
    ("text_config", "use_bias", True, False),
    ("text_config", "attention_out_bias", True, False),
    ("text_config", "lm_head_bias", True, False),
    ("text_config", "rope_scaling", {"type": "longrope", "short_factor": [1.0]}, None),
    ("text_config", "rope_scaling", {"type": "su"}, {"type": "default"}),
    ("text_config", "rope_scaling", {"type": "dynamic", "factor": 2.0}, {"rope_type": "default"}),
    ("text_config", "rope_scaling", {"type": "yarn", "factor": 4.0}, {}),
    ("text_config", "rope_parameters", {"mrope_section": [16, 24, 24]}, {"rope_theta": 1e4}),
    ("text_config", "rope_parameters", {"attention_factor": 2.0}, {"factor": None}),
    ("text_config", "rope_parameters", {"sliding_attention": {"rope_theta": 5.0}}, {}),
    ("vision_config", "use_rope", True, False),
    ("vision_config", "rope_theta", 10000.0, None),
    ("vision_config", "num_register_tokens", 4, 0),
    ("vision_config", "layer_scale_init_value", 1e-5, None),
    ("vision_config", "use_swiglu_ffn", True, False),
    ("vision_config", "use_cls_token", False, True),
    ("vision_config", "window_size", 14, 0),
    ("vision_config", "global_attn_indexes", [2, 5], []),
    ("vision_config", "spatial_merge_size", 2, 1),
    ("vision_config", "temporal_patch_size", 2, 1),
    ("vision_config", "num_channels", 4, 3),
    ("vision_config", "hidden_act", "relu6", "quick_gelu"),
    (None, "s2", True, False),
    (None, "mm_resampler_type", "perceiver", None),
    (None, "vision_aspect_ratio", "anyres_max_9", None),
    (None, "pixel_shuffle_ratio", 0.5, None),
    (None, "final_logit_softcapping", 30.0, None),
    (None, "num_experts", 4, 0),
]


@pytest.mark.parametrize(("section", "key", "changing", "neutral"), CHANGES)
def test_what_changes_the_maths_is_refused_by_name(section, key, changing, neutral):
    data = with_key(BASE, section, key, changing)
    named = [key, *changing, "rope_type"] if isinstance(changing, dict) else [key]
    with pytest.raises(ValueError, match="|".join(named)) as error:
        LlavaConfig.from_dict(data)
    assert "\n" not in str(error.value)
    data = with_key(BASE, section, key, neutral)
    assert LlavaConfig.from_dict(data) == LlavaConfig.from_dict(BASE)
    assert unknown_keys(data) == {}
