"""LLaVA's family beyond 1.5 and 1.6: another tower, several of its layers, or videos."""

from __future__ import annotations

from typing import Any

from tests.published.llava_hf import (
    IMAGES,
    TEXTS,
    VICUNA_7B,
    VICUNA_13B,
    VIDEOS,
    hf,
    hf_next,
    turns,
)
from tests.published.original import V16_VICUNA_7B
from tests.published.row import CLIP_336, KNOWLEDGE, Published, Settings

PAGE = "the file as huggingface.co shows it"

SO400M: Settings = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "layer_norm_eps": 1e-06,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN_7B: Settings = {
    "_name_or_path": "Qwen/Qwen1.5-7B-Chat",
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152000,
}
QWEN_05B: Settings = {
    **QWEN_7B,
    "_name_or_path": "Qwen/Qwen1.5-0.5B-Chat",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "max_window_layers": 21,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
}


def interleave(text: Settings, version: str, **more: Any) -> Settings:
    """A config.json of LLaVA-NeXT-Interleave, converted by llava-hf."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 151646,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "transformers_version": version,
        "vision_config": SO400M,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        **more,
    }


def vip(text: Settings, version: str, **more: Any) -> Settings:
    """A config.json of ViP-LLaVA, converted by llava-hf."""
    config = hf(text, transformers_version=version)
    for key in ("tie_word_embeddings", "vision_feature_layer", "vision_feature_select_strategy"):
        del config[key]
    return config | {
        "architectures": ["VipLlavaForConditionalGeneration"],
        "model_type": "vipllava",
        "projector_layernorm_eps": 1e-05,
        "vision_config": {**CLIP_336, "vocab_size": 32000},
        **more,
    }


#: lmms-lab's own of LLaVA-NeXT-Interleave.
ORIGINAL_7B: Settings = {
    **{k: v for k, v in V16_VICUNA_7B.items() if k != "pad_token_id"},
    "_name_or_path": "lmms-lab/llava-next-interleave-qwen-7b",
    "architectures": ["LlavaQwenForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "mm_hidden_size": 1152,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "model_type": "llava_qwen",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
ORIGINAL_05B: Settings = {
    **ORIGINAL_7B,
    "_name_or_path": "lmms-lab/llava-next-interleave-qwen-0.5b",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "max_window_layers": 21,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
}
#: Of which transformers writes the numbers that differ from its class's.
NEXT_VIDEO: Settings = {
    **hf_next({**VICUNA_7B, "pad_token_id": 0}, 32001),
    "architectures": ["LlavaNextVideoForConditionalGeneration"],
    "model_type": "llava_next_video",
    "spatial_pool_mode": "average",
    "spatial_pool_stride": 2,
    "transformers_version": "4.42.0.dev0",
    "video_seq_length": 288,
    "video_token_index": 32000,
}

OWN_INTERLEAVE = turns(
    "<|im_start|>{{ message.role }}\n",
    "<|im_end|>\n",
    "<|im_start|>assistant\n",
    "{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}\n{{ part.text }}{% endfor %}",
)
OWN_VIP = turns(
    "{% if message.role == 'user' %}###Human: {% elif message.role == 'assistant' %}"
    "###Assistant: {% endif %}",
    "",
    "###Assistant:",
    IMAGES + TEXTS,
)
OWN_NEXT_VIDEO = turns("{{ message.role.upper() }}: ", " ", "ASSISTANT:", IMAGES + VIDEOS + TEXTS)
QWEN: dict[str, Any] = {
    "vocabulary": "qwen2",
    "template": "own",
    "ends": (151645,),
    "tokenizer_config": {"bos_token": None, "eos_token": "<|im_end|>"},
    "mode": "crop",
}

FAMILY = (
    Published(
        "llava-hf/llava-interleave-qwen-0.5b-hf", PAGE, interleave(QWEN_05B, "4.43.0.dev0"), "hf",
        chat_template=OWN_INTERLEAVE, tokens=729, layer=-1, **QWEN,
    ),
    Published(
        "llava-hf/llava-interleave-qwen-7b-hf", PAGE, interleave(QWEN_7B, "4.44.0.dev0"), "hf",
        chat_template=OWN_INTERLEAVE, tokens=729, layer=-1, **QWEN,
    ),
    Published(
        "llava-hf/vip-llava-7b-hf", PAGE,
        vip(
            {**VICUNA_7B, "pad_token_id": 0}, "4.36.0.dev0",
            projector_layernorm=False, vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        ),
        "hf", chat_template=OWN_VIP, template="own", mode="crop", layer=(-2, -5, -8, -11, 6),
    ),
    Published(
        "llava-hf/vip-llava-13b-hf", PAGE,
        vip(
            {**VICUNA_13B, "_name_or_path": "meta-llama/Llama-2-13b-hf"}, "4.37.0.dev0",
            vision_feature_layers=[-2, -5, -8, -11, 6],
        ),
        "hf", chat_template=OWN_VIP, template="own", mode="crop", layer=(-2, -5, -8, -11, 6),
    ),
    Published(
        "llava-hf/LLaVA-NeXT-Video-7B-hf, -DPO-hf", KNOWLEDGE, NEXT_VIDEO, "hf",
        chat_template=OWN_NEXT_VIDEO, template="own", mode="anyres", tokens=1464,
    ),
    *(
        Published(
            f"lmms-lab/llava-next-interleave-qwen-{size}", KNOWLEDGE, config, "tuned tower",
            **{**QWEN, "template": "qwen_1_5", "mode": "anyres"}, tokens=1233, layer=-1,
        )
        for size, config in (("0.5b", ORIGINAL_05B), ("7b", ORIGINAL_7B))
    ),
)  # fmt: skip
