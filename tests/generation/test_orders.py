"""What rank 0 tells crosses as it is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mlx_llava.generation.orders import pack, unpack
from mlx_llava.generation.sampling import Options
from mlx_llava.model.anyres import Frames
from tests.conftest import PICTURE

ARRAYS = ("input_ids", "pixel_values", "attention_mask")


@pytest.mark.parametrize("images", [None, [PICTURE], [PICTURE, Image.new("RGB", (90, 30))]])
def test_inputs_cross_as_they_are(images, both):
    _, processor = both
    inputs = processor("What?", images, prefill="It", image_tokens=None)
    check(inputs, processor)


def test_videos_cross_as_they_are(loaded, tmp_path):
    _, processor = loaded
    for i in range(3):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / f"{i}.png")
    inputs = processor("What?", PICTURE, video=[tmp_path, tmp_path], frames=2)
    assert [video.images for video in inputs.videos] == [range(1, 3), range(3, 5)]
    check(inputs, processor)
    check(replace(inputs, image_sizes=(Frames(3), None)), processor)


def check(inputs, processor):
    crossed = unpack(pack({"do": "insert", "of": 3}, inputs), processor.image_processor)
    found = crossed.pop("inputs")
    assert crossed == {"do": "insert", "of": 3}
    for name, value in vars(inputs).items():
        if name in ARRAYS and value is not None:
            assert getattr(found, name).dtype == value.dtype
            assert np.array_equal(getattr(found, name), value)
        else:
            assert getattr(found, name) == value, name


def test_options_cross_as_they_are(loaded):
    options = Options(
        max_tokens=7, temp=0.5, seed=2**63, stop=["a"], json_schema={"b": 1, "a": [None]}
    )
    order = pack({"do": "insert", "options": vars(options)})
    assert json.loads(order[4:])  # all of it is text
    assert unpack(order, loaded[1].image_processor)["options"] == options
