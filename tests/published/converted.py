"""What others made of published LLaVAs: MLX, AWQ, GPTQ and GGUF."""

from __future__ import annotations

from typing import Any

from tests.published.family import OWN_INTERLEAVE, PAGE, QWEN, QWEN_05B, SO400M, interleave
from tests.published.llava_hf import (
    LLAMA_3,
    MISTRAL_V02,
    TEXT_LLAMA_3,
    TEXT_MISTRAL,
    VICUNA_7B,
    hf,
    hf_next,
)
from tests.published.original import (
    LLAMA_1,
    SIZES_MISTRAL,
    V0_7B,
    V0_7B_TOKENS,
    V0_13B,
    V0_13B_TOKENS,
    V15_7B,
    V15_13B,
    V16_MISTRAL,
    V16_VICUNA_7B,
)
from tests.published.row import CLIP_336, FILES, KNOWLEDGE, Published, Settings

MLX_4BIT, MLX_8BIT = {"group_size": 64, "bits": 4}, {"group_size": 64, "bits": 8}
_ABSENT = """
    begin_suppress_tokens bad_words_ids cross_attention_hidden_size decoder_start_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id prefix
    problem_type sep_token_id suppress_tokens task_specific_params tokenizer_class
""".split()
_OFF = """
    _attn_implementation_autoset add_cross_attention do_sample early_stopping is_decoder
    is_encoder_decoder output_attentions output_hidden_states output_scores remove_invalid_values
    return_dict_in_generate tf_legacy_loss tie_encoder_decoder torchscript use_bfloat16
""".split()
#: What transformers 4.50 says of every config when mlx-vlm 0.1 calls ``to_dict``.
DUMPED: Settings = {
    **dict.fromkeys(_ABSENT),
    **dict.fromkeys(_OFF, False),
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "pruned_heads": {},
    "repetition_penalty": 1.0,
    "return_dict": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}
_ENDS: Settings = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def dumped(text: Settings, **more: Any) -> Settings:
    """llava-1.5's config.json as mlx-vlm 0.1 wrote it, with every attribute of every class."""
    vision = {
        **CLIP_336,
        **_ENDS,
        "_name_or_path": "",
        "architectures": None,
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "num_channels": 3,
        "tie_word_embeddings": True,
        "torch_dtype": None,
        "vocab_size": 32000,
    }
    spelled = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    config = hf(text, image_seq_length=576, multimodal_projector_bias=True)
    config["text_config"] = {**DUMPED, **spelled, **text}
    config["vision_config"] = {**DUMPED, **vision}
    return {**DUMPED, **_ENDS, **config, "transformers_version": "4.50.3", **more}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
QUANTISED_HF = (
    Published(
        "mlx-community/llava-1.5-7b-4bit", FILES,
        dumped(VICUNA_7B, quantization=MLX_4BIT), "mlx",
        quantization=MLX_4BIT, mode="crop",
        real="mlx-vlm-0.1-dump",
    ),
    Published(
        "mlx-community/llava-v1.6-mistral-7b-4bit", KNOWLEDGE,
        hf_next(MISTRAL_V02, quantization=MLX_4BIT), "mlx",
        quantization=MLX_4BIT, template="mistral_instruct", mode="anyres", tokens=1464,
    ),
    Published(
        "mlx-community/llava-v1.6-mistral-7b-8bit", KNOWLEDGE,
        hf_next(MISTRAL_V02, quantization=MLX_8BIT), "mlx", quantization=MLX_8BIT,
        template="mistral_instruct", mode="anyres", tokens=1464,
    ),
    Published(
        "mlx-community/llava-llama-3-8b-v1_1-4bit", KNOWLEDGE,
        hf(LLAMA_3, 128257, pad_token_id=128256, quantization=MLX_4BIT), "mlx",
        vocabulary="llama3", chat_template=TEXT_LLAMA_3, quantization=MLX_4BIT,
        tokenizer_config={"eos_token": "<|end_of_text|>"},
        template="own", ends=(128001, 128009), mode="crop",
    ),
    Published(  # whose converter fills SigLIP's layers up to whole groups
        "mlx-community/llava-interleave-qwen-0.5b-8bit", PAGE,
        interleave(
            QWEN_05B, "4.43.0.dev0",
            quantization=MLX_8BIT, vision_config={**SO400M, "intermediate_size": 4352},
        ),
        "mlx", chat_template=OWN_INTERLEAVE, quantization=MLX_8BIT, tokens=729, layer=-1, **QWEN,
    ),
    Published(
        "ybelkada/llava-1.5-7b-hf-awq", KNOWLEDGE, hf(VICUNA_7B, quantization_config=AWQ), "awq",
        quantization=AWQ, mode="crop",
    ),
)  # fmt: skip

QUANTISED_ORIGINAL = (
    Published(
        "TheBloke/llava-v1.5-13B-GPTQ", KNOWLEDGE,
        {
            **V15_13B,
            "quantization_config": {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": 128,
                "damp_percent": 0.1,
                "desc_act": True,
                "sym": True,
                "true_sequential": True,
                "model_name_or_path": None,
                "model_file_base_name": "model",
            },
        },
        "gptq", vocabulary="small", quantization={"bits": 4, "group_size": 128, "desc_act": True},
    ),
    Published(
        "TheBloke/llava-v1.5-13B-AWQ", KNOWLEDGE, {**V15_13B, "quantization_config": AWQ},
        "awq", vocabulary="small", quantization=AWQ,
    ),
    Published(
        "wojtab/llava-13b-v0-4bit-128g", KNOWLEDGE, V0_13B, "gptq decoder",
        added_tokens=V0_13B_TOKENS, tokenizer_config=LLAMA_1,
        quantization={"bits": 4, "group_size": 128},
        template="llava_v0", mode="crop", tokens=256,
    ),
    Published(
        "wojtab/llava-7b-v0-4bit-128g", KNOWLEDGE, V0_7B, "gptq decoder",
        added_tokens=V0_7B_TOKENS, tokenizer_config=LLAMA_1,
        quantization={"bits": 4, "group_size": 128},
        template="llava_v0", mode="crop", tokens=256,
    ),
)  # fmt: skip

GGUF = (
    Published(
        "mys/ggml_llava-v1.5-7b", "logs in ggml-org/llama.cpp pull request 3436",
        V15_7B, "gguf", "F16", "small",
    ),
    Published("mys/ggml_llava-v1.5-13b", KNOWLEDGE, V15_13B, "gguf", "Q4_0", "small"),
    Published(
        "mys/ggml_bakllava-1", KNOWLEDGE,
        {**V15_7B, **SIZES_MISTRAL, "rope_theta": 10000.0}, "gguf", "F16", "small",
    ),
    Published(
        "cmp-nct/llava-1.6-gguf, vicuna-7b", KNOWLEDGE, V16_VICUNA_7B, "gguf", "Q8_0", "small",
        mode="anyres", tokens=976,
    ),
    Published(
        "cmp-nct/llava-1.6-gguf, mistral-7b",
        "a log in gokayfem/ComfyUI_VLM_nodes issue 133",
        V16_MISTRAL, "gguf", "Q8_0", "small", chat_template=TEXT_MISTRAL,
        template="own", mode="anyres", tokens=976,
    ),
)  # fmt: skip
