"""Videos in explanations: their frames lie side by side, and every feature has its place there."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mlx_llava import generate
from mlx_llava.analysis.boxes import frame_boxes
from mlx_llava.analysis.pictures import SHEET
from mlx_llava.analysis.trace import trace
from mlx_llava.explain import explain, main, mask_effect
from mlx_llava.inputs.image_processor import ImageProcessor
from mlx_llava.inputs.video import Video
from mlx_llava.model.anyres import Frames, num_tokens
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.layout import lay_out, pool_first
from tests.analysis.test_attribution import coordinates

PATCH = 7
ONEVISION = {"model_type": "llava_onevision", "vision_aspect_ratio": "anyres_max_9"}
POOLED = {
    "averages": (28, {"model_type": "llava_next_video"}),
    "averages of three": (42, {"model_type": "llava_next_video", "spatial_pool_stride": 3}),
    "bilinear": (28, ONEVISION),
    "bilinear, uneven": (35, ONEVISION),
    "bilinear, in lines": (35, {**ONEVISION, "mm_newline_position": "grid"}),
    "largest": (28, {**ONEVISION, "mm_spatial_pool_mode": "max"}),
}


def reader(side: int, settings: dict) -> ImageProcessor:
    siglip = {"model_type": "siglip_vision_model"}
    vision = siglip if settings["model_type"] == "llava_onevision" else {}
    config = LlavaConfig.from_dict(
        {**settings, "vision_config": {"image_size": side, "patch_size": PATCH, **vision}}
    )
    return ImageProcessor(config, "crop", (side, side))


@pytest.mark.parametrize("name", POOLED)
def test_a_pooled_feature_shows_the_part_that_its_box_says(name):
    """Of frames whose colours are their pixels' places, patches' means pooled as features are."""
    side, settings = POOLED[name]
    images = reader(side, settings)
    width, height = side * 3, side * 2
    corners = [(0, 0), (width, 0), (0, height)]
    boxes = frame_boxes(images, [(height, width)] * 3, corners)
    assert boxes.shape == (num_tokens(Frames(3), images.config), 4)
    n = images.config.vision_config.patches_per_side
    tile = np.asarray(images.tiles(coordinates(width, height))[0], np.float32)
    means = tile.reshape(n, PATCH, n, PATCH, 3).mean(axis=(1, 3)).reshape(1, n * n, 3)
    features = pool_first(np_to_mx(np.repeat(means, 3, axis=0)), [Frames(3)], images.config)
    newline = np_to_mx(np.full(3, np.nan)) if images.config.has_newline else None
    (laid,) = lay_out(features, newline, [Frames(3)], images.config)
    placed = ~np.isnan(boxes[:, 0])
    assert (placed == ~np.isnan(np.array(laid)[:, 0])).all()
    boxes, seen = boxes[placed].reshape(3, -1, 4), np.array(laid)[placed].reshape(3, -1, 3)
    for corner, own, colours in zip(
        corners, boxes - np.tile(corners, 2)[:, None], seen, strict=True
    ):
        middle = (own[:, :2] + own[:, 2:]) / 2
        expected = 20 + 210 * (middle - 0.5) / (np.array([width, height]) - 1)
        if settings.get("mm_spatial_pool_mode") != "max":  # which is not the middle's colour
            assert np.abs(colours[:, :2] - expected).max() < 5, corner
        assert own.min(axis=0)[:2] == pytest.approx([0, 0], abs=1e-3)
        assert own.max(axis=0)[2:] == pytest.approx([width, height], abs=1e-3)
        area = (own[:, 2:] - own[:, :2]).prod(axis=1).sum()
        assert area == pytest.approx(width * height, rel=1e-5)  # they touch, and nothing is twice


def np_to_mx(array):
    import mlx.core as mx

    return mx.array(array.astype(np.float32))


def test_frames_lie_row_by_row_and_keep_their_colours(loaded):
    colours = [(40 * i, 255 - 40 * i, 90) for i in range(5)]
    film = Video(tuple(Image.new("RGB", (1600, 900), colour) for colour in colours))
    (picture,) = explain(*loaded, "What moves?", video=film, max_tokens=1).pictures
    assert picture.entries == range(5)
    assert max(picture.image.size) <= SHEET
    sizes = {len({corner[axis] for corner in picture.corners}) for axis in (0, 1)}
    assert sizes == {2, 3}
    for number, colour in enumerate(colours):
        left, top, right, bottom = picture.place(number, np.array([0, 0, 1600, 900]))
        middle = int((left + right) / 2), int((top + bottom) / 2)
        assert picture.image.getpixel(middle) == colour
    placed = picture.boxes[~np.isnan(picture.boxes[:, 0])]
    width, height = picture.image.size
    assert len(placed) == len(picture.boxes) == 5 * 16
    assert (placed[:, [0, 2]].max(), placed[:, [1, 3]].max()) <= (width + 1, height + 1)


def check_masking(model, processor, prompt, images, films):
    """A part of a frame by hand, in one of the films of a prompt that shows images too."""
    seen = explain(model, processor, prompt, images, video=films, max_tokens=4)
    assert (
        seen.answer == generate(model, processor, prompt, images, video=films, max_tokens=4).strip()
    )
    where = next(i for i, one in enumerate(seen.pictures) if len(one.frames) > 1)
    shown = seen.pictures[where]
    assert [len(one) for one in seen.positions] == [len(boxes) for boxes in seen.boxes]
    effect = mask_effect(model, processor, seen, where)
    parts = shown.parts()
    assert len(effect.boxes) == len(parts) == len(effect.drops)
    number, box = parts[-1]
    left, top, right, bottom = box
    frames = [*films[0].frames]
    masked = np.array(frames[number])
    rows, columns = (
        slice(max(0, int(np.floor(start))), int(np.ceil(end)))
        for start, end in ((top, bottom), (left, right))
    )
    masked[rows, columns] = np.median(np.asarray(shown.image), axis=(0, 1)).astype(int)
    frames[number] = Image.fromarray(masked)
    again = processor(prompt, images, video=[Video(tuple(frames)), *films[1:]])
    after = trace(model, again, seen.tokens).logits[seen.trace.queries]
    before = seen.trace.logits[seen.trace.queries]
    tokens = np.arange(len(seen.tokens)), np.array(seen.tokens)

    def logprobs(logits):
        return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))[tokens]

    expected = logprobs(before) - logprobs(after)
    assert np.abs(effect.drops[-1] - expected).max() < 1e-4
    assert np.abs(expected).max() > 1e-3


def drawn(count: int) -> Video:
    return Video(tuple(coordinates(40 + 3 * i, 50 - 2 * i) for i in range(count)))


def test_masking_of_frames_that_are_images(loaded):
    images, films = [coordinates(50, 70)], [drawn(3), drawn(2)]
    check_masking(*loaded, "<video>, <image>, <video>?", images, films)


@pytest.mark.parametrize("name", ["next_mixed", "onevision_mixed"])
def test_masking_of_frames_that_are_pooled(name, tmp_path):
    videos = pytest.importorskip("tests.model.test_videos", reason="the oracle: '.[test]'")
    videos.write(next(case for case in videos.CASES if case.name == name), tmp_path)
    loaded = videos.load(tmp_path)
    check_masking(*loaded, "<video>, <image>?", [coordinates(50, 70)], [drawn(3)])


def test_a_video_inside_a_conversation_is_refused(loaded):
    parts = [{"type": "video", "video": [*drawn(2).frames]}, {"type": "text", "text": "What?"}]
    with pytest.raises(ValueError, match="1 videos and 0 were given as video; give all of them so"):
        explain(*loaded, [{"role": "user", "content": parts}])


def test_the_command_draws_a_video(tmp_path, capsys):
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(drawn(4).frames):
        frame.save(tmp_path / "frames" / f"{i}.png")
    out = tmp_path / "report.html"
    shown = ["--video", str(tmp_path / "frames"), "--frames", "2", "--max-tokens", "1"]
    shown += ["--window", "3"]
    assert main([*shown, "--prompt", "What moves?", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip()
    assert out.read_text(encoding="utf-8").count("data:image/png;base64,") == 2 + 3
