"""Every layout of the original LLaVA, and of what is made of it, is the same model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llava import LlavaConfig, generate
from mlx_llava.checkpoint.original import translate
from mlx_llava.inputs.templates import guess_template
from tests.conftest import load_as_stored as load
from tests.published.original import V15_7B

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
layouts = pytest.importorskip("tests.layouts")
tiny = pytest.importorskip("tests.tiny")

TOLERANCE = 1e-4  # float32 against float64; transformers in float32 is off by as much


@pytest.fixture(scope="module")
def reference():
    return tiny.make_model(layouts.case())


@pytest.fixture(scope="module")
def reference_next():
    return tiny.make_model(layouts.case(next=True))


def tensors_of(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def same_tensors(model, expected, rows: int = layouts.VOCABULARY) -> None:
    """Bit-equal to the reference, but for the rows of the vocabulary that were added."""
    ours = tensors_of(model)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        theirs = tensor.float().numpy()
        if name.endswith("patch_embedding.weight"):
            theirs = theirs.transpose(0, 2, 3, 1)
        array = np.array(ours[name].astype(mx.float32))
        if "embed_tokens" in name or "lm_head" in name:
            array, theirs = array[:rows], theirs[:rows]
        assert np.array_equal(array, theirs), name


def same_logits(model, processor, reference, count: int = 1, tolerance: float = TOLERANCE) -> None:
    inputs = layouts.inputs_of(processor, count)
    ours = np.array(model(**inputs).astype(mx.float32))[..., : layouts.VOCABULARY]
    theirs = layouts.reference_logits(reference, inputs)
    assert np.abs(ours - theirs).max() < tolerance


@pytest.mark.parametrize(("kind", "shards"), [("zip", 1), ("zip", 2), ("safetensors", 2)])
def test_v15_with_a_tower_from_clip(reference, kind, shards, tmp_path):
    state = layouts.state_dict(reference)
    original = layouts.to_original(state)
    bare = {k: t for k, t in original.items() if "vision_tower" not in k}
    bare["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    clip = layouts.write_clip(tmp_path / "clip", state, reference)
    config = layouts.original_config(reference)
    folder = layouts.write_folder(tmp_path / "llava", bare, config, kind, shards)
    model, processor = load(folder, vision_tower=clip)
    same_tensors(model, state)
    same_logits(model, processor, reference, 2)
    assert processor.image_processor.mode == "pad"
    assert processor.template.name == "vicuna_v1"
    config["mm_vision_tower"] = str(clip)
    (folder / "config.json").write_text(json.dumps(config))
    same_tensors(load(folder)[0], state)


def test_without_a_tower_the_error_says_what_to_give(reference, tmp_path):
    original = layouts.to_original(layouts.state_dict(reference))
    bare = {k: t for k, t in original.items() if "vision_tower" not in k}
    config = layouts.original_config(reference)
    folder = layouts.write_folder(tmp_path / "llava", bare, config)
    with pytest.raises(FileNotFoundError, match=r"clip-vit-large-patch14-336 is needed; give it"):
        load(folder, offline=True)


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_v16_keeps_its_own_tower(reference_next, kind, tmp_path):
    state = layouts.state_dict(reference_next)
    config = layouts.original_config(
        reference_next,
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=str(reference_next.config.image_grid_pinpoints),
    )
    other = {key: tensor + 1 for key, tensor in state.items()}
    clip = layouts.write_clip(tmp_path / "clip", other, reference_next)
    folder = layouts.write_folder(tmp_path / "v16", layouts.to_original(state), config, kind)
    with pytest.warns(UserWarning, match="has a vision tower inside; .*clip are not used"):
        model, processor = load(folder, vision_tower=clip)
    same_tensors(model, state)
    assert processor.image_processor.mode == "anyres"
    assert model.config.anyres_convention == "original"
    same_logits(model, processor, reference_next)


@pytest.mark.parametrize(
    ("token", "rows", "is_added"), [(362, 384, True), (362, 384, False), (7, 360, False)]
)
def test_the_placeholder_of_another_programs_tokenizer(reference, token, rows, is_added, tmp_path):
    """SGLang's tokenizers for original checkpoints have one; 34B's is 64002 of 64000."""
    original = layouts.to_original(layouts.state_dict(reference))
    folder = layouts.write_folder(tmp_path / "llava", original, layouts.original_config(reference))
    if is_added:
        (folder / "added_tokens.json").write_text(json.dumps({"<image>": token}))
    else:
        decoder = {str(token): {"content": "<image>", "special": True}}
        config = {"add_bos_token": True, "added_tokens_decoder": decoder}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model, processor = load(folder)
    assert model.config.image_token_index == token
    assert model.config.text_config.vocab_size == rows
    inputs = layouts.inputs_of(processor)
    ours = np.array(model(**inputs))[..., : layouts.VOCABULARY]
    ids = mx.where(inputs.input_ids == token, layouts.VOCABULARY, inputs.input_ids)
    theirs = layouts.reference_logits(reference, replace(inputs, input_ids=ids))
    assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize("merge_type", ["flat", "spatial"])
def test_other_ways_to_merge_tiles(reference_next, merge_type, tmp_path):
    state = layouts.state_dict(reference_next)
    config = layouts.original_config(
        reference_next,
        image_aspect_ratio="anyres",
        mm_patch_merge_type=merge_type,
        image_grid_pinpoints="(1x1),...,(2x3)",
    )
    folder = layouts.write_folder(tmp_path / "v16", layouts.to_original(state), config)
    model, processor = load(folder)
    assert model.config.image_grid_pinpoints[:4] == ((28, 28), (28, 56), (28, 84), (56, 28))
    inputs = layouts.inputs_of(processor)
    states = model.vision_tower(inputs.pixel_values, max(model.config.feature_layers))
    features = model.multi_modal_projector(model.select(states))
    merged = model.encode_images(inputs.pixel_values, inputs.image_sizes)[0]
    tiles, patches, _ = features.shape
    assert merged.shape[0] == inputs.image_tokens[0] == tiles * patches
    if merge_type == "flat":
        assert mx.array_equal(merged, features.flatten(0, 1))
    else:
        _, down, across = layouts_grid(model, inputs)
        assert mx.array_equal(merged[:patches], features[0])
        # The second row of the grid's first tile follows the first rows of all tiles beside it.
        assert mx.array_equal(merged[patches + 4 * across], features[1][4])
        assert tiles == 1 + down * across


def layouts_grid(model, inputs):
    from mlx_llava.model.anyres import grid_size

    rows, columns = grid_size(inputs.image_sizes[0], model.config)
    return rows, rows // 4, columns // 4


@pytest.mark.parametrize("version", ["v0", "v1", "llama-2"])
def test_v0_and_v1_with_one_linear_layer(version, tmp_path):
    """No reference model has such a projector: transformers does all but its one product."""
    reference = tiny.make_model(layouts.case())
    state = layouts.state_dict(reference)
    original = layouts.to_original(state)
    for key in [key for key in original if "mm_projector" in key]:
        del original[key]
    weight, bias = torch.randn(64, 128) * 0.1, torch.randn(64)
    original |= {"model.mm_projector.weight": weight, "model.mm_projector.bias": bias}
    config = layouts.original_config(reference, mm_use_im_start_end=version != "llama-2")
    for key in ("mm_projector_type", "image_aspect_ratio"):
        del config[key]
    if version == "v1":  # as in the Lightning configs
        config |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    added = {"<im_patch>": 360, "<im_start>": 361, "<im_end>": 362, "[PAD]": 363}
    rows = {"v0": 364, "v1": 363, "llama-2": 360}[version]
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        original[key] = torch.cat([original[key], torch.randn(rows - 360, 64)])
    config["vocab_size"] = rows
    folder = layouts.write_folder(tmp_path / f"llava-{version}", original, config)
    if rows > 360:
        names = dict(list(added.items())[: rows - 360])
        (folder / "added_tokens.json").write_text(json.dumps(names))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "", "eos_token": ""}))
    model, processor = load(folder)
    names = {"v0": "llava_v1", "v1": "llava_v1", "llama-2": "llava_llama_2"}
    assert processor.template.name == names[version]
    assert processor.tokenizer.bos_ids == [1]
    assert 2 in processor.eos_ids
    assert 1 not in processor.eos_ids
    assert processor.image_processor.mode == "crop"
    picture = tiny.picture(40, 30)
    inputs = processor("What is it?", picture)
    ids = inputs.input_ids[0].tolist()
    image = model.config.image_token_index
    first, last = ids.index(image), len(ids) - ids[::-1].index(image)
    if version != "llama-2":
        assert (ids[first - 1], ids[last]) == (361, 362)
    pixels = torch.tensor(np.array(inputs.pixel_values).transpose(0, 3, 1, 2)).double()
    with torch.no_grad():
        reference = reference.double()
        states = reference.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = states[-2][:, 1:] @ weight.T.double() + bias
        table = torch.cat([original["model.embed_tokens.weight"], torch.zeros(32, 64)]).double()
        embeddings = table[torch.tensor(ids)]
        embeddings[first:last] = features[0]
        hidden = reference.model.language_model(inputs_embeds=embeddings[None]).last_hidden_state
        theirs = (hidden @ original["lm_head.weight"].T.double()).numpy()
    ours = np.array(model(**inputs))[..., :rows]
    assert np.abs(ours - theirs).max() < 3 * TOLERANCE


@pytest.mark.parametrize("kind", ["mlp1x_gelu", "mlp3x_gelu", "identity"])
def test_projectors_of_other_depths(kind, tmp_path):
    """The features are the reference tower's, multiplied by hand."""
    vision = {**layouts.VISION, "hidden_size": 64, "num_attention_heads": 1}
    reference = tiny.make_model(
        tiny.Case("p", text=layouts.TEXT, vision=vision, top={"image_token_index": 360})
    )
    original = layouts.to_original(layouts.state_dict(reference))
    original = {k: t for k, t in original.items() if "mm_projector" not in k}
    depth = 0 if kind == "identity" else int(kind[3])
    layers = [(torch.randn(64, 64) * 0.2, torch.randn(64)) for _ in range(depth)]
    for i, (weight, bias) in enumerate(layers):
        path = f"model.mm_projector.{2 * i}"
        original |= {f"{path}.weight": weight, f"{path}.bias": bias}
    config = layouts.original_config(reference, mm_projector_type=kind)
    folder = layouts.write_folder(tmp_path / "x", original, config)
    model, processor = load(folder)
    pixels = layouts.inputs_of(processor).pixel_values
    states = tiny.torch_hidden_states(
        reference, torch.tensor(np.array(pixels).transpose(0, 3, 1, 2))
    )
    features = torch.tensor(states[-2][:, 1:])
    for i, (weight, bias) in enumerate(layers):
        features = torch.nn.functional.gelu(features) if i else features
        features = features @ weight.T + bias
    ours = np.array(model.encode_images(pixels)[0])
    assert np.abs(ours - features[0].numpy()).max() < TOLERANCE


def test_a_delta_is_added_to_its_llama(reference, tmp_path):
    state = {key: tensor.half() for key, tensor in layouts.state_dict(reference).items()}
    target = layouts.to_original(state)
    llama = {
        key: torch.randn_like(tensor) * 0.1 for key, tensor in layouts.tuned_llama(state).items()
    }
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        llama[key] = llama[key][:350]  # the delta's vocabulary is larger
    delta = {}
    for key, tensor in target.items():
        delta[key] = tensor.clone()
        if key in llama:
            delta[key][: len(llama[key])] -= llama[key]
    base = layouts.write_folder(tmp_path / "llama", llama, {"model_type": "llama"}, "zip", 2)
    clip = layouts.write_clip(tmp_path / "clip", layouts.state_dict(reference), reference)
    delta = {key: t for key, t in delta.items() if "vision_tower" not in key}
    config = layouts.original_config(reference, mm_vision_tower=str(clip))
    folder = layouts.write_folder(tmp_path / "delta", delta, config, "zip", 2)
    model, _ = load(folder, base=base)
    expected = {}
    for key, tensor in delta.items():
        expected[key] = tensor.clone()
        if key in llama:
            expected[key][: len(llama[key])] += llama[key]
    ours = tensors_of(model)
    for key in ("layers.1.mlp.up_proj.weight", "norm.weight", "embed_tokens.weight"):
        theirs = expected[f"model.{key}"].float().numpy()
        array = np.array(ours[f"language_model.model.{key}"].astype(mx.float32))[: len(theirs)]
        assert np.array_equal(array, theirs), key

    with pytest.warns(UserWarning, match="delta is called a delta, .* without that LLaMA: --base"):
        load(folder)
    wrong = {key: tensor[..., :32] for key, tensor in llama.items()}
    other = layouts.write_folder(tmp_path / "other", wrong, {"model_type": "llama"})
    with pytest.raises(ValueError, match=r"\(\d+, 64\) in the delta but \(\d+, 32\) in the base"):
        load(folder, base=other)


def lora_folder(folder: Path, reference, config: dict, rslora: bool, kind: str):
    torch.manual_seed(1)
    pairs = {}
    for layer in range(3):
        for name, out, inputs in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 64, 128)):
            path = f"base_model.model.model.layers.{layer}.{name}"
            pairs[f"{path}.lora_A.weight"] = torch.randn(4, inputs)
            pairs[f"{path}.lora_B.weight"] = torch.randn(out, 4)
    folder.mkdir()
    settings = {"r": 4, "lora_alpha": 16, "peft_type": "LORA", "use_rslora": rslora}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "bin":
        torch.save(pairs, folder / "adapter_model.bin")
    else:
        layouts.save_file(pairs, folder / "adapter_model.safetensors")
    trained = {
        f"base_model.model.{key}": torch.nn.Parameter(tensor)
        for key, tensor in layouts.to_original(layouts.state_dict(reference)).items()
        if "mm_projector" in key
    }
    torch.save(trained, folder / "non_lora_trainables.bin")
    return pairs


@pytest.mark.parametrize(("rslora", "kind"), [(False, "bin"), (True, "safetensors")])
def test_a_lora_is_merged_into_its_base_in_float32(reference, rslora, kind, tmp_path):
    state = layouts.state_dict(reference)
    clip = layouts.write_clip(tmp_path / "clip", state, reference)
    vicuna = {key: tensor.half() for key, tensor in layouts.tuned_llama(state).items()}
    base = layouts.write_folder(tmp_path / "vicuna", vicuna, {"model_type": "llama"})
    config = layouts.original_config(reference, mm_vision_tower=str(clip))
    pairs = lora_folder(tmp_path / "lora", reference, config, rslora, kind)
    model, processor = load(tmp_path / "lora", base=base)
    ours = tensors_of(model)
    scale = 16 / (2 if rslora else 4)
    for path in {key.rpartition(".lora_")[0] for key in pairs}:
        name = path.removeprefix("base_model.model.")
        weight = vicuna[f"{name}.weight"].float()
        change = pairs[f"{path}.lora_B.weight"] @ pairs[f"{path}.lora_A.weight"]
        merged = ours[f"language_model.{name}.weight"]
        assert merged.dtype == mx.float16
        error = np.abs(np.array(merged) - (weight + scale * change).half().numpy())
        assert error.max() <= 2e-3 * change.abs().max() * scale
    projector = np.array(ours["multi_modal_projector.linear_2.weight"])
    assert np.array_equal(projector, state["multi_modal_projector.linear_2.weight"].numpy())
    assert generate(model, processor, "hi", max_tokens=2) is not None

    with pytest.raises(ValueError, match="is a LoRA; give the model .* with --base"):
        load(tmp_path / "lora")
    narrow = {key: tensor[..., :32] for key, tensor in vicuna.items()}
    wrong = layouts.write_folder(tmp_path / "wrong", narrow, {"model_type": "llama"})
    with pytest.raises(ValueError, match=r"x \(4, \d+\), but the base's is \(64, 32\)"):
        load(tmp_path / "lora", base=wrong)


def test_a_stand_alone_projector_on_its_base(reference, tmp_path):
    state = layouts.state_dict(reference)
    clip = layouts.write_clip(tmp_path / "clip", state, reference)
    base = layouts.write_folder(
        tmp_path / "vicuna", layouts.tuned_llama(state), {"model_type": "llama"}
    )
    original = layouts.to_original(state)
    projector = {k: t for k, t in original.items() if "mm_projector" in k}
    projector["model.embed_tokens.weight"] = torch.zeros(2, 64)
    folder = tmp_path / "projector"
    folder.mkdir()
    config = layouts.original_config(
        reference, mm_vision_tower=str(clip), tune_mm_mlp_adapter=True, model_type="llava"
    )
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(projector, folder / "mm_projector.bin")
    model, processor = load(folder, base=base)
    same_tensors(model, state)
    same_logits(model, processor, reference)

    tuned = layouts.write_folder(
        tmp_path / "tuned", original, layouts.original_config(reference, mm_vision_tower=str(clip))
    )
    with pytest.warns(UserWarning, match="stage 1"):
        load(folder, base=tuned)
    with pytest.raises(ValueError, match="is a projector; give"):
        load(folder)
    same_tensors(load(folder / "mm_projector.bin", base=base)[0], state)


def test_a_quantised_v0_is_a_decoder_a_projector_and_clip(reference, tmp_path):
    """wojtab/llava-13b-v0-4bit-128g: GPTQ-for-LLaMa's file has the language model alone."""
    from tests.checkpoint.test_gptq import quantised_model

    quantised, tensors = quantised_model("gptq", 4, original=True)
    state = layouts.state_dict(quantised)
    clip = layouts.write_clip(tmp_path / "clip", state, quantised)
    decoder = {k: t for k, t in tensors.items() if "vision_tower" not in k and "mm_" not in k}
    for path in [key.removesuffix(".qweight") for key in decoder if key.endswith(".qweight")]:
        decoder[f"{path}.bias"] = torch.zeros(decoder[f"{path}.scales"].shape[1])
    config = layouts.original_config(quantised, mm_vision_tower=str(clip))
    llama = {k: v for k, v in config.items() if not k.startswith(("mm_", "image_"))}
    llama |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    base = layouts.write_folder(tmp_path / "gptq", decoder, llama, "safetensors")
    folder = tmp_path / "delta"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    projector = {k: t for k, t in layouts.to_original(state).items() if "mm_projector" in k}
    torch.save(projector, folder / "mm_projector.bin")
    model, processor = load(folder / "mm_projector.bin", base=base)
    assert model.language_model.model.layers[0].mlp.up_proj.bits == 4
    inputs = layouts.inputs_of(processor)
    ours = np.array(model(**inputs))[..., : layouts.VOCABULARY]
    theirs = layouts.reference_logits(quantised, inputs)
    assert np.abs(ours - theirs).max() < 2e-4 * np.abs(theirs).max()


def test_parts_that_have_no_place_are_refused(tmp_path):
    tiny.save(layouts.case(), tmp_path / "hf")
    with pytest.raises(ValueError, match="is whole; the base x/y has no place in it"):
        load(tmp_path / "hf", base="x/y")


def test_what_is_no_llava_is_named(reference, tmp_path):
    state = layouts.state_dict(reference)
    clip = layouts.write_clip(tmp_path / "clip", state, reference)
    with pytest.raises(ValueError, match="is a bare CLIP; give it as --vision-tower"):
        load(clip)
    config = layouts.original_config(reference, architectures=["LlavaMPTForCausalLM"])
    mpt = layouts.write_folder(
        tmp_path / "mpt", {"transformer.blocks.0.attn.Wqkv.weight": torch.zeros(3)}, config
    )
    with pytest.raises(ValueError, match="MPT"):
        load(mpt)
    for key, value in (
        ("image_aspect_ratio", "highres"),
        ("mm_resampler_type", "qformer"),
        ("s2", True),
    ):
        config = layouts.original_config(reference, **{key: value})
        folder = layouts.write_folder(tmp_path / key, layouts.to_original(state), config)
        with pytest.raises(ValueError, match=key):
            load(folder)
        shutil.rmtree(folder)


CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP_L |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}

# config.json of liuhaotian/llava-v1.6-mistral-7b, key for key.
V16_MISTRAL = {
    **V15_7B,
    "architectures": ["LlavaMistralForCausalLM"],
    "model_type": "llava_mistral",
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_split_resolution": 224,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_vision_tower_lr": 2e-06,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "left",
    "unfreeze_mm_vision_tower": True,
}


def test_published_configs_are_read():
    config = LlavaConfig.from_dict(translate(V15_7B, CLIP_L, 32000))
    guess = guess_template(config, "anything")
    assert (config.model_type, guess.name) == ("llava", "vicuna_v1")
    assert (config.text_config.kv_heads, config.text_config.rms_norm_eps) == (32, 1e-5)
    assert (config.feature_layers, config.projector_layers) == ((23,), 2)
    config = LlavaConfig.from_dict(translate(V16_MISTRAL, CLIP_L, 32000))
    guess = guess_template(config, "anything")
    assert (config.model_type, guess.name) == ("llava_next", "mistral_instruct")
    assert (config.text_config.model_type, config.text_config.sliding_window) == ("mistral", None)
    assert (config.has_newline, config.anyres_convention) == (True, "original")
