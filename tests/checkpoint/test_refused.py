"""Checkpoints of other models and with other parts are refused by the names of these."""

from __future__ import annotations

import json

import pytest

from mlx_llava import LlavaConfig
from mlx_llava.checkpoint import original
from tests.conftest import load_as_stored as load

pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
tiny = pytest.importorskip("tests.tiny")
layouts = pytest.importorskip("tests.layouts")


@pytest.fixture(scope="module")
def reference():
    return tiny.make_model(layouts.case())


OTHERS = {
    "Video-LLaVA": ({"model_type": "video_llava"}, "model_type='video_llava'; mlx_llava supports"),
    "TinyLLaVA": ({"model_type": "tinyllava"}, "model_type='tinyllava'; mlx_llava supports"),
    "LLaVA-Gemma": (
        {"model_type": "llava", "text_config": {"model_type": "gemma"}},
        "text_config has model_type='gemma'; mlx_llava supports",
    ),
    "SigLIP 2": (
        {"model_type": "llava", "vision_config": {"model_type": "siglip2_vision_model"}},
        "vision_config has model_type='siglip2_vision_model'; mlx_llava supports",
    ),
    "DINO": (
        {"model_type": "llava", "vision_config": {"model_type": "dinov2"}},
        "vision_config has model_type='dinov2'; mlx_llava supports",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_part_of_llava_hfs_layout_is_refused_by_name(reference, name, tmp_path):
    config, message = OTHERS[name]
    tensors = layouts.state_dict(reference)  # which do not fit, and are not spoken of
    layouts.write_folder(tmp_path / "model", tensors, config, "safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    "names",
    [
        {"architectures": ["LlavaGemmaForCausalLM"]},
        {"architectures": None, "model_type": "llava_granite"},
        {"architectures": ["LlavaQwen2ForCausalLM"]},
        {"model_type": "llava_phi3"},
        {"architectures": ["LlavaQwenMoeForCausalLM"], "rms_norm_eps": 1e-6},
        {"model_type": "llava_qwen3", "rms_norm_eps": 1e-6},
        {"architectures": ["LlavaQwen3ForCausalLM"], "rms_norm_eps": 1e-6},
        {"architectures": ["LlavaMixtralForCausalLM"]},
        {"architectures": ["LlavaErnie4_5ForCausalLM"]},
        {"architectures": ["LlavaGptForCausalLM"], "model_type": "llava-jp"},
        {"model_type": "helium"},
    ],
)
def test_another_decoder_is_refused_by_name(names):
    name = "Gemma granite Qwen Qwen3 llava_qwen3 moe phi Mixtral Ernie gpt helium".split()
    data = {"hidden_size": 64, "num_attention_heads": 4, **names}
    with pytest.raises(ValueError, match=f"(?i)the decoder ({'|'.join(name)}) is not supported"):
        LlavaConfig.from_dict(original.translate(data, {}, 99))


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"architectures": ["LlavaLlamaModel"], "llm_cfg": {"model_type": "llama"}}, "VILA"),
        ({"mm_image_tower": "LanguageBind/LanguageBind_Image"}, "Video-LLaVA"),
        ({"mm_video_tower": "LanguageBind/LanguageBind_Video_merge"}, "Video-LLaVA"),
        ({"architectures": ["GeoChatLlamaForCausalLM"], "model_type": "geochat"}, "GeoChat"),
    ],
)
def test_a_llava_with_other_parts_is_refused_by_name_before_they_are_missed(
    reference, keys, name, tmp_path
):
    config = layouts.original_config(reference, **keys)
    if "geochat" not in config["model_type"]:
        del config["mm_vision_tower"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"is that of {name}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mm_vision_tower": "google/siglip2-so400m-patch14-384"}, "the tower is SigLIP 2, which"),
        ({"mm_vision_tower": "facebook/dinov2-large"}, "the tower is DINO, which is not supported"),
        ({"mm_vision_tower": "OpenGVLab/InternViT-6B-448px-V1-5"}, "the tower is InternViT"),
        ({"mm_vision_tower": "DeepGlint-AI/mlcd-vit-bigG-patch14-448"}, "which rotates positions"),
        ({"mm_projector_type": "ldpnetv2", "model_type": "mobilevlm"}, "type='ldpnetv2'; .*mlpNx"),
        ({"mm_projector_type": "mlp2x_res2x_gelu"}, "mm_projector_type='mlp2x_res2x_gelu'"),
        (
            {"add_faster_video": True, "image_aspect_ratio": "anyres_max_9"},
            "add_faster_video=True; mlx_llava supports false",
        ),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type='qformer'; mlx_llava supports none"),
        ({"image_aspect_ratio": "anyres_highres"}, "image_aspect_ratio='anyres_highres'; .*max_N"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantised by MLX; take the repository"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_another_part_is_refused_by_name_before_anything_is_missed(
    reference, keys, message, tmp_path
):
    config = layouts.original_config(reference, **keys)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("decoder", [{"model_type": "llama"}, None])
def test_xtuners_own_layout_is_refused_with_what_to_take(decoder, tmp_path):
    (tmp_path / "projector").mkdir()
    (tmp_path / "projector" / "config.json").write_text(json.dumps({"model_type": "projector"}))
    if decoder:
        (tmp_path / "config.json").write_text(json.dumps(decoder))
    with pytest.raises(ValueError, match="in xtuner's own layout; take the repository with -hf"):
        load(tmp_path)
