"""Videos of requests are those of `generate`, and strangers' are bounded."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

pytest.importorskip("av", reason="videos: pip install '.[video]'")

from mlx_llava import generate
from mlx_llava.inputs.image import data_url, png
from tests.films import drawn, film
from tests.servers import serving

QUESTION = "What colour is the square?"
FILM = film(frames=9)


def message(*urls, kind="video_url"):
    shown = [{"type": kind, kind: {"url": url}} for url in urls]
    return {"role": "user", "content": [*shown, {"type": "text", "text": QUESTION}]}


def url_of(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def said(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def refused(reply) -> str:
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]["message"]


def test_answers_are_those_of_generate(served, tiny):
    for frames in (1, 2, 3):
        expected = generate(*tiny, QUESTION, video=FILM, frames=frames, max_tokens=8)
        reply = served.post(messages=[message(url_of(FILM))], frames=frames, max_tokens=8)
        assert said(reply) == expected
    again = served.post(messages=[message(url_of(FILM))], frames=3, max_tokens=8)
    assert said(again) == expected
    usage = again.json()["usage"]  # known by its pixels
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_images_and_videos_stay_in_their_order(served, tiny):
    image = Image.fromarray(drawn(3))
    parts = [
        {"type": "video_url", "video_url": url_of(FILM)},
        {"type": "image_url", "image_url": {"url": data_url(png(image))}},
        {"type": "text", "text": QUESTION},
    ]
    reply = served.post(messages=[{"role": "user", "content": parts}], frames=2, max_tokens=8)
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": FILM},
                {"type": "image", "image": image},
                parts[2],
            ],
        }
    ]
    assert said(reply) == generate(*tiny, conversation, frames=2, max_tokens=8)


def test_animations_and_local_files(tiny, tmp_path, served):
    images = [Image.fromarray(drawn(i)) for i in range(4)]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:])
    expected = generate(*tiny, QUESTION, video=file.getvalue(), frames=2, max_tokens=8)
    gif = message(url_of(file.getvalue(), "image/gif"))
    assert said(served.post(messages=[gif], frames=2, max_tokens=8)) == expected
    (tmp_path / "film.gif").write_bytes(file.getvalue())
    with serving("--image-root", str(tmp_path), engine=served.engine) as local:
        here = message("film.gif")
        assert said(local.post(messages=[here], frames=2, max_tokens=8)) == expected


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (film("libx264", "mpegts", frames=2), "is not a video (mov, matroska, GIF, WebP)"),
        (film("mpeg4", "mp4", frames=2), "is encoded as mpeg4"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "is not a video"),
        (FILM[:200], "is a broken video"),
        (png(Image.new("RGB", (8, 8))), "is not an image (GIF, WEBP)"),
    ],
    ids=("container", "codec", "playlist", "cut", "image"),
)
def test_what_strangers_send_is_no_more_than_phones_film(served, content, why):
    assert why in refused(served.post(messages=[message(url_of(content))]))


def test_films_elsewhere_and_here_are_not_read_unless_they_may_be(served):
    assert "Remote images are not allowed" in refused(
        served.post(messages=[message("http://127.0.0.1:1/a.mp4")])
    )
    assert "Local files are not allowed" in refused(served.post(messages=[message("/a.mp4")]))


def test_pixels_of_all_frames_count(served):
    large = film(frames=9, size=(1920, 1080))
    with serving("--max-pixels", "20", engine=served.engine) as small:
        assert said(small.post(messages=[message(url_of(large))], frames=9, max_tokens=1))
        reply = small.post(messages=[message(url_of(large))], frames=10)
        assert "10 have 20,736,000 pixels, and the limit is 20,000,000" in refused(reply)
        two = message(url_of(large), url_of(large))
        assert "The first 2 pictures have 37,324,800 pixels" in refused(
            small.post(messages=[two], frames=9)
        )


@pytest.mark.parametrize("frames", [0, 65, "many"])
def test_the_number_of_frames_is_bounded(served, frames):
    reply = served.post(messages=[message(url_of(FILM))], frames=frames)
    assert refused(reply).startswith("frames: ")
