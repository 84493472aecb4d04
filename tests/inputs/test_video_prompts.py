"""Videos in prompts; a model that knows none sees their frames as images."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("av", reason="videos: pip install '.[video]'")

from mlx_llava import generate, stream_generate
from mlx_llava.generate import main
from mlx_llava.generation.jobs import batch_generate
from mlx_llava.inputs.video import load_video
from tests.conftest import GOLDENS, PICTURE
from tests.films import film

FILM = film(frames=9)
FRAMES = list(load_video(FILM, 3).frames)


def assert_same(ours, theirs) -> None:
    assert ours.prompts == theirs.prompts
    assert np.array_equal(ours.input_ids, theirs.input_ids)
    assert np.array_equal(ours.pixel_values, theirs.pixel_values)
    assert ours.image_sizes == theirs.image_sizes


def test_frames_are_images_to_a_model_that_knows_no_video(both):
    _, processor = both
    inputs = processor("What moves?", video=FILM, frames=3)
    assert_same(inputs, processor("What moves?", FRAMES))
    tokens = inputs.image_tokens[0]
    assert inputs.videos == ((3, tokens, range(3)),)
    assert processor("What moves?", video=FILM).videos == ((8, tokens, range(8)),)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "video", "video": FILM}],
        [{"type": "video", "video": FRAMES}],
        [{"type": "video_url", "video_url": {"url": FILM}}],
        [{"type": "video_url", "video_url": FILM}],
    ],
)
def test_a_video_is_a_part_of_a_message(content, loaded):
    _, processor = loaded
    words = {"type": "text", "text": "What moves?"}
    conversation = [{"role": "user", "content": [*content, words]}]
    assert_same(processor(conversation, frames=3), processor("What moves?", FRAMES))


def test_marks_and_parts_take_the_next_video_and_the_next_image(loaded):
    _, processor = loaded
    marked = "First <video>, then <image>."
    expected = processor("First " + "<image>" * 3 + ", then <image>.", [*FRAMES, PICTURE])
    assert_same(processor(marked, PICTURE, video=FILM, frames=3), expected)
    parts = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "Q"}]
    conversation = [{"role": "user", "content": parts}]
    expected = processor("Q", [*FRAMES, PICTURE])
    assert_same(processor(conversation, PICTURE, video=FILM, frames=3), expected)
    # Without a mark, images come first.
    expected = processor("Q", [PICTURE, *FRAMES])
    assert_same(processor("Q", PICTURE, video=FILM, frames=3), expected)


def test_the_mark_of_a_video_is_text_where_there_is_none(loaded):
    _, processor = loaded
    assert "<video> is a tag" in processor("<video> is a tag", PICTURE).prompts[0]


def test_raw_prompts_mark_each_frame(loaded):
    _, processor = loaded
    raw = "USER: <image><image><image>\nQ ASSISTANT:"
    assert_same(processor(raw, video=FILM, frames=3, raw=True), processor(raw, FRAMES, raw=True))


def test_a_batch_has_videos_row_by_row(loaded):
    model, processor = loaded
    rows = processor(["Q", "What moves?"], [PICTURE, None], video=[None, [FILM]], frames=3)
    assert_same(rows, processor(["Q", "What moves?"], [PICTURE, FRAMES]))
    assert rows.videos == ((3, 16, range(1, 4)),)
    with pytest.raises(ValueError, match="2 prompts but images for 1"):
        processor(["Q", "R"], video=[FILM])
    options = {"max_tokens": 6}
    alone = generate(model, processor, "What moves?", video=FILM, frames=3, **options)
    both = batch_generate(model, processor, ["Q", "What moves?"], [PICTURE, FRAMES], **options)
    assert both[1] == alone


def test_an_answer_says_its_frames(loaded):
    model, processor = loaded
    *_, last = stream_generate(model, processor, "Q", video=FILM, frames=3, max_tokens=2)
    assert last.figures()["videos"] == [{"frames": 3, "frame_tokens": 16}]


def test_a_video_that_is_too_long_says_how_many_frames_fit(loaded):
    model, processor = loaded
    context = processor.context_length
    with pytest.raises(ValueError, match=rf"context is {context}; use --frames (\d+), ") as error:
        generate(model, processor, "Q", video=FILM, frames=99)
    fitting = int(str(error.value).partition("--frames ")[2].partition(",")[0])
    assert fitting > 1
    assert generate(model, processor, "Q", video=FILM, frames=fitting, max_tokens=1) is not None


def test_the_command_shows_videos(tmp_path, capsys):
    path = tmp_path / "film.mp4"
    path.write_bytes(FILM)
    shown = ["--video", str(path), "--frames", "3", "--max-tokens", "4"]
    model = ["--model", str(GOLDENS / "llava")]
    assert main([*model, *shown, "--image", str(PICTURE), "--prompt", "Q", "--show-prompt"]) == 0
    out, err = capsys.readouterr()
    assert err.count("<image x 16>") == 4
    assert "images: 1 | video: 3 frames, 16 tokens each, 64 tokens\n" in err
    lines = tmp_path / "prompts.jsonl"
    asked = {"prompt": "Q", "images": [str(PICTURE)], "videos": [str(path)]}
    lines.write_text(json.dumps(asked) + "\n")
    options = ["--frames", "3", "--max-tokens", "4"]
    assert main([*model, *options, "--prompts-file", str(lines)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"].strip() == out.strip()
    assert record["videos"] == [{"frames": 3, "frame_tokens": 16}]
    assert main([*model, "--video", str(path), "--prompts-file", str(lines)]) == 2
    assert "does not go with --video" in capsys.readouterr().err
