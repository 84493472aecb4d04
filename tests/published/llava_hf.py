"""llava-hf's repositories, and others in its layout."""

from __future__ import annotations

from typing import Any

from tests.published.row import (
    CLIP_336,
    FILES,
    KNOWLEDGE,
    PINPOINTS,
    SIZES_13B,
    Published,
    Settings,
)

VICUNA_7B: Settings = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
VICUNA_13B: Settings = {**VICUNA_7B, **SIZES_13B, "_name_or_path": "lmsys/vicuna-13b-v1.5"}
MISTRAL_V01: Settings = {
    "_name_or_path": "mistralai/Mistral-7B-v0.1",
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
MISTRAL_V02: Settings = {
    **MISTRAL_V01,
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
YI_34B: Settings = {
    "_name_or_path": "NousResearch/Nous-Hermes-2-Yi-34B",
    "architectures": ["LlamaForCausalLM"],
    "eos_token_id": 7,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "vocab_size": 64064,
}
LLAMA_3: Settings = {
    "_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "float16",
    "vocab_size": 128320,
}

QWEN_72B: Settings = {
    "_name_or_path": "Qwen/Qwen1.5-72B-Chat",
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_size": 8192,
    "intermediate_size": 24576,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "model_type": "qwen2",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 64,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152128,
}


def hf(text: Settings, image_token: int = 32000, **more: Any) -> Settings:
    """A config.json of LlavaForConditionalGeneration, as transformers 4.36 wrote it."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": image_token,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": {**CLIP_336, "vocab_size": 32000},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": text["vocab_size"],
        **more,
    }


def hf_next(text: Settings, image_token: int = 32000, **more: Any) -> Settings:
    """A config.json of LlavaNextForConditionalGeneration, as transformers 4.39 wrote it."""
    config = hf(text, image_token, **more)
    del config["pad_token_id"]
    return config | {
        "transformers_version": "4.39.0.dev0",
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": PINPOINTS,
        "model_type": "llava_next",
        "use_image_newline_parameter": True,
    }


def xtuner(text: Settings, image_token: int, pad_token: int) -> Settings:
    """A config.json of xtuner's converter, which leaves out what transformers supplies."""
    config = hf(text, image_token, pad_token_id=pad_token)
    del config["tie_word_embeddings"], config["vocab_size"]
    name = "openai/clip-vit-large-patch14-336"
    return config | {"vision_config": {**CLIP_336, "_name_or_path": name, "dropout": 0.0}}


IMAGES = "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
VIDEOS = IMAGES.replace("image", "video")
TEXTS = "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"


def turns(before: str, after: str, prompt: str = "", content: str = IMAGES + TEXTS) -> str:
    """A Jinja template that writes every turn between two texts."""
    each = f"{{% for message in messages %}}{before}{content}{after}{{% endfor %}}"
    return f"{each}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"


#: What the templates in llava-hf's repositories write (their chat_template.json).
OWN_VICUNA = turns("{{ message.role.upper() }}: ", " ", "ASSISTANT:")
OWN_MISTRAL = turns(
    "{% if message.role == 'user' %}[INST] {% else %} {% endif %}",
    "{% if message.role == 'user' %} [/INST]{% else %}</s> {% endif %}",
)
OWN_YI = turns("<|im_start|>{{ message.role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
LLAMA_3_TURN = "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
LLAMA_3_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
OWN_LLAMA_3 = turns(LLAMA_3_TURN, "<|eot_id|>", LLAMA_3_ANSWER)
#: Those of the language models alone, whose turns are plain texts.
TEXT_LLAMA_3 = "{{ bos_token }}" + turns(
    LLAMA_3_TURN,
    "<|eot_id|>",
    LLAMA_3_ANSWER,
    "{{ message['content'] | trim }}",
)
TEXT_PHI_3 = "{{ bos_token }}" + turns(
    "<|{{ message.role }}|>\n", "<|end|>\n", "<|assistant|>\n", "{{ message['content'] }}"
)
TEXT_MISTRAL = "{{ bos_token }}" + turns(
    "{% if message.role == 'user' %}[INST] {% endif %}",
    "{% if message.role == 'user' %} [/INST]{% else %}{{ eos_token }}{% endif %}",
    content="{{ message['content'] }}",
)

HF = (
    Published(
        "llava-hf/llava-1.5-7b-hf", FILES, hf(VICUNA_7B), "hf", vocabulary="LLaMA",
        chat_template=OWN_VICUNA, template="own", mode="crop",
        real="llava-1.5-7b-hf",
    ),
    Published(
        "llava-hf/llava-1.5-13b-hf", FILES, hf(VICUNA_13B), "hf",
        chat_template=OWN_VICUNA, template="own", mode="crop",
        real="dumps/4.37.2",
    ),
    Published(
        "llava-hf/bakLlava-v1-hf", FILES, hf(MISTRAL_V01), "hf",
        chat_template=OWN_MISTRAL, template="own", mode="crop",
        real="dumps/4.37.2",
    ),
    Published(
        "llava-hf/llava-v1.6-vicuna-7b-hf", FILES, hf_next(VICUNA_7B), "hf",
        chat_template=OWN_VICUNA, template="own", mode="anyres", tokens=1464,
        real="dumps/4.45.2",
    ),
    Published(
        "llava-hf/llava-v1.6-vicuna-13b-hf", FILES, hf_next(VICUNA_13B), "hf",
        chat_template=OWN_VICUNA, template="own", mode="anyres", tokens=1464,
        real="dumps/4.45.2",
    ),
    Published(
        "llava-hf/llava-v1.6-mistral-7b-hf", FILES, hf_next(MISTRAL_V02), "hf",
        chat_template=OWN_MISTRAL, template="own", mode="anyres", tokens=1464,
        real="dumps/4.45.2",
    ),
    Published(
        "llava-hf/llava-v1.6-34b-hf", FILES, hf_next(YI_34B, 64000), "hf",
        vocabulary="yi", chat_template=OWN_YI, template="own", ends=(7,),
        mode="anyres", tokens=1464,
        real="dumps/4.45.2",
    ),
    Published(
        "llava-hf/llama3-llava-next-8b-hf", FILES,
        hf_next({**LLAMA_3, "eos_token_id": 128009, "torch_dtype": "bfloat16"}, 128256), "hf",
        vocabulary="llama3", chat_template=OWN_LLAMA_3, template="own", ends=(128009,),
        tokenizer_config={"eos_token": "<|eot_id|>"},
        mode="anyres", tokens=1464,
        real="dumps/4.45.2",
    ),
    Published(
        "llava-hf/llava-next-72b-hf", KNOWLEDGE, hf_next(QWEN_72B, 151646), "hf",
        vocabulary="qwen2", chat_template=OWN_YI, template="own", ends=(151645,),
        tokenizer_config={"bos_token": None, "eos_token": "<|im_end|>"},
        mode="anyres", tokens=1464,
    ),
    Published(
        "xtuner/llava-llama-3-8b-v1_1-transformers", FILES,
        xtuner(LLAMA_3, 128257, 128256), "hf",
        vocabulary="llama3", chat_template=TEXT_LLAMA_3, template="own", ends=(128001, 128009),
        tokenizer_config={"eos_token": "<|end_of_text|>"}, mode="crop",
        real="llama3-own-template",
    ),
    Published(
        "xtuner/llava-phi-3-mini-hf", FILES,
        hf(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "bos_token_id": 1,
                "eos_token_id": 32000,
                "hidden_size": 3072,
                "intermediate_size": 8192,
                "max_position_embeddings": 4096,
                "num_key_value_heads": 32,
                "rms_norm_eps": 1e-05,
                "pad_token_id": 32000,
                "vocab_size": 32064,
                "sliding_window": 2047,
                "original_max_position_embeddings": 4096,
            },
            32038,
        ),
        "hf",
        vocabulary="phi3", chat_template=TEXT_PHI_3, template="own", ends=(32000, 32007),
        tokenizer_config={"eos_token": "<|endoftext|>"}, mode="crop",
        real="phi3-as-llama",
    ),
    Published(
        "unsloth/llava-1.5-7b-hf", FILES, hf(VICUNA_7B, unsloth_fixed=True), "hf",
        chat_template=OWN_VICUNA, template="own", mode="crop",
        real="unsloth-fixed",
    ),
    Published(
        "TIGER-Lab/Mantis-8B-clip-llama3", KNOWLEDGE,
        hf(LLAMA_3, 128256, pad_token_id=128257), "hf",
        vocabulary="llama3", chat_template=TEXT_LLAMA_3, template="own", ends=(128001, 128009),
        tokenizer_config={"eos_token": "<|eot_id|>"}, mode="crop",
    ),
)  # fmt: skip
