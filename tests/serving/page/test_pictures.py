"""Pictures and videos: how they come in, and what the server gets of them."""

from __future__ import annotations

import io
import re
from base64 import b64decode

import pillow_heif
import pytest
from PIL import Image
from playwright.sync_api import expect

from mlx_llava.inputs.image import data_url
from tests.conftest import SHAPES
from tests.films import film
from tests.servers import serving
from tests.serving.page.people import (
    QUESTION,
    add,
    answered,
    ask,
    button,
    give,
    press,
    shown_parts,
)

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 4">'
    '<path d="M0 4 4 0l4 4z" fill="red"/></svg>'
)


def sent(page, question=QUESTION):
    """Asks; the parts that the server gets."""
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, question)
    return shown_parts(asked)


def opened(part):
    url = part["image_url"]["url"]
    return Image.open(io.BytesIO(b64decode(url.partition(",")[2])))


def test_several_pictures_one_taken_back(page):
    add(page, SHAPES, SHAPES)
    press(page, "Remove picture 1")
    parts = sent(page)
    assert answered(page) == ["red"]
    expect(page.get_by_role("article").get_by_role("img")).to_have_count(1)
    assert parts[0]["image_url"]["url"] == data_url(SHAPES.read_bytes())


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_pictures_that_are_pasted_or_dropped(page, way):
    assert give(page, way, [(SHAPES, "image/png")])
    expect(button(page, "Remove picture 1")).to_be_visible()
    ask(page, QUESTION)
    assert answered(page) == ["red"]


def test_what_is_dragged_from_other_pages(page):
    url = "https://example.org/x.png"
    html = f'<img alt="x" src="{url}">'
    assert give(page, "drop", **{"text/uri-list": url, "text/html": html})
    expect(page.get_by_role("alert")).to_contain_text("is on another site")
    html = f'<img src="{data_url(SHAPES.read_bytes())}">'
    assert give(page, "drop", **{"text/uri-list": "about:blank", "text/html": html})
    expect(button(page, "Remove picture 1")).to_be_visible()
    assert not give(page, "drop", **{"text/plain": "words, for the field"})


def test_files_that_are_no_pictures(page, tmp_path):
    (tmp_path / "a.txt").write_text("no picture")
    (tmp_path / "b.png").write_text("no picture")
    page.get_by_label("Add pictures").set_input_files(str(tmp_path / "a.txt"))
    alert = page.get_by_role("alert")
    expect(alert).to_have_text("Only pictures and videos can be added.")
    page.get_by_label("Add pictures").set_input_files([str(tmp_path / "b.png"), str(SHAPES)])
    expect(alert).to_have_text("b.png is broken, or no picture.")
    expect(button(page, "Remove picture 1")).to_be_visible()


def test_formats_that_only_the_browser_reads(page, tmp_path):
    image = Image.open(SHAPES).convert("RGB")
    for name in ("a.bmp", "b.avif"):
        image.save(tmp_path / name)
    (tmp_path / "c.svg").write_text(SVG)
    add(page, *(tmp_path / name for name in ("a.bmp", "b.avif", "c.svg")))
    *pictures, _ = sent(page)
    shown = [opened(part) for part in pictures]
    assert [one.format for one in shown] == ["PNG", "JPEG", "PNG"]
    assert [one.size for one in shown] == [image.size, image.size, (2048, 1024)]
    assert shown[0].convert("RGB").tobytes() == image.tobytes()
    assert shown[2].convert("RGB").getpixel((0, 0)) == (255, 255, 255)  # transparent is white
    answered(page)


def test_formats_that_the_browser_cannot_read(page, tmp_path):
    image = Image.open(SHAPES).convert("RGB")
    pillow_heif.from_pillow(image).save(tmp_path / "a.heic")
    image.save(tmp_path / "b.tiff")
    files = [str(tmp_path / "a.heic"), str(tmp_path / "b.tiff")]
    page.get_by_label("Add pictures").set_input_files(files)
    expect(page.get_by_role("alert")).to_have_text(
        "a.heic: this browser cannot open HEIC. Safari can; or save it as JPEG or PNG first.\n"
        "b.tiff: this browser cannot open TIFF. Please save it as JPEG or PNG first."
    )


def test_large_photographs_are_made_smaller(served, open_page, tmp_path):
    """Three of 12 megapixels in one conversation, on a server that takes 10 of a request."""
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright
    large = Image.open(SHAPES).convert("RGB").resize((4000, 3000))
    large.save(tmp_path / "large.jpg", exif=exif)
    with serving("--max-pixels", "10", engine=served.engine) as strict:
        page = open_page(strict)
        add(page, *[tmp_path / "large.jpg"] * 3)
        *pictures, _ = sent(page)
        assert {(opened(part).format, opened(part).size) for part in pictures} == {
            ("JPEG", (1536, 2048))
        }
        answered(page)
        ask(page, "And now?")
        answered(page, 2)
        page.close()


def test_a_picture_is_enlarged(page):
    ask(page, QUESTION, SHAPES)
    answered(page)
    page.locator(".shown").get_by_role("button", name="Picture 1").click()
    expect(page.get_by_role("dialog").get_by_role("img", name="Picture 1")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_a_video_that_is_chosen(page, tmp_path):
    path = tmp_path / "film.webm"
    path.write_bytes(film("libvpx-vp9", "webm", frames=3))
    add(page, path, SHAPES)
    expect(button(page, "Remove video 1")).to_be_visible()
    expect(button(page, "Remove picture 2")).to_be_visible()
    parts = sent(page)
    assert [part["type"] for part in parts] == ["video_url", "image_url", "text"]
    assert len(answered(page)) == 1
    shown = page.get_by_role("article").get_by_label("Video 1")
    assert shown.evaluate("video => video.error === null")
    page.wait_for_function("() => document.querySelector('.shown video').videoWidth === 64")


@pytest.mark.parametrize("knows_videos", [False, True])
def test_animations_are_videos_to_models_that_know_videos(page, tmp_path, knows_videos):
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue", "green")]
    for name in ("a.gif", "b.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(tmp_path / "c.gif")
    if knows_videos:  # as a server says it of such a model
        told = {"model_info": {"llama.context_length": 1024}, "capabilities": ["vision", "video"]}
        page.route("**/api/show", lambda route: route.fulfill(json=told))
    add(page, *(tmp_path / name for name in ("a.gif", "b.webp", "c.gif")))
    *shown, _ = sent(page)
    kind = "video_url" if knows_videos else "image_url"
    assert [part["type"] for part in shown] == [kind, kind, "image_url"]
    url = shown[0][kind]["url"]
    assert re.match("data:image/gif;base64,", url)
    answered(page)
