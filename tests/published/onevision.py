"""LLaVA-OneVision and LLaVA-Video: llava-hf's repositories and lmms-lab's."""

from __future__ import annotations

from typing import Any

from tests.published.family import QWEN, SO400M
from tests.published.llava_hf import IMAGES, TEXTS, VIDEOS, turns
from tests.published.row import KNOWLEDGE, Published, Settings

PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]

QWEN2_05B: Settings = {
    "_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152000,
}
QWEN2_7B: Settings = {
    **{k: v for k, v in QWEN2_05B.items() if k not in ("max_window_layers", "sliding_window")},
    "_name_or_path": "Qwen/Qwen2-7B-Instruct",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 152128,
}
QWEN2_72B: Settings = {
    **QWEN2_7B,
    "_name_or_path": "Qwen/Qwen2-72B-Instruct",
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
}


def onevision(text: Settings) -> Settings:
    """A config.json of LLaVA-OneVision, converted by llava-hf."""
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": PINPOINTS,
        "image_token_index": 151646,
        "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.45.0.dev0",
        "use_image_newline_parameter": True,
        "video_token_index": 151647,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": SO400M,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


#: lmms-lab's own of 7B, as PaddlePaddle/PaddleMIX quotes it.
OV_7B: Settings = {
    "_name_or_path": "lmms-lab/llava-onevision-qwen2-7b-ov",
    "architectures": ["LlavaQwenForCausalLM"],
    "mm_newline_position": "one_token",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_token_index": 151646,
    "image_aspect_ratio": "anyres_max_9",
    "image_crop_resolution": None,
    "image_grid_pinpoints": PINPOINTS,
    "image_split_resolution": None,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "mm_hidden_size": 1152,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_tower_lr": 2e-06,
    "model_type": "llava",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pos_skipping_range": 4096,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "use_sliding_window": False,
    "vision_tower_pretrained": None,
    "vocab_size": 152064,
}
OV_05B: Settings = {
    **OV_7B,
    "_name_or_path": "lmms-lab/llava-onevision-qwen2-0.5b-si",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
VIDEO_7B: Settings = {
    **OV_7B,
    "_name_or_path": "lmms-lab/llava-onevision-qwen2-7b-si",
    "add_faster_video": False,
    "add_time_instruction": True,
    "faster_token_stride": 10,
    "force_sample": True,
    "mm_newline_position": "grid",
    "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_stride": 2,
}

OWN = turns(
    "<|im_start|>{{ message.role }}\n",
    "<|im_end|>\n",
    "<|im_start|>assistant\n",
    IMAGES + VIDEOS + TEXTS,
)
HOW: dict[str, Any] = {**QWEN, "mode": "anyres", "tokens": 1261, "layer": -1}

ONEVISION = (
    *(
        Published(
            f"llava-hf/llava-onevision-qwen2-{size}-ov-hf, -si-hf", KNOWLEDGE,
            onevision(text), "hf", chat_template=OWN, **HOW,
        )
        for size, text in (
            ("0.5b", QWEN2_05B), ("7b", QWEN2_7B), ("72b", QWEN2_72B),
        )
    ),
    *(
        Published(name, source, config, "tuned tower", **{**HOW, "template": "qwen_1_5"})
        for name, source, config in (
            ("lmms-lab/llava-onevision-qwen2-0.5b-ov", KNOWLEDGE, OV_05B),
            ("lmms-lab/llava-onevision-qwen2-7b-ov", "PaddlePaddle/PaddleMIX", OV_7B),
            ("lmms-lab/LLaVA-Video-7B-Qwen2", KNOWLEDGE, VIDEO_7B),
        )
    ),
)  # fmt: skip
