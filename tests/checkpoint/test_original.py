"""The original's config.json under other names, with other keys, and CLIP's own beside it."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava import LlavaConfig, convert
from mlx_llava.checkpoint import original, tensors
from mlx_llava.checkpoint.hub import Source
from mlx_llava.checkpoint.tower import read_tower
from mlx_llava.inputs.video import Video
from mlx_llava.model.vision_config import VisionConfig
from tests.conftest import load_as_stored as load

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
tiny = pytest.importorskip("tests.tiny")
layouts = pytest.importorskip("tests.layouts")


@pytest.fixture(scope="module")
def reference():
    return tiny.make_model(layouts.case())


def bare(reference):
    """The original's tensors without a tower."""
    tensors = layouts.to_original(layouts.state_dict(reference))
    return {key: tensor for key, tensor in tensors.items() if "vision_tower" not in key}


def same_logits(folder, reference, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, processor = load(folder, **options)
    inputs = layouts.inputs_of(processor)
    found = np.array(model(**inputs))[..., : layouts.VOCABULARY]
    assert np.abs(found - layouts.reference_logits(reference, inputs)).max() < 1e-4


RENAMED = {
    "palo": {"architectures": ["PaloForCausalLM"], "model_type": "palo"},
    "share4v": {
        "architectures": ["Share4VLlamaForCausalLM"],
        "model_type": "share4v",
        "tune_entire_model": True,
        "tune_vision_tower": True,
        "vision_tower_lr": 2e-6,
    },
    "llava-next": {
        "model_type": "llava_llama",
        "mm_tunable_parts": "mm_mlp_adapter,mm_language_model",
        "mm_spatial_pool_mode": "bilinear",
        "mm_newline_position": "grid",
        "pos_skipping_range": 4096,
        "use_pos_skipping": True,
        "faster_token_stride": 10,
    },
    "dolphin": {"architectures": ["DolphinPromptForCausalLM"], "model_type": "my_llava"},
    "nameless": {"architectures": None, "model_type": None},
    "numbers": {"architectures": [3], "model_type": 4},
}


@pytest.mark.parametrize("name", RENAMED)
def test_a_renamed_class_is_read_by_its_keys_and_tensors(reference, name, tmp_path):
    clip = layouts.write_clip(tmp_path / "clip", layouts.state_dict(reference), reference)
    config = layouts.original_config(reference, **RENAMED[name])
    same_logits(
        layouts.write_folder(tmp_path / "llava", bare(reference), config),
        reference,
        vision_tower=clip,
    )


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen2", {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen"}),
        ("qwen2", {"architectures": ["LlavaQwen2ForCausalLM"], "model_type": "llava"}),
        ("phi3", {"architectures": ["LlavaPhiForCausalLM"], "model_type": "llava_phi"}),
        ("mistral", {"architectures": ["LlavaMistralForCausalLM"], "sliding_window": 7}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_decoders_are_told_by_their_names(family, names, tmp_path):
    window = names.get("sliding_window")
    case = layouts.case(**tiny.PHI_3, head_dim=16, sliding_window=window)
    model = tiny.make_model(replace(case, family=family))
    clip = layouts.write_clip(tmp_path / "clip", layouts.state_dict(model), model)
    folder = tmp_path / "llava"
    layouts.write_folder(folder, bare(model), layouts.original_config(model, **names))
    same_logits(folder, model, vision_tower=clip)


def test_a_decoder_that_only_text_config_describes_is_read(reference, tmp_path):
    config = layouts.original_config(reference, architectures=["LlavaRForConditionalGeneration"])
    text = "hidden_size intermediate_size num_hidden_layers rms_norm_eps rope_theta eos_token_id"
    heads = ("num_attention_heads", "num_key_value_heads")
    inner = {key: config.pop(key) for key in (*text.split(), *heads)}
    config |= {"model_type": "llava", "text_config": {**inner, "max_position_embeddings": 1}}
    clip = layouts.write_clip(tmp_path / "clip", layouts.state_dict(reference), reference)
    folder = layouts.write_folder(tmp_path / "llava", bare(reference), config)
    same_logits(folder, reference, vision_tower=clip)
    read = LlavaConfig.from_dict(original.translate(config, {}, layouts.VOCABULARY))
    assert read.eos_token_id == (2,)
    assert read.text_config.max_position_embeddings == config["max_position_embeddings"]


#: What PreTrainedConfig wrote into each part of CLIP's config.json, before it left defaults out.
FULL_DUMP = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_encoder_decoder": False,
    "num_beams": 1,
    "pruned_heads": {},
    "return_dict": True,
    "tie_word_embeddings": True,
    "top_k": 50,
    "torch_dtype": None,
    "transformers_version": "4.16.0.dev0",
    "use_bfloat16": False,
}


@pytest.mark.parametrize("kind", ["whole", "both", "dict", "tower"])
def test_the_config_of_openais_clip_is_read(reference, kind, tmp_path):
    clip = layouts.write_clip(tmp_path / "clip", layouts.state_dict(reference), reference)
    vision = json.loads((clip / "config.json").read_text())["vision_config"]
    vision = {**vision, **FULL_DUMP}
    top = {"model_type": "clip", "projection_dim": 768, "logit_scale_init_value": 2.6592}
    text = {"text_config": {**FULL_DUMP, "model_type": "clip_text_model"}}
    configs = {
        "whole": {**top, **text, "vision_config": vision},
        # A sparse vision_config_dict wins over a vision_config that says the defaults.
        "both": {
            **top,
            "vision_config": {**vision, "patch_size": 32, "hidden_size": 768},
            "vision_config_dict": {key: vision[key] for key in ("patch_size", "hidden_size")},
        },
        "dict": {**top, "vision_config": None, "vision_config_dict": vision},
        "tower": {
            **vision,
            "model_type": "clip_vision_model",
            "architectures": ["CLIPVisionModel"],
        },
    }
    (clip / "config.json").write_text(json.dumps(configs[kind]))
    config = layouts.original_config(reference)
    folder = layouts.write_folder(tmp_path / "llava", bare(reference), config)
    same_logits(folder, reference, vision_tower=clip)


def test_another_tower_is_refused_by_name(reference, tmp_path):
    clip = layouts.write_clip(tmp_path / "clip", layouts.state_dict(reference), reference)
    dino = {"model_type": "dinov2", "image_size": 518}
    (clip / "config.json").write_text(json.dumps(dino))
    config = layouts.original_config(reference)
    folder = layouts.write_folder(tmp_path / "llava", bare(reference), config)
    with pytest.raises(ValueError, match="vision_config has model_type='dinov2'"):
        load(folder, vision_tower=clip)


def test_a_tower_inside_that_was_no_openai_clip_is_read_by_its_own_settings(tmp_path):
    vision = {"hidden_act": "gelu", "layer_norm_eps": 3e-3, "num_attention_heads": 4}
    case = layouts.case()
    model = tiny.make_model(replace(case, vision={**case.vision, **vision}))
    state = layouts.state_dict(model)
    config = layouts.original_config(model, mm_vision_tower="laion/CLIP-ViT-L-14-laion2B")
    folder = layouts.write_folder(tmp_path / "llava", layouts.to_original(state), config)
    with pytest.warns(UserWarning, match=r"tower inside was laion/.*OpenAI's CLIP \(2 heads"):
        load(folder)
    other = {key: tensor + 1 for key, tensor in state.items()}
    clip = layouts.write_clip(tmp_path / "clip", other, model)
    with pytest.warns(UserWarning, match="the weights of .*clip are not used"):
        found, processor = load(folder, vision_tower=clip)
    inputs = layouts.inputs_of(processor)
    logits = np.array(found(**inputs))[..., : layouts.VOCABULARY]
    assert np.abs(logits - layouts.reference_logits(model, inputs)).max() < 1e-4


#: 5 layers, of which the original drops the last and reads what the fourth gives.
SIGLIP = {**layouts.VISION, **tiny.SIGLIP, "num_hidden_layers": 5, "layer_norm_eps": 1e-6}
FULL = {"vision_feature_select_strategy": "full"}


def siglip_case(**vision):
    case = layouts.case()
    return replace(case, vision={**SIGLIP, **vision}, top={**case.top, **FULL})


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_siglip_is_fetched_from_its_own_repository(aspect, tmp_path):
    case = siglip_case(vision_use_head=True)
    model = tiny.make_model(case)
    siglip = layouts.write_clip(tmp_path / "siglip", layouts.state_dict(model), model)
    tower = {"mm_vision_tower": "google/siglip-so400m-patch14-384", "image_aspect_ratio": aspect}
    config = layouts.original_config(model, **tower)
    folder = layouts.write_folder(tmp_path / "llava", bare(model), config)
    with pytest.raises(ValueError, match="is a bare SigLIP; give it as --vision-tower"):
        load(siglip)
    same_logits(folder, model, vision_tower=siglip)
    _, processor = load(folder, vision_tower=siglip)
    colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    square = {"height": 31, "width": 31}
    theirs = tiny.LlavaImageProcessorPil(
        size=square, crop_size=square, do_pad=aspect == "pad", **colours
    )(tiny.picture(50, 31))["pixel_values"]
    ours = processor("What?", tiny.picture(50, 31)).pixel_values
    assert np.array_equal(ours, np.array(theirs).transpose(0, 2, 3, 1))


def test_vip_llava_reads_five_layers_of_openais_clip(tmp_path):
    case = layouts.case()
    deep = {**case.vision, "num_hidden_layers": 11}
    model = tiny.make_model(replace(case, vip=True, vision=deep))
    clip = layouts.write_clip(tmp_path / "clip", layouts.state_dict(model), model)
    names = {
        "multi_modal_projector.projector_layernorm": "model.mm_projector.clip_layernorm",
        "model.mm_projector.": "model.mm_projector.final_linear.",
    }
    original_names = {}
    for key, tensor in bare(model).items():
        old = next((old for old in names if key.startswith(old)), "")
        original_names[names.get(old, "") + key.removeprefix(old)] = tensor
    config = layouts.original_config(model, mm_vision_tower="clip_4layers_336")
    folder = layouts.write_folder(tmp_path / "llava", original_names, config)
    with pytest.raises(FileNotFoundError, match="openai/clip-vit-large-patch14-336 is needed"):
        load(folder, offline=True)
    same_logits(folder, model, vision_tower=clip)


def without_last_layer(model):
    """As the original saves a tower that it has trained."""
    tensors = layouts.to_original(layouts.state_dict(model))
    return {key: t for key, t in tensors.items() if "vision_model.encoder.layers.4." not in key}


def test_siglip_inside_is_read_by_its_shapes(tmp_path):
    model = tiny.make_model(siglip_case(image_size=28))
    config = layouts.original_config(model, mm_vision_tower="google/siglip-so400m-patch14-384")
    same_logits(layouts.write_folder(tmp_path / "llava", without_last_layer(model), config), model)


def test_siglip_inside_is_read_by_the_settings_of_its_repository(tmp_path):
    model = tiny.make_model(siglip_case(num_attention_heads=4, layer_norm_eps=0.2))
    config = layouts.original_config(model, mm_vision_tower="google/siglip-base-patch16-224")
    folder = layouts.write_folder(tmp_path / "llava", without_last_layer(model), config)
    siglip = layouts.write_clip(tmp_path / "siglip", layouts.state_dict(model), model)
    with pytest.warns(UserWarning, match="the weights of .*siglip are not used"):
        found, processor = load(folder, vision_tower=siglip)
    assert found.config.vision_config.image_size == 31
    inputs = layouts.inputs_of(processor)
    logits = np.array(found(**inputs))[..., : layouts.VOCABULARY]
    assert np.abs(logits - layouts.reference_logits(model, inputs)).max() < 1e-4


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_onevision_converts_to_what_it_says(decoder, tmp_path):
    """Its own layout and llava-hf's give the same logits, for one image and for several."""
    case = replace(siglip_case(image_size=28), onevision=True, family=decoder)
    case = replace(case, text={**case.text, "head_dim": 16})
    model = tiny.make_model(replace(case, top={**case.top, "vision_feature_layer": -2}))
    names = "LlavaQwenForCausalLM" if decoder == "qwen2" else "LlavaLlamaForCausalLM"
    config = layouts.original_config(
        model,
        architectures=[names],
        model_type="llava",
        mm_vision_tower="google/siglip-so400m-patch14-384",
        mm_patch_merge_type="spatial_unpad",
        mm_newline_position="grid",
        mm_spatial_pool_mode="average",
        image_aspect_ratio="anyres_max_2",
        image_grid_pinpoints="(1x1),...,(3x3)",
    )
    folder = layouts.write_folder(tmp_path / "llava", without_last_layer(model), config)
    same_logits(folder, model)
    found, processor = load(folder)
    assert (found.config.model_type, found.config.max_tiles) == ("llava_onevision", 2)
    assert found.config.image_grid_pinpoints[:4] == ((28, 28), (28, 56), (28, 84), (56, 28))
    size = (500, 499)
    assert processor.image_processor.num_tokens(size) < 16 * 9
    film = Video(tuple(tiny.picture(50, 41, seed) for seed in range(3)))
    assert processor("What?", video=film).image_tokens == (3 * 2 * (2 + 1),)
    inputs = layouts.inputs_of(processor, 3)
    assert inputs.image_sizes is None
    assert inputs.image_tokens == (17,) * 3
    convert(folder, tmp_path / "hf")
    again, _ = load(tmp_path / "hf")
    assert again.config.mm_newline_position == "grid"
    assert np.abs(np.array(again(**inputs)) - np.array(found(**inputs))).max() < 1e-5


def test_the_tower_of_a_published_siglip_is_told_by_its_shapes():
    """so400m's heads are of 72, and 27 patches of 14 pixels leave 6 of its 384."""
    shapes = {
        "embeddings.position_embedding.weight": (729, 1152),
        "embeddings.patch_embedding.weight": (1152, 14, 14, 3),
        **{f"encoder.layers.{i}.mlp.fc1.bias": (4304,) for i in range(26)},
    }
    weights = {
        tensors.TOWER + name: tensors.LazyTensor(name, shape, mx.float16, None)
        for name, shape in shapes.items()
    }
    tower = read_tower(weights, {"mm_vision_tower": "google/siglip-so400m-patch14-384"}, Source())
    hf = pytest.importorskip("transformers")
    theirs = hf.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    for key, value in vars(VisionConfig.from_dict(tower.settings)).items():
        assert value == getattr(theirs, key), key


def test_unknown_keys_are_named_in_one_warning(reference, tmp_path):
    clip = layouts.write_clip(tmp_path / "clip", layouts.state_dict(reference), reference)
    config = layouts.original_config(reference, colour="red", wheels=[4] * 40, doors=None)
    folder = layouts.write_folder(tmp_path / "llava", bare(reference), config)
    with pytest.warns(UserWarning, match="does not know") as caught:
        load(folder, vision_tower=clip)
    (message,) = (str(warning.message) for warning in caught)
    assert "colour='red', wheels=[4, 4, 4" in message
    assert len(message) < 300
    assert "doors" not in message
