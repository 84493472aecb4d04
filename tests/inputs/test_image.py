"""Every kind of input gives the picture that a person sees, or one clear error."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import struct
import threading
import urllib.parse
import zlib

import numpy as np
import pytest
from PIL import Image

from mlx_llava import load_image
from mlx_llava.inputs.image import decode_data_url
from tests.conftest import PICTURE


@pytest.fixture
def picture() -> Image.Image:
    return Image.open(PICTURE).convert("RGB")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def same(ours: Image.Image, expected: Image.Image) -> bool:
    return ours.mode == "RGB" and np.array_equal(np.asarray(ours), np.asarray(expected))


def test_all_kinds_of_source_give_the_same_picture(picture):
    data = PICTURE.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    percents = "data:image/png," + urllib.parse.quote(data)
    for source in (PICTURE, str(PICTURE), data, io.BytesIO(data), url, percents, picture):
        assert same(load_image(source), picture)
    assert same(load_image(np.asarray(picture)), picture)
    with PICTURE.open("rb") as file:
        assert same(load_image(file), picture)
        assert not file.closed


def test_percents_are_any_bytes():
    content = bytes(range(256)) + b" \t\n=\r\n%41 "
    for safe in ("", "=", "/"):
        assert decode_data_url("data:," + urllib.parse.quote(content, safe=safe)) == content
    assert decode_data_url("DATA:;charset=x,%ff=%4a") == b"\xff=J"


def test_a_ready_image_is_taken_as_it_is(picture):
    assert load_image(load_image(picture)) is load_image(picture)
    clear = Image.new("RGB", (2, 2))
    clear.info["transparency"] = (0, 0, 0)
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)


def test_http_urls_are_fetched(picture):
    handler = functools.partial(QuietHandler, directory=str(PICTURE.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert same(load_image(f"{url}/picture.png"), picture)
        with pytest.raises(ValueError, match="cannot be fetched: HTTP Error 404"):
            load_image(f"{url}/none.png")
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG"])
def test_file_formats(picture, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture, kind, **options)
    assert same(load_image(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_heic(picture):
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(picture).save(buffer, quality=100, chroma=444)
    ours = np.asarray(load_image(buffer.getvalue()), np.int16)
    assert np.abs(ours - np.asarray(picture, np.int16)).mean() < 2


def test_the_first_frame_of_an_animation_is_used(picture):
    other = picture.transpose(Image.Transpose.ROTATE_180)
    data = encoded(picture, "GIF", save_all=True, append_images=[other])
    assert same(load_image(data), Image.open(io.BytesIO(encoded(picture, "GIF"))).convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_files(picture, orientation):
    undo = {  # what a camera did to the pixels before it wrote this orientation
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture.transpose(undo[orientation]) if orientation in undo else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert same(load_image(encoded(stored, "PNG", exif=exif)), picture)


def test_exif_orientation_is_not_applied_to_ready_images(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(encoded(picture, "PNG", exif=exif)))
    assert load_image(opened).size == picture.size


def test_modes_are_converted_as_transformers_does(picture):
    transforms = pytest.importorskip("transformers.image_transforms")
    alpha = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1)))
    rgba = picture.copy()
    rgba.putalpha(alpha)
    palette = picture.quantize(16)
    transparent = palette.copy()
    transparent.info["transparency"] = 3
    images = [
        rgba,
        rgba.convert("LA"),
        picture.convert("L"),
        picture.convert("1"),
        palette,
        transparent,
        picture.convert("CMYK"),
        picture.convert("YCbCr"),
        picture.convert("HSV"),
    ]
    for image in images:
        expected = transforms.convert_to_rgb(image, return_numpy=True)
        assert np.array_equal(np.asarray(load_image(image)), expected), image.mode


def test_half_transparent_red_is_pink_not_red():
    red = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert load_image(red).getpixel((0, 0)) == (255, 127, 127)


def test_greys_of_more_than_8_bits_are_rescaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    sources = (
        buffer.getvalue(),
        ramp,
        Image.fromarray(ramp.astype(np.int32)),
        Image.fromarray((ramp / 65535).astype(np.float32)),
    )
    for source in sources:
        assert np.array_equal(np.asarray(load_image(source))[:, :, 0], expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3), (6, 5, 4)])
def test_arrays_of_every_usual_shape_and_dtype(dtype, shape):
    full = {np.uint8: 255, np.uint16: 65535}.get(dtype, 1)
    array = np.full(shape, full, dtype)
    assert np.array_equal(np.asarray(load_image(array)), np.full((6, 5, 3), 255))


def test_boolean_arrays_are_black_and_white():
    assert load_image(np.eye(3, dtype=bool)).getpixel((1, 1)) == (255, 255, 255)


def png_header(width: int, height: int) -> bytes:
    """The smallest file that claims a size: a signature, IHDR and an empty IDAT."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BROKEN = {
    "text": (b"Dear diary, this is no picture.", "not an image"),
    "nothing": (b"", "not an image"),
    "a program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "not an image",
    ),
    "bomb": (png_header(20_000, 20_000), "400,000,000 pixels; the limit is"),
    "long": (png_header(1, 1_000_001), "1x1000001; the limit of a side is 1,000,000"),
    "large": (png_header(12_000, 12_000), "144,000,000 pixels; the limit is 100,000,000"),
    "no_pixels": (png_header(50, 50), "broken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_dangerous_files_are_refused(name):
    data, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        load_image(data)


def test_truncated_files_are_refused(picture):
    for kind in ("JPEG", "PNG", "GIF", "WEBP"):
        data = encoded(picture, kind)
        with pytest.raises(ValueError, match=r"broken image|not an image"):
            load_image(data[: len(data) // 2])


def test_a_ready_image_whose_file_is_cut_is_refused_too(picture):
    data = encoded(picture, "PNG")
    with pytest.raises(ValueError, match="The image is a broken image"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_the_pixel_limit_holds_for_every_kind_of_source(picture):
    sources = (picture, np.zeros((48, 64, 3), np.uint8), PICTURE)
    for source in sources:
        with pytest.raises(ValueError, match="64x48 = 3,072 pixels; the limit is 3,000"):
            load_image(source, max_pixels=3000)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("none.png", FileNotFoundError, "no image none.png"),
        (".", ValueError, "folder"),
        (3, ValueError, "not int"),
        (None, ValueError, "not NoneType"),
        ("data:image/png,abc", ValueError, "base64"),
        ("data:image/png;base64,@@@", ValueError, "base64"),
        ("ftp://example.org/a.png", FileNotFoundError, "ftp"),
        ("file:///etc/hostname", FileNotFoundError, "file"),
        ("http://127.0.0.1:9/a.png", ValueError, "cannot be fetched"),
        (np.zeros((3, 4, 5)), ValueError, r"\(3, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"\(0, 4, 3\)"),
        (np.full((4, 4), 7.0), ValueError, "0..1"),
        (np.full((4, 4), np.nan), ValueError, "0..1"),
        (np.zeros((4, 4), np.int64), ValueError, "int64"),
    ],
)
def test_bad_sources_are_named(source, error, message):
    with pytest.raises(error, match=message):
        load_image(source)
