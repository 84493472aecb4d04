"""The loss and every gradient of training are PyTorch's, on transformers' own tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
tiny = pytest.importorskip("tests.tiny")

from mlx_llava import load  # noqa: E402
from mlx_llava.checkpoint.tensors import PATCH_EMBEDDING, canonical_name  # noqa: E402
from mlx_llava.model.anyres import Frames, num_tiles  # noqa: E402
from mlx_llava.model.linux.adopt import adopt  # noqa: E402
from mlx_llava.model.quantized import plain_weight  # noqa: E402
from mlx_llava.tuner.data import IGNORED, Examples  # noqa: E402
from mlx_llava.tuner.lora import Adapter  # noqa: E402
from mlx_llava.tuner.recipe import TrainingOptions, answer_loss, prepare  # noqa: E402
from mlx_llava.tuner.samples import read_samples  # noqa: E402
from tests.model import test_videos as videos  # noqa: E402

TOLERANCE = 1e-4
LORA = Adapter("base", "lora", rank=3, alpha=5.0, dropout=0.0)
CASES = {case.name: case for case in tiny.CASES}
VIDEOS = {f"{case.name} of videos": case for case in videos.CASES}
#: Of unequal length with two, one and no pictures.
PICTURES = [
    (
        {"image": ["0.png", "1.png"]},
        [
            ("<image>\n<image>\nWhat differs?", "The second dog is small."),
            ("And the first?", "It sleeps."),
        ],
    ),
    ({"image": "2.png"}, [("How many?\n<image>", "five")]),
    ({}, [("Say yes.", "Yes, the sign says STOP."), ("Say no.", "No.")]),
]
#: Videos as LLaVA-Video's and LLaVA-NeXT-Video's samples have them, and one beside a picture.
FILMS = [
    ({"video": "film"}, [("<image>\nWhat moves?", "The dog."), ("And then?", "It sleeps.")]),
    ({"video": ["film"]}, [("How many?\n<video>", "five")]),
    ({"video": "film", "image": "2.png"}, [("Is <image> in <video>?", "No.")]),
]


def write_samples(folder: Path, conversations=PICTURES) -> Path:
    for i, size in enumerate(tiny.SIZES[:3]):
        tiny.picture(*size, seed=i).save(folder / f"{i}.png")
    (folder / "film").mkdir()
    for i in range(4):
        tiny.picture(40, 30, seed=i).save(folder / "film" / f"{i}.png")
    data = [
        {
            "id": i,
            **shown,
            "conversations": [
                {"from": speaker, "value": value}
                for turn in own
                for speaker, value in zip(("human", "gpt"), turn, strict=True)
            ],
        }
        for i, (shown, own) in enumerate(conversations)
    ]
    path = folder / "train.json"
    path.write_text(json.dumps(data))
    return path


def make_batch(folder: Path, processor, conversations=PICTURES):
    path = write_samples(folder, conversations)
    reading = read_samples(path, folder, processor.tokenizer.protect)
    assert not reading.left_out
    batch = Examples(reading.samples, processor, 4096, frames=3).batch(range(3))
    assert batch.input_ids.shape[0] == 3
    assert (np.array(batch.labels) != IGNORED).sum(axis=1).min() > 1
    return batch


def reference(model, batch, config) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and gradients of transformers, in float64, by canonical name."""
    model = model.double()
    pixels = torch.tensor(np.array(batch.pixel_values).transpose(0, 3, 1, 2)).double()
    inputs = {"pixel_values": pixels}
    if batch.image_sizes is not None:
        inputs = of_images(pixels, batch.image_sizes, config)
    ids = torch.tensor(np.array(batch.input_ids)).long()
    mask = torch.zeros_like(ids)
    for row, labels in zip(mask, np.array(batch.labels), strict=True):
        row[: int(np.flatnonzero(labels != IGNORED)[-1]) + 1] = 1
    if config.text_config.sliding_window:
        mask[:] = 1  # a padded row beyond the window is NaN in transformers
    labels = torch.tensor(np.array(batch.labels)).long()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, **inputs).loss
    loss.backward()
    gradients = {
        canonical_name(name): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    gradients = {k: g for name, whole in gradients.items() for k, g in split(name, whole, config)}
    if PATCH_EMBEDDING in gradients:
        gradients[PATCH_EMBEDDING] = gradients[PATCH_EMBEDDING].transpose(0, 2, 3, 1)
    return loss.item(), gradients


def split(name, gradient, config):
    """Of Phi-3's fused layers those of the layers that they are, by row."""
    text = config.text_config
    if "qkv_proj" in name:
        queries, keys = (n * text.dims_per_head for n in (text.num_attention_heads, text.kv_heads))
        parts = np.split(gradient, [queries, queries + keys])
        yield from ((name.replace("qkv", one), g) for one, g in zip("qkv", parts, strict=True))
    elif "gate_up_proj" in name:
        for one, part in zip(("gate", "up"), np.split(gradient, 2), strict=True):
            yield name.replace("gate_up", one), part
    else:
        yield name, gradient


def of_images(pixels, layouts, config):
    """transformers' arguments for the tiles of images and videos."""
    tiles = pixels.split([tiles_of(layout, config) for layout in layouts])
    shown = [*zip(tiles, layouts, strict=True)]
    films = [own for own, layout in shown if isinstance(layout, Frames)]
    images = [(own, layout) for own, layout in shown if not isinstance(layout, Frames)]
    most = max(len(own) for own, _ in images)
    padded = torch.zeros(len(images), most, *pixels.shape[1:]).double()
    for row, (own, _) in zip(padded, images, strict=True):
        row[: len(own)] = own
    sizes = [size or (1, 1) for _, size in images]  # of a tile, no one reads it
    inputs = {"pixel_values": padded, "image_sizes": torch.tensor(sizes)}
    if films:
        inputs["pixel_values_videos"] = torch.stack(films)
    if config.pads_several:  # those of one prompt, if there are any, and then one alone
        whole = [size for _, size in images].count(None)
        inputs["batch_num_images"] = torch.tensor([whole, 1] if whole else [1])
    return inputs


def tiles_of(layout, config) -> int:
    if isinstance(layout, Frames):
        return layout.frames
    return 1 if layout is None else 1 + num_tiles(layout, config)


def ours(model, batch) -> tuple[float, dict[str, np.ndarray]]:
    model.train()
    (loss, count), gradients = nn.value_and_grad(model, answer_loss)(model, batch)
    gradients = tree_map(lambda g: g / count, gradients)
    return (loss / count).item(), {k: np.array(g) for k, g in tree_flatten(gradients)}


def assert_equal(found: dict, expected: dict) -> None:
    for name, gradient in found.items():
        scale = np.abs(expected[name]).max()
        # The keys' biases move nothing - softmax ignores them - and have rounding for gradients.
        assert np.abs(gradient - expected[name]).max() <= TOLERANCE * scale + 1e-7, name


@pytest.mark.parametrize(
    "stage", ["projector", pytest.param("full", marks=pytest.mark.slow), "full and vision"]
)
@pytest.mark.parametrize(
    "name",
    [
        *("vicuna", "gqa", "tied_head", "mistral_window", "qwen2"),
        *("phi3", "qwen2_windows"),
        *("layer_list", "pad", "next", "siglip", "vip", "onevision"),
        *("next_video of videos", "next_stride of videos", "onevision of videos"),
    ],
)
def test_loss_and_gradients_of_a_stage(name, stage, tmp_path):
    films = VIDEOS.get(name)
    theirs = videos.write(films, tmp_path) if films else tiny.save(CASES[name], tmp_path)
    model, processor = load(tmp_path, template="vicuna_v1")
    batch = make_batch(tmp_path, processor, FILMS if films else PICTURES)
    rate = 1e-3 if "vision" in stage else None
    options = TrainingOptions(stage.split()[0], vision_learning_rate=rate)
    prepare(model, options, LORA)
    loss, gradients = ours(model, batch)
    their_loss, their_gradients = reference(theirs, batch, model.config)
    assert abs(loss - their_loss) <= TOLERANCE * their_loss
    assert_equal(gradients, their_gradients)
    trained = {
        name
        for name in their_gradients
        if "projector" in name
        or (stage != "projector" and name.startswith(("language_model", "image_newline")))
        or ("vision" in stage and name.startswith("vision_tower"))
    }
    unread = {name for name in trained if not np.any(their_gradients[name])}
    assert gradients.keys() == trained - unread


@pytest.mark.parametrize("bits", [None, 8])
def test_gradients_of_lora(bits, machine, tmp_path):
    """By the chain rule from the gradient of the merged weight W + scale A B."""
    theirs = tiny.save(
        tiny.Case("wide", text={"hidden_size": 32, "intermediate_size": 64}), tmp_path
    )
    model, processor = load(tmp_path, template="vicuna_v1")
    batch = make_batch(tmp_path, processor)
    if bits:
        nn.quantize(
            model.language_model,
            group_size=32,
            bits=bits,
            class_predicate=lambda path, m: isinstance(m, nn.Linear) and "layers" in path,
        )
        adopt(model)
    prepare(model, TrainingOptions("lora"), LORA)
    weights = dict(theirs.named_parameters())
    layers = {}
    for path, layer in model.named_modules():
        if "lora_b" in layer:
            layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
            layers[path] = layer
            delta = LORA.scale * (layer.lora_a @ layer.lora_b).T
            name = next(n for n in weights if canonical_name(n) == f"{path}.weight")
            merged = np.array(plain_weight(layer.linear) + delta)
            weights[name].data = torch.tensor(merged)
    assert len(layers) == 7 * 3
    loss, gradients = ours(model, batch)
    their_loss, their_gradients = reference(theirs, batch, model.config)
    assert abs(loss - their_loss) <= TOLERANCE * their_loss
    expected = {n: g for n, g in their_gradients.items() if "projector" in n}
    for path, layer in layers.items():
        merged = their_gradients[f"{path}.weight"].T
        expected[f"{path}.lora_a"] = LORA.scale * merged @ np.array(layer.lora_b).T
        expected[f"{path}.lora_b"] = LORA.scale * np.array(layer.lora_a).T @ merged
    assert gradients.keys() == expected.keys()
    assert_equal(gradients, expected)


def test_a_later_token_never_changes_an_earlier_logit(loaded):
    model, processor = loaded
    ids = mx.array([processor.tokenizer.encode("USER: Describe the second image. ASSISTANT: no")])
    logits = model(ids)
    for place in range(1, ids.shape[1]):
        changed = mx.array(ids)
        changed[0, place] = (ids[0, place] + 7) % 300 + 5
        others = model(changed)
        assert mx.array_equal(others[:, :place], logits[:, :place])
        assert not mx.array_equal(others[:, place:], logits[:, place:])


@pytest.mark.parametrize("name", ["gqa", "mistral_window", "next"])
def test_a_padded_batch_has_the_losses_of_its_rows_alone(name, tmp_path):
    tiny.save(CASES[name], tmp_path)
    model, processor = load(tmp_path, template="vicuna_v1")
    samples = read_samples(write_samples(tmp_path), tmp_path, processor.tokenizer.protect).samples
    examples = Examples(samples, processor, 4096)
    model.train()
    together, count = answer_loss(model, examples.batch(range(3)))
    alone = [answer_loss(model, examples.batch([i])) for i in range(3)]
    assert count.item() == sum(n.item() for _, n in alone)
    assert together.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-5)
