"""Pixels are bit-equal to transformers' Pillow processors; token counts to both conventions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mlx_llava.inputs import image_processor as preprocess
from mlx_llava.inputs.image_processor import ImageProcessor
from mlx_llava.model.config import LlavaConfig

hf = pytest.importorskip("transformers", reason="the oracle: pip install '.[test]'")
tiny = pytest.importorskip("tests.tiny")

# width, height, and the tokens that LLaVA-NeXT's original code and transformers give it.
ANYRES_TOKENS = (
    (1, 1, 1176, 1176),
    (10, 10, 1176, 1176),
    (224, 224, 1176, 1176),
    (336, 336, 1176, 1176),
    (300, 200, 976, 1464),
    (200, 300, 1476, 984),
    (337, 337, 2928, 2928),
    (512, 512, 2928, 2928),
    (672, 672, 2928, 2928),
    (500, 333, 1464, 1464),
    (333, 500, 1476, 1476),
    (640, 480, 2340, 2340),
    (800, 600, 2340, 2340),
    (1024, 768, 2340, 2340),
    (4032, 3024, 2340, 2340),
    (480, 640, 2352, 2352),
    (1024, 899, 2634, 2634),
    (1920, 1080, 1948, 1948),
    (3840, 2160, 1948, 1948),
    (1080, 1920, 1968, 1968),
    (1008, 336, 2328, 2328),
    (336, 1008, 2376, 2376),
    (1344, 336, 1890, 1890),
    (2000, 500, 1890, 1890),
    (1000, 300, 2182, 2182),
    (300, 1000, 2232, 2232),
    (4000, 100, 722, 722),
    (100, 4000, 792, 792),
    (752, 423, 1850, 1948),
    (704, 396, 1850, 1948),
    (352, 748, 1826, 1876),
    (328, 861, 2126, 2176),
)
SIZES = [(width, height) for width, height, _, _ in ANYRES_TOKENS]
CLIP_336 = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


SIGLIP_384 = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}


def config(model_type: str, convention: str = "hf") -> LlavaConfig:
    return LlavaConfig.from_dict({"model_type": model_type, "anyres_convention": convention})


def reference(mode: str, image: Image.Image) -> np.ndarray:
    if mode == "anyres":
        pixels = tiny.LlavaNextImageProcessorPil(**CLIP_336)(image)["pixel_values"][0]
    else:
        processor = tiny.LlavaImageProcessorPil(do_pad=mode == "pad", **CLIP_336)
        pixels = processor(image)["pixel_values"]
    return np.array(pixels).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("mode", ["crop", "pad", "anyres"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_pixels_are_bit_equal(mode, size):
    model_type = "llava_next" if mode == "anyres" else "llava"
    ours = ImageProcessor.from_config(CLIP_336, config(model_type), mode)
    image = tiny.picture(*size)
    assert np.array_equal(ours([image]), reference(mode, image))


def siglip_config() -> LlavaConfig:
    return LlavaConfig.from_dict(
        {
            "model_type": "llava",
            "vision_config": SIGLIP_384,
            "vision_feature_select_strategy": "full",
        }
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"size": {"height": 384, "width": 384}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]}],
    ids=["no file", "a file"],
)
@pytest.mark.parametrize("size", [(640, 480), (17, 900), (384, 384), (1, 1)])
def test_pixels_of_siglip_are_bit_equal(size, settings):
    """The whole image on a square, by SigLIP's mean and std; a row of 384 has 27 patches of 14."""
    kind = {"image_processor_type": "SiglipImageProcessor"} if settings else {}
    ours = ImageProcessor.from_config({**settings, **kind}, siglip_config())
    given = {"size": {"height": 384, "width": 384}, **settings}
    theirs = tiny.SiglipImageProcessorPil(**given)(tiny.picture(*size))["pixel_values"]
    assert np.array_equal(ours([tiny.picture(*size)]), np.array(theirs).transpose(0, 2, 3, 1))
    assert ours.num_tokens(size[::-1]) == 729
    again = ImageProcessor.from_config(ours.to_dict(), siglip_config())
    assert (again, again.to_dict()["image_processor_type"]) == (ours, "SiglipImageProcessor")


@pytest.mark.parametrize(("width", "height", "original", "hugging_face"), ANYRES_TOKENS)
def test_anyres_token_counts(width, height, original, hugging_face):
    for convention, tokens in (("original", original), ("hf", hugging_face)):
        processor = ImageProcessor.from_config(None, config("llava_next", convention))
        assert processor.num_tokens((height, width)) == tokens


def test_token_counts_equal_transformers_on_many_sizes():
    ours = ImageProcessor.from_config(None, config("llava_next"))
    pinpoints = [list(pair) for pair in config("llava_next").image_grid_pinpoints]
    theirs = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        patch_size=14,
        num_additional_image_tokens=0,
        _get_unpadded_features=lambda *args: hf.LlavaNextProcessor._get_unpadded_features(
            theirs, *args
        ),
    )
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 2000, (3000, 2)).tolist():
        expected = hf.LlavaNextProcessor._get_number_of_features(theirs, height, width, 336, 336)
        assert ours.num_tokens((height, width)) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 28, "width": 28}},
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 28, "width": 28}},
        {"size": {"height": 31, "width": 47}, "crop_size": {"height": 28, "width": 28}},
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "resample": 2},
        {
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.5, 0.6, 0.7],
            "rescale_factor": 0.0041,
        },
        {
            "size": {"shortest_edge": 28, "height": None, "longest_edge": None},
            "crop_size": {"height": 28, "width": 28, "shortest_edge": None},
            "image_mean": None,
            "resample": None,
            "do_convert_rgb": None,
            "device": None,
            "data_format": "channels_first",
            "processor_class": "LlavaProcessor",
        },
    ],
    ids=["larger", "smaller", "exact", "bilinear", "values", "nulls"],
)
def test_settings_of_the_processor_file_are_followed(settings):
    case = tiny.Case("settings")
    image = tiny.picture(53, 41)
    ours = ImageProcessor.from_config(settings, LlavaConfig.from_dict(case.config().to_dict()))
    known = {
        key: {side: n for side, n in value.items() if n} if "size" in key else value
        for key, value in settings.items()
        if value is not None
    }
    theirs = tiny.LlavaImageProcessorPil(**known)(image)["pixel_values"]
    assert np.array_equal(ours([image]), np.array(theirs).transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", ["cat.jpeg", "dog.jpeg", "extreme_ironing.jpg", "waterview.jpg"])
@pytest.mark.parametrize("mode", ["crop", "pad", "anyres"])
def test_photographs_are_bit_equal(name, mode):
    from transformers.image_utils import load_image as reference_load

    from mlx_llava import load_image
    from tests.conftest import shared_data

    path = shared_data(f"images/{name}")
    model_type = "llava_next" if mode == "anyres" else "llava"
    ours = ImageProcessor.from_config(CLIP_336, config(model_type), mode)
    theirs = reference(mode, reference_load(str(path)))
    assert np.array_equal(ours([load_image(path)]), theirs)


def test_a_lone_tile_of_llava_next_ends_with_a_newline():
    processor = ImageProcessor.from_config(None, config("llava_next"), "pad")
    assert processor.num_tokens((300, 200)) == 577
    assert processor([Image.new("RGB", (200, 300))]).shape == (1, 336, 336, 3)


@pytest.mark.parametrize(
    ("settings", "model_type", "mode", "message"),
    [
        ({"do_normalize": False}, "llava", None, "do_normalize"),
        ({"crop_size": 224}, "llava", None, "224"),
        ({"size": {"longest_edge": 336}}, "llava", None, "longest_edge"),
        ({}, "llava", "anyres", "llava_next"),
        ({}, "llava", "stretch", "stretch"),
        ({"image_grid_pinpoints": [[336, 336]]}, "llava_next", None, "differ"),
        ({"size": {"shortest_edge": 300}}, "llava_next", None, "300"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(settings, model_type, mode, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor.from_config(settings, config(model_type), mode)


@pytest.mark.parametrize("largest", [1, 3000, 1 << 18])
@pytest.mark.parametrize("size", [(2500, 300), (300, 2500), (1999, 1), (301, 300), (90, 77)])
def test_squares_made_in_strips_are_bit_equal(size, largest, monkeypatch):
    """Also where a strip is one row of a picture, or ends in its midst."""
    monkeypatch.setattr(preprocess, "LARGEST_SQUARE", largest)
    ours = ImageProcessor.from_config(CLIP_336, config("llava"), "pad")
    image = tiny.picture(*size)
    assert np.array_equal(ours([image]), reference("pad", image))


def test_a_panorama_of_59_megapixels_is_padded(monkeypatch):
    """Its square has 441, of which no more than 17 are made at a time."""
    made = []
    new = Image.new
    monkeypatch.setattr(Image, "new", lambda *args: made.append(args[1]) or new(*args))
    ours = ImageProcessor.from_config(CLIP_336, config("llava"), "pad")
    panorama = new("RGB", (21_000, 2800), "red")
    made.clear()
    (tile,) = ours.tiles(panorama)
    assert max(width * height for width, height in made) <= preprocess.LARGEST_SQUARE
    colours = {(0, 0): (122, 116, 104), (168, 168): (255, 0, 0), (335, 335): (122, 116, 104)}
    assert {place: tile.getpixel(place) for place in colours} == colours


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_a_thread_of_pixels_does_not_blow_up_memory(mode):
    processor = ImageProcessor.from_config(None, config("llava"), mode)
    with pytest.raises(ValueError, match="pixels; the limit is"):
        processor([Image.new("RGB", (1, 90_000_000))])
