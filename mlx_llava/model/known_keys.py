"""What is known about the keys of config files that this package does not read.

Names may hold ``*``. Sources: PreTrainedConfig and GenerationConfig of transformers 4.28 to 5.24
and its decoders' config classes; the trainers of LLaVA, LLaVA-NeXT, LLaVA-Med, ShareGPT4V, xtuner,
PALO and Mantis; the converters of mlx-vlm and Unsloth.
"""

from __future__ import annotations

#: What no forward pass reads, whatever its value and wherever it stands.
HARMLESS = (
    # PreTrainedConfig
    """
    _* add_cross_attention architectures attn_implementation attribute_map auto_map
    base_config_key base_model_*_plan chunk_size_feed_forward cross_attention_hidden_size
    default_rope_type default_theta dtype experts_implementation extra_config_files extra_files
    finetuning_task has_no_defaults_at_init id2label ignore_keys_at_rope_validation
    is_composition is_decoder is_encoder_decoder is_heterogeneous keys_to_ignore_at_inference
    label2id model_type name_or_path num_labels output_attentions output_hidden_states
    problem_type processor_class pruned_heads return_dict serialize_explicit_per_layer_config
    sub_configs sub_configs_defaults task_specific_params tf_legacy_loss tie_encoder_decoder
    tie_last_hidden_states tie_word_embeddings tokenizer_class torch_dtype torchscript
    transformers_version transformers_weights use_bfloat16 use_return_dict xla_device
    """
    # GenerationConfig, whose keys PreTrainedConfig held until 5
    """
    assistant_* bad_words_ids begin_suppress_tokens cache_config cache_implementation
    compile_config constraints continuous_batching_config disable_compile diversity_penalty
    do_sample dola_layers early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    force_words_ids forced_decoder_ids generation_config generation_kwargs guidance_scale
    is_assistant length_penalty low_memory max_cache_len max_length max_matching_ngram_size
    max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens* num_beam_groups num_beams num_return_sequences output_logits
    output_scores penalty_alpha prefill_chunk_size prefix prompt_lookup_num_tokens
    remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate
    return_legacy_cache sequence_bias speculation_type stop_strings suppress_tokens
    target_lookbehind temperature token_healing top_h top_k top_p typical_p use_cache use_mtp
    watermarking_config
    """
    # model classes: initial values, dropout, losses, sizes that tensors say, vocabulary
    """
    *_loss_coef *_token_id *_token_ids *_token_index *dropout* *pdrop drop_path_rate
    ffn_dim_multiplier ignore_index image_seq_length image_token image_token_len initializer_*
    layerdrop logit_scale_init_value loss_type max_window_layers multiple_of
    num_additional_image_tokens num_logits_to_keep output_router_logits padding_idx
    pretraining_tp projection_dim quantization_config text_config_dict vision_config_dict
    vision_use_head vocab_size
    """
    # trainers
    """
    *_lr *_lr_multiplier *_pretrained add_faster_video add_time_instruction delay_load
    faster_token_stride feature_outs force_sample frame_* frames_upbound freeze_*
    gradient_checkpointing* image_crop_resolution image_split_resolution img_size lora_*
    max_num_frames max_num_images max_num_pixels max_sequence_length mm_hidden_size
    mm_newline_position mm_perceiver_* mm_pooling_position mm_qformer_* mm_spatial_pool_*
    mm_tunable_parts mm_use_im_patch_token modality_max_length model_max_length num_frames
    pos_skipping_range pretrain_* proj_vis_to_txt_tokens prompt_segtok_w_instruct resume_*
    s2_scales segtok_posembed sep_image_conv_front tokenizer_* tune_* unfreeze_*
    use_flash_attention* use_flash_attn* use_mm_proj use_pos_skipping video_* vision_backbone
    vision_tower vision_tower_cfg with_vision_tower
    """
    # converters
    "skip_vision skip_vision_* unsloth_*"
)

#: Keys that change the maths: what they do, and their names.
CHANGES = {
    "soft-capping": "*softcap* *soft_cap* *logit_cap logits_cap *logit_clip*",
    "normalised queries and keys": """*key_norm* *qk*norm* *query_norm* k_norm q_norm qk_l2_clip*
        qk_ln""",
    "another base of rotation": """rope_base rope_freq_base rope_freq_scale rotary_base
        rotary_emb_base rotary_embedding_base""",
    "clipped queries, keys and values": "*clip_qkv qkv_clip",
    "a rotation of a part of each head": """partial_rotary* *rotary_pct *rotary_percent* *rope_pct
        *rope_percent* rotary_dim""",
    "another rotation of positions": """*_rope_theta *alibi* bias_max_distance interleaved_rope
        kv_rope* mrope* no_rope* nope_* *rel_pos* relative_attention* rope_2d* rope_interleave*
        rope_local* rope_mode rope_ratio rope_scaling_* rope_theta_* rope_type rope_traditional
        rotary_interleaved use_dynamic_ntk use_logn_attn use_mem_rope xpos*""",
    "another kind of positions": """position_embedding_type pos_embed_type *positional_embedding*
        *position_encoding*""",
    "a multiplier": """*_multiplier *_multiplier_scale *_multipliers *logit_scale *logits_scale
        attention_value_scale logits_scaling output_scale qk_scale_factor residual_scale*
        residual_weight scale_depth scale_emb""",
    "another scale of embeddings, attention or logits": """*query_pre_attn_scalar
        attention_multiplier attention_scale attn_scale attn_temperature* dim_model_base emb*_scale*
        floor_scale log_scaling* mup_* normalize_embedding* scale_attn_by_inverse* scale_embedding*
        softmax_scale use_mup""",
    "experts": """*_experts *_experts_* *num_experts* expert_* experts_* *_expert_*
        decoder_sparse_step enable_moe* first_k_dense_replace is_moe mlp_only_layers moe moe_*
        n_group norm_topk_prob num_dense_layers route_scale routed_* router_* scoring_func
        shared_intermediate_size topk_* use_moe zero_expert_num""",
    "latent attention": """index_* indexer_* kv_lora_rank o_lora_rank q_lora_rank qk_*_dim
        v_head_dim""",
    "layers of several kinds": """*_layer_types *_per_layer *layer_pattern* *window_pattern
        attn_layer_* block_types cross_attention_layers cross_layer_* full_attention_interval
        full_attn_idxs global_attn* hybrid_* layer_types layers_block_type local_layer_ids
        num_*_attention_layers per_layer_*""",
    "another attention": """*attention_sink* *_attention_gate *_attn_gate *attn_type
        *attention_window* *output_gate* *_sink attention_chunk_size attention_k_eq_v attention_type
        attn_config cla_* conv1d_width conv_L_cache d_state gating lambda_std_dev learnable_sink*
        linear_* local_attention* local_window* lru_width mamba* multi_query* num_kv_shared_layers
        prefix_lm sliding_window_size sliding_windows ssm_* *bidirectional* use_sliding_window
        window_size""",
    "another block": """*_gated_mlp *_per_layer_input *_unit_offset *parallel_residual* *sandwich*
        altup* apply_residual_connection_post_layernorm ffn_config gated_norm* hc_* laurel_rank
        layer_scale_init_value layerscale_value loop_* new_decoder_architecture norm_after
        norm_weight_offset num_register_tokens parallel_attn ple_* post_norm* recurrent_* swiglu_*
        use_post_* use_swiglu_ffn""",
    "another norm": "layer_norm_type norm_class norm_type normalization normalization_type",
    "another activation": """*_sparsity_pattern act_fn activation activation_fn activation_function
        activation_type ffn_act_fn hidden_activation mlp_activation_function""",
    "biases": """*_out_bias *lm_head_bias *qkv_bias* add_bias_linear bias k_bias
        multi_modal_projector_bias o_bias projector_bias q_bias use_bias v_bias""",
    "another way to read pictures": """*_resampler *_resampler_* *_token_merg* *perceiver* *qformer*
        downsample_ratio mm_projector mm_vision_tower_aux* pixel_shuffle* s2 spatial_merge_size
        temporal_merge_size temporal_patch_size vision_feature_layers
        vision_tower_aux*""",
}
#: The same for the decoder alone, which rotates positions and looks back only.
TEXT_CHANGES = CHANGES | {
    "no rotation of positions": "use_rope use_rotary*",
    "attention to what follows": "*is_causal",
    "no RMSNorm": "rms_norm use_rms_norm use_rmsnorm",
}
#: And for the tower, which has learned positions and a class token.
VISION_CHANGES = CHANGES | {
    "rotated positions": "rope_* use_rope use_rotary*",
    "no class token": "*class_token *cls_token use_abs_pos*",
}
#: And inside RoPE's parameters, for its other kinds (YaRN, LongRoPE, M-RoPE, NTK by alpha).
ROPE_CHANGES = CHANGES | {
    "another kind of rotation": """*_attention *mrope* alpha attention_factor beta_* long_factor
        mscale* short_factor truncate""",
}

#: What null, false and the like say: that a key does nothing.
OFF: tuple[object, ...] = (None, False, 0, "", "none")
#: With which other values such keys do nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "another base of rotation": (None, 10000),
    "a rotation of a part of each head": (None, 1),
    "another kind of positions": (*OFF, "absolute", "learned", "rope", "rotary"),
    "a multiplier": (None, 1),
    "experts": (*OFF, 1),
    "layers of several kinds": (*OFF, "attention", "dense", "full", "full_attention", "global"),
    "another norm": (
        *OFF,
        "rms",
        "rms_norm",
        "rmsnorm",
        "RMSNorm",
        "layer_norm",
        "layernorm",
        "LayerNorm",
    ),
    "another activation": (*OFF, "silu", "swish", "swiglu", "quick_gelu"),
    "another way to read pictures": (*OFF, 1),
    "no rotation of positions": (None, True),
    "attention to what follows": (None, True),
    "no RMSNorm": (None, True),
    "no class token": (None, True),
}
