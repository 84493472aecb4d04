"""What is said that images take is what they take."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava.generation.memory import request_bytes
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.model.anyres import Frames, num_tiles, num_tokens
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llava import Llava

SIGLIP = {"model_type": "siglip_vision_model", "image_size": 384}
CLIP = {"model_type": "clip_vision_model", "image_size": 336}
SHOWN = {
    "36 tiles of OneVision": ("llava_onevision", SIGLIP, (2304, 2304)),
    "32 frames of OneVision": ("llava_onevision", SIGLIP, Frames(32)),
    "4 tiles of LLaVA 1.6": ("llava_next", CLIP, (672, 672)),
    "32 frames of LLaVA-NeXT-Video": ("llava_next_video", CLIP, Frames(32)),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHOWN)
def test_memory_of_images_is_what_projecting_and_laying_out_takes(name, dtype):
    kind, tower, layout = SHOWN[name]
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vision = {**tower, **sizes, "patch_size": 14, "num_hidden_layers": 2}
    text = {**sizes, "hidden_size": 128, "vocab_size": 32, "num_hidden_layers": 1}
    text |= {"model_type": "llama"}
    config = LlavaConfig.from_dict(
        {"model_type": kind, "vision_config": vision, "text_config": text}
    )
    model = Llava(config)
    model.set_dtype(dtype)
    tiles = layout.frames if isinstance(layout, Frames) else 1 + num_tiles(layout, config)
    features = mx.ones((tiles, config.tokens_per_tile, 32), dtype)
    mx.eval(model.parameters(), features)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.project(features, [layout]))
    taken = mx.get_peak_memory() - before + features.nbytes
    tokens = num_tokens(layout, config)
    inputs = Inputs(
        input_ids=np.zeros((1, tokens), np.int32),
        pixel_values=None,
        image_sizes=(layout,),
        attention_mask=None,
        prompts=("",),
        image_tokens=(tokens,),
        whole_image_tokens=(tokens,),
        image_tiles=(tiles,),
        videos=(),
        prefill="",
        seconds=0,
        image_processor=None,
    )
    parts = request_bytes(config, dtype.size, inputs, 1, prefill_step=512)
    assert 0.9 * taken < parts["pictures"] < 4 * taken  # the device runs ahead, or it does not
