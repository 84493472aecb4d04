"""The reference's numbers without the reference: goldens of scripts/make_goldens.py."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_llava import load
from mlx_llava.generation.steps import generate_step
from tests.conftest import GOLDENS, PICTURE

TOLERANCE = 3e-5


@pytest.mark.usefixtures("machine")
def test_golden_numbers_are_reproduced(golden):
    expected, metadata = mx.load(str(golden.with_suffix(".safetensors")), return_metadata=True)
    model, processor = load(golden)
    inputs = processor(metadata["prompt"], Image.open(PICTURE), raw=True)
    assert (inputs.input_ids == expected["input_ids"]).all()
    pixels = expected["pixel_values"].transpose(0, 2, 3, 1)
    assert (inputs.pixel_values == pixels).all()
    depth = model.config.vision_config.num_hidden_layers
    for i, state in enumerate(model.vision_tower(inputs.pixel_values, num_layers=depth)):
        assert mx.abs(state - expected[f"hidden_states.{i}"]).max() < TOLERANCE
    assert mx.abs(model(**inputs) - expected["logits"]).max() < TOLERANCE
    tokens = generate_step(model.embed(**inputs), model.language_model, max_tokens=32)
    assert [token for token, _ in tokens] == expected["tokens"].tolist()


def test_features_of_a_picture_do_not_depend_on_its_neighbours(loaded_next):
    model, processor = loaded_next
    images = [Image.open(PICTURE).resize(size) for size in ((40, 90), (28, 28), (99, 30))]
    prompt = "<image>" * 3
    together = processor(prompt, images, raw=True)
    features = model.encode_images(together.pixel_values, together.image_sizes)
    for image, count, feature in zip(images, together.image_tokens, features, strict=True):
        alone = processor("<image>", image, raw=True)
        own = model.encode_images(alone.pixel_values, alone.image_sizes)[0]
        assert own.shape == feature.shape == (count, model.config.text_config.hidden_size)
        assert mx.abs(own - feature).max() < 1e-5


@pytest.mark.usefixtures("machine")
def test_a_row_of_a_batch_is_the_row_alone(loaded):
    model, processor = loaded
    image = Image.open(PICTURE)
    prompts = ["<image>\nWhat?", "USER: no picture at all here, but many words", "a<image>b<image>"]
    images = [[image], [], [image.rotate(90), image]]
    batch = processor(prompts, images, raw=True)
    logits = model(**batch)
    lengths = batch.attention_mask.sum(axis=1).tolist()
    for row, prompt in enumerate(prompts):
        alone = model(**processor(prompt, images[row], raw=True))
        assert mx.abs(logits[row, -lengths[row] :] - alone[0]).max() < 1e-5
    assert not mx.isnan(logits).any()


def test_right_padding_gives_the_same_logits_as_left(loaded):
    model, _ = loaded
    ids = mx.array([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
    mask = mx.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    right = model(ids, attention_mask=mask)
    alone = model(ids[1:, :3])
    assert mx.abs(right[1, :3] - alone[0]).max() < 1e-5


@pytest.mark.parametrize("length", [3, 20], ids=["few", "many"])
@pytest.mark.parametrize("how", ["plain", "padded", "window", "jumping"])
def test_the_last_token_alone_says_what_it_says_among_all(how, length, machine):
    """And leaves the same keys and values."""
    model, _ = load(GOLDENS / "llava")
    decoder = model.language_model
    if how == "window":
        decoder.config = replace(decoder.config, sliding_window=4)
    results = []
    for last_only in (False, True):
        cache = decoder.make_cache()
        decoder(mx.array([[5, 6], [7, 8]]), cache=cache)
        ids = mx.arange(2 * length).reshape(2, length) + 20
        told = {}
        if how == "padded":
            told["attention_mask"] = mx.array([[1] * (2 + length), [0] + [1] * (1 + length)])
        if how == "jumping":
            told["positions"] = np.arange(2 + length, dtype=np.int32)[None] ** 2
        logits = decoder(ids, cache=cache, last_only=last_only, **told)
        results.append((logits[:, -1:], cache[-1].state))
    assert results[1][0].shape == results[0][0].shape
    assert mx.abs(results[0][0] - results[1][0]).max() < 1e-5
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert mx.abs(ours - theirs).max() < 1e-5


def test_later_tokens_never_change_earlier_logits(loaded):
    model, _ = loaded
    ids = mx.array([[5, 6, 7, 8, 9]])
    changed = mx.array([[5, 6, 7, 100, 101]])
    assert mx.abs(model(ids)[:, :3] - model(changed)[:, :3]).max() < 1e-6


def test_layers_above_the_feature_layer_are_never_run():
    model, processor = load(GOLDENS / "llava")
    inputs = processor("<image>", Image.open(PICTURE), raw=True)
    before = model(**inputs)
    tower = model.vision_tower.vision_model
    tower.encoder.layers[-1] = tower.post_layernorm = None
    assert (model(**inputs) == before).all()
    assert np.isfinite(np.array(before)).all()
