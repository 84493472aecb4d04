"""Files as cameras, editors and strangers write them: a picture as one sees it, or one line."""

from __future__ import annotations

import io
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mlx_llava import load_image
from mlx_llava.inputs import image_files
from mlx_llava.inputs.image_files import orientation
from tests.conftest import PICTURE, shared_data

TURNED = Image.Transpose.ROTATE_270  # what orientation 6 asks for
BYTE, ASCII, SHORT, LONG, RATIONAL, SBYTE, UNDEFINED, SSHORT, SLONG = range(1, 10)
SRATIONAL, FLOAT, DOUBLE = range(10, 13)


@pytest.fixture
def picture() -> Image.Image:
    return Image.open(PICTURE).convert("RGB")


def encoded(image, kind, **options) -> bytes:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {kind}")
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def same(ours, expected) -> bool:
    return ours.mode == "RGB" and np.array_equal(np.asarray(ours), np.asarray(expected))


def plain(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def tiff(entries, order="<", start=b"") -> bytes:
    """A directory of tags (tag, type, count, the bytes of the values), as TIFF and EXIF have it."""
    head = struct.pack(f"{order}2sHL", b"II" if order == "<" else b"MM", 42, 8 + len(start))
    values = 8 + len(start) + 2 + 12 * len(entries) + 4
    records, after = struct.pack(f"{order}H", len(entries)), b""
    for tag, kind, count, content in sorted(entries):
        if len(content) > 4:
            after, content = after + content, struct.pack(f"{order}L", values + len(after))
        records += struct.pack(f"{order}HHL", tag, kind, count) + content.ljust(4, b"\0")
    return head + start + records + bytes(4) + after


SIX = (SHORT, 1, struct.pack("<H", 6))


def exif_of(*entries, orientation=SIX) -> bytes:
    return tiff([(274, *orientation), *entries])


#: Each stands in photographs that people have.
WRONG = {
    "XResolution as text": (282, ASCII, 3, b"72\0"),
    "XResolution as NaN": (282, FLOAT, 1, struct.pack("<f", float("nan"))),
    "XResolution negative": (282, SRATIONAL, 1, struct.pack("<ll", -72, 1)),
    "XResolution over 0": (282, RATIONAL, 1, struct.pack("<LL", 72, 0)),
    "ImageWidth negative": (256, SLONG, 1, struct.pack("<l", -1)),
    "ImageWidth as a rational": (256, RATIONAL, 1, struct.pack("<LL", 64, 1)),
    "Make as a float": (271, FLOAT, 1, struct.pack("<f", 1.5)),
    "DateTime as a rational": (306, RATIONAL, 1, struct.pack("<LL", 1, 3)),
    "ResolutionUnit as a double": (296, DOUBLE, 1, struct.pack("<d", 2)),
    "YCbCrPositioning as text": (531, ASCII, 6, b"right\0"),
    "a directory nowhere": (34665, LONG, 1, struct.pack("<L", 0xFFFFFFF0)),
    "a type that is none": (37500, 99, 1000, b"\xff\xff\xff\xff"),
    "values beyond the end": (315, ASCII, 0xFFFFFFFF, b"\0\1\2\3"),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_in_exif_do_not_keep_a_picture_from_being_turned(picture, name, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture, kind, **options)
    marked = encoded(picture, kind, exif=b"Exif\0\0" + exif_of(WRONG[name]), **options)
    assert same(load_image(marked), plain(data).transpose(TURNED))


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_wrong_values_do_not_hurt_where_the_file_itself_says_how_it_was_held(picture, kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = exif_of((282, SRATIONAL, 1, struct.pack("<ll", 72, 1)))
    good = encoded(picture, kind, exif=b"Exif\0\0" + exif, quality=95)
    bad = good.replace(struct.pack("<ll", 72, 1), struct.pack("<ll", -1, 0))
    bad = bad.replace(struct.pack("<HHL", 282, RATIONAL, 1), struct.pack("<HHL", 282, SRATIONAL, 1))
    assert bad != good
    assert load_image(good).size == (48, 64)
    assert same(load_image(bad), load_image(good))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", [None, *WRONG])
def test_tiff_files_are_turned_whatever_else_they_say(picture, name, order):
    """Pillow turns these itself while it decodes, and stumbles over what it rewrites."""
    pixels = picture.tobytes()
    shorts = {256: 64, 257: 48, 259: 1, 262: 2, 274: 6, 277: 3, 278: 48}
    entries = [(tag, SHORT, 1, struct.pack(f"{order}H", value)) for tag, value in shorts.items()]
    entries += [
        (258, SHORT, 3, struct.pack(f"{order}3H", 8, 8, 8)),
        (273, LONG, 1, struct.pack(f"{order}L", 8)),
        (279, LONG, 1, struct.pack(f"{order}L", len(pixels))),
    ]
    if name is not None and WRONG[name][0] != 256:
        entries.append(WRONG[name])
    assert same(load_image(tiff(entries, order, pixels)), picture.transpose(TURNED))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ((SHORT, 1, struct.pack("<H", 6)), 6),
        ((SHORT, 0, struct.pack("<H", 6)), 6),
        ((SHORT, 3, struct.pack("<3H", 6, 1, 1)), 6),
        ((BYTE, 1, b"\6"), 6),
        ((SBYTE, 1, b"\6"), 6),
        ((UNDEFINED, 1, b"\6"), 6),
        ((LONG, 1, struct.pack("<L", 6)), 6),
        ((SSHORT, 1, struct.pack("<h", 6)), 6),
        ((SLONG, 1, struct.pack("<l", 6)), 6),
        ((ASCII, 2, b"6\0"), 6),
        ((RATIONAL, 1, struct.pack("<LL", 12, 2)), 6),
        ((SRATIONAL, 1, struct.pack("<ll", -6, -1)), 6),
        ((FLOAT, 1, struct.pack("<f", 6)), 6),
        ((DOUBLE, 1, struct.pack("<d", 6)), 6),
        ((SHORT, 1, struct.pack("<H", 0)), 1),
        ((SHORT, 1, struct.pack("<H", 9)), 1),
        ((SLONG, 1, struct.pack("<l", -6)), 1),
        ((ASCII, 4, b"top\0"), 1),
        ((ASCII, 5, b"\xb2\xb2\xb2\xb2\0"), 1),
        ((RATIONAL, 1, struct.pack("<LL", 6, 0)), 1),
        ((FLOAT, 1, struct.pack("<f", float("nan"))), 1),
        ((FLOAT, 1, struct.pack("<f", 6.5)), 1),
        ((DOUBLE, 1, struct.pack("<L", 0xFFFFFFFF)), 1),
        ((99, 1, b"\6"), 6),
    ],
)
def test_the_orientation_is_read_whatever_type_it_has(stored, expected):
    assert orientation(exif_of(orientation=stored)) == expected


@pytest.mark.parametrize("exif", [b"", b"II", b"Exif\0\0", exif_of()[:12], b"MM" + bytes(40)])
def test_exif_that_ends_early_says_nothing(exif):
    assert orientation(exif) == 1


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def test_xmp_turns_a_picture_where_exif_does_not(picture):
    for kind in ("JPEG", "WEBP"):
        assert load_image(encoded(picture, kind, xmp=XMP)).size == (48, 64)
    for compressed in (False, True):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=compressed)
        assert load_image(encoded(picture, "PNG", pnginfo=info)).size == (48, 64)
    assert orientation(exif_of(orientation=(SHORT, 1, struct.pack("<H", 1))), XMP) == 1


def test_exif_that_imagemagick_wrote_as_text_turns_a_png(picture):
    info = PngImagePlugin.PngInfo()
    profile = b"Exif\0\0" + exif_of()
    text = f"\nexif\n{len(profile):8}\n{profile.hex()}\n"
    info.add_text("Raw profile type exif", text, zip=True)
    assert same(load_image(encoded(picture, "PNG", pnginfo=info)), picture.transpose(TURNED))


def png_with(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks after its IHDR."""
    added = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return data[:33] + added + data[33:]


@pytest.mark.parametrize(
    "chunk",
    [
        (b"iCCP", b"icc\0\0" + zlib.compress(bytes(3_000_000))),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"a" * 3_000_000)),
        (b"tEXt", b"Comment\0" + b"a" * 3_000_000),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"a" * 3_000_000)),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"a" * 3_000_000)),
        (b"zTXt", b"Raw profile type exif\0\0no zlib"),
        (b"iCCP", b"icc\0\0no zlib"),
        (b"acTL", b"\xff"),
        (b"tIME", b""),
    ],
    ids=lambda chunk: f"{chunk[0].decode()}-{len(chunk[1])}",
)
def test_metadata_of_a_png_is_left_aside_whatever_its_size(picture, chunk):
    data = encoded(picture, "PNG")
    assert same(load_image(png_with(data, chunk)), picture)
    assert len(image_files.essence(png_with(data, chunk), "PNG", 10_000).content) == len(data)


def test_what_is_left_aside_changes_no_pixel(picture):
    alpha = picture.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(picture.size))
    bits = picture.convert("1")
    files = [
        encoded(picture, "JPEG", progressive=True),
        encoded(picture, "JPEG", subsampling=0, comment=b"x" * 60_000, icc_profile=bytes(200_000)),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture.convert("L"), "JPEG", restart_marker_blocks=1),
        encoded(picture.quantize(9), "PNG"),
        encoded(bits, "PNG"),
        encoded(picture, "GIF", comment=b"y" * 1000, save_all=True, append_images=[alpha]),
        encoded(picture, "TIFF", big_tiff=True),
        encoded(picture.convert("CMYK"), "TIFF"),
        encoded(picture.convert("LAB"), "TIFF"),
        encoded(picture.quantize(9), "TIFF"),
        encoded(picture, "TIFF", save_all=True, append_images=[alpha]),
        encoded(bits, "TIFF", compression="group4"),
        *(
            encoded(picture, "TIFF", compression=name)
            for name in ("jpeg", "tiff_lzw", "tiff_adobe_deflate", "packbits")
        ),
    ]
    for data in files:
        assert same(load_image(data), plain(data))
    for kind in ("PNG", "TIFF", "WEBP"):
        data = encoded(alpha, kind, **({"lossless": True} if kind == "WEBP" else {}))
        assert same(load_image(data), load_image(alpha))


def test_avif_is_read_where_pillow_reads_it(picture, monkeypatch):
    data = encoded(picture, "AVIF")
    assert same(load_image(data), plain(data))
    monkeypatch.delitem(Image.OPEN, "AVIF")
    with pytest.raises(ValueError, match=r"is AVIF: pip install -U pillow to read it"):
        load_image(data)


def scan_bomb(picture: Image.Image, scans: int) -> bytes:
    """A JPEG whose last scan is there many times."""
    data = encoded(picture, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def flood(picture: Image.Image, kind: str) -> bytes:
    """A file of a great many small parts."""
    if kind == "TIFF":
        return tiff([(40_000 + i, SHORT, 1, b"\1\0") for i in range(5000)])
    data = encoded(picture, kind)
    if kind == "JPEG":
        return data[:2] + b"\xff\xfe\0\2" * 5000 + data[2:]
    if kind == "PNG":
        return png_with(data, *[(b"tEXt", b"")] * 101_000)
    start = 13 + (3 << (data[10] & 7) + 1)
    return data[:start] + b"!\xfe\1a\0" * 60_000 + data[start:]


def test_what_would_take_a_decoder_long_is_refused_before(picture):
    few = image_files.MAX_SCANS - 10  # Pillow's own have 10
    assert same(load_image(scan_bomb(picture, few)), plain(scan_bomb(picture, few)))
    for scans in (few + 20, 1000):
        with pytest.raises(ValueError, match="more than 64 JPEG scans"):
            load_image(scan_bomb(picture, scans))
    for kind, message in {
        "JPEG": "more than 4,096 JPEG segments",
        "PNG": "more than 100,000 PNG chunks",
        "GIF": "more than 100,000 GIF blocks",
        "TIFF": "5,000 TIFF tags; the limit is 4,096",
    }.items():
        with pytest.raises(ValueError, match=f"^The image .* has {message}"):
            load_image(flood(picture, kind))


def test_scans_are_found_wherever_libjpeg_finds_them(picture):
    """Fill bytes, restarts and rubbish between them hide none."""
    data = encoded(picture, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    for hidden in (b"\xff" * 9, b"\xff\xd3", b"\xff\xff\xd9"[:2], b"\xff\1", b"\0\0\xff\0"):
        bomb = data[:last] + (hidden + data[last:-2]) * 80 + data[-2:]
        with pytest.raises(ValueError, match="more than 64 JPEG scans"):
            load_image(bomb)
    thumbnail = b"Exif\0\0" + scan_bomb(picture, 100)
    data = encoded(picture, "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    assert same(load_image(data[:2] + segment + data[2:]), plain(data))
    assert same(load_image(data + scan_bomb(picture, 100)), plain(data))


def test_a_tiff_of_one_vast_tile_is_refused(picture):
    shorts = {256: 64, 257: 48, 259: 1, 262: 1, 277: 1, 322: 65000, 323: 65000}
    entries = [(tag, SHORT, 1, struct.pack("<H", value)) for tag, value in shorts.items()]
    with pytest.raises(ValueError, match="tiles of 65000x65000"):
        load_image(tiff(entries))


def test_a_tiff_that_pillow_reads_wrongly_is_refused(picture):
    """Of 16 bits and uncompressed, with a plane for each colour, it takes halves for values."""
    values = {256: 64, 257: 48, 259: 1, 262: 2, 277: 3, 278: 48, 284: 2}
    entries = [(tag, SHORT, 1, struct.pack("<H", value)) for tag, value in values.items()]
    entries.append((258, SHORT, 3, struct.pack("<3H", 16, 16, 16)))
    entries.append((273, 4, 3, struct.pack("<3L", *(8 + i * 64 * 48 * 2 for i in range(3)))))
    with pytest.raises(ValueError, match="colours of 16 bits in planes"):
        load_image(tiff(entries, start=bytes(64 * 48 * 2 * 3)))
    compressed = [entry for entry in entries if entry[0] not in (259, 273, 278)]
    planes = [zlib.compress(bytes(64 * 48 * 2))] * 3
    places = (8 + i * len(planes[0]) for i in range(3))
    compressed.append((259, SHORT, 1, struct.pack("<H", 8)))
    compressed.append((273, 4, 3, struct.pack("<3L", *places)))
    compressed.append((279, 4, 3, struct.pack("<3L", *map(len, planes))))
    compressed.append((278, SHORT, 1, struct.pack("<H", 48)))
    assert load_image(tiff(compressed, start=b"".join(planes))).getextrema() == ((0, 0),) * 3


OTHERS = {
    "page.jpg": (b"<!DOCTYPE html><html><body>403</body></html>", "a web page"),
    "page2.png": (b"\n  <HTML lang=en>", "a web page"),
    "lfs.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "git lfs pull"),
    "drawing.png": (b"<?xml version='1.0'?>\n<!-- a -->\n<svg width='9'/>", "SVG"),
    "paper.jpg": (b"%PDF-1.7\n", "PDF"),
    "empty.jpg": (b"", "empty"),
    "clip.avif": (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + bytes(99), "not an image"),
    "text.jpg": (b"P6 is a place", "broken image"),
    "a\nb.png": (b"GIF89a", "broken image"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_often_found_in_the_place_of_a_picture_is_named(tmp_path, name):
    content, message = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_image(tmp_path / name)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/null", "/dev/zero"):
        with pytest.raises(ValueError, match="a pipe, a socket or a device"):
            load_image(path)
    with pytest.raises(ValueError, match="folder"):
        load_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="no image ~nobody-of-that-name"):
        load_image("~nobody-of-that-name/a.png")
    with pytest.raises(OSError):  # noqa: PT011 - in the system's words
        load_image("a" * 5000)
    with pytest.raises(ValueError, match="mode 'rb'"):
        load_image(io.StringIO("GIF89a"))


def test_the_output_of_a_command_is_read_as_a_shell_gives_it(tmp_path):
    """``--image <(curl ...)``."""
    reader, writer = os.pipe()
    content = encoded(Image.new("RGB", (4, 3), "red"), "PNG")
    try:
        os.write(writer, content)
        os.close(writer)
        assert load_image(f"/dev/fd/{reader}").size == (4, 3)
    finally:
        os.close(reader)


def grey_tiff(values: np.ndarray, **tags) -> bytes:
    return encoded(
        Image.fromarray(values), "TIFF", tiffinfo={int(k[1:]): v for k, v in tags.items()}
    )


def ramp(highest, dtype) -> np.ndarray:
    return np.linspace(0, highest, 256).round(0 if highest > 1 else 9).astype(dtype).reshape(16, 16)


def test_greys_are_scaled_by_what_their_file_says():
    expected = np.arange(256).reshape(16, 16)
    sources = {
        "12 bits in 16": grey_tiff(ramp(4095, np.uint16), t281=4095),
        "16 bits": grey_tiff(ramp(65535, np.uint16), t281=65535),
        "floats": grey_tiff(ramp(255, np.float32), t341=255.0),
        "floats of 0..1": grey_tiff(ramp(1, np.float32)),
    }
    for name, data in sources.items():
        ours = np.asarray(load_image(data))[:, :, 0].astype(int)
        assert np.abs(ours - expected).max() <= 1, name


def test_light_that_is_low_is_light():
    values = ramp(65535, np.uint16)
    data = bytearray(grey_tiff(values, t262=0))
    assert (
        np.asarray(load_image(bytes(data)))[:, :, 0].tolist()
        == (255 - np.arange(256)).reshape(16, 16).tolist()
    )


def test_greys_whose_white_is_guessed_are_warned_of(tmp_path):
    (tmp_path / "x.tif").write_bytes(grey_tiff(ramp(4095, np.uint16)))
    with pytest.warns(UserWarning, match=r"x.tif has values up to 4095 of 65535.*12 bits"):
        dark = load_image(tmp_path / "x.tif")
    assert np.asarray(dark).max() == 16
    for values in (ramp(812, np.float32), ramp(900_000, np.int32)):
        with pytest.warns(UserWarning, match=r"values of 0\.\..*shown as black\.\.white"):
            seen = np.asarray(load_image(grey_tiff(values)))
        assert (seen.min(), seen.max()) == (0, 255)
    signed = np.linspace(-100, 100, 256).astype(np.float32).reshape(16, 16)
    with pytest.warns(UserWarning, match="values of -100..100"):
        assert np.asarray(load_image(grey_tiff(signed)))[8, 0, 0] == 128
    with pytest.warns(UserWarning, match=r"colours up to 15 of 255"):
        load_image(sixteen_bit_png(4095))


def sixteen_bit_png(value: int) -> bytes:
    """16 x 16 pixels of one colour, of 16 bits a channel."""
    rows = (b"\0" + struct.pack(">3H", value, value, value) * 16) * 16

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def test_what_is_black_or_not_finite_is_not_warned_of():
    assert np.asarray(load_image(grey_tiff(np.zeros((4, 4), np.uint16)))).max() == 0
    assert np.asarray(load_image(sixteen_bit_png(65535))).min() == 255
    odd = np.array([[np.nan, 1, np.inf], [0, 0.5, -np.inf]], np.float32)
    for tags in ({}, {"t341": float("inf")}, {"t341": float("nan")}):
        seen = np.asarray(load_image(grey_tiff(odd, **tags)))[:, :, 0]
        assert seen.tolist() == [[0, 255, 255], [0, 128, 0]]


def what_is_said_of(data: bytes) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_image(data, 10_000_000).mode
    except ValueError as error:
        return str(error)


SEEDS = {
    "jpeg": ("JPEG", {}), "progressive": ("JPEG", {"progressive": True}), "png": ("PNG", {}),
    "webp": ("WEBP", {}), "lossless": ("WEBP", {"lossless": True}), "gif": ("GIF", {}),
    "tiff": ("TIFF", {}), "bigtiff": ("TIFF", {"big_tiff": True}), "avif": ("AVIF", {}),
    "bmp": ("BMP", {}), "ico": ("ICO", {}), "ppm": ("PPM", {}), "jpeg2000": ("JPEG2000", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEDS)
def test_broken_files_give_a_picture_or_one_line(picture, name):
    kind, options = SEEDS[name]
    if kind not in ("PPM", "BMP", "ICO", "JPEG2000", "GIF"):
        options = {**options, "exif": exif_of()}
    whole = encoded(picture.resize((24, 17)), kind, **options)
    chance = random.Random(name)
    for _ in range(150):
        data = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(chance.randrange(4)):
            at = chance.randrange(max(1, min(len(data), chance.choice([80, len(data) or 1]))))
            data[at : at + 1] = bytes([chance.choice([0, 255, chance.randrange(256)])])
        said = what_is_said_of(bytes(data))
        assert said.startswith("The image (") or said == "RGB"
        assert "\n" not in said


@pytest.mark.parametrize(
    ("folder", "pattern", "size"),
    [("exif_bad_values", "*.jpg", (48, 64)), ("png_big_metadata", "*.png", (64, 48))],
)
def test_reported_files_are_read(folder, pattern, size):
    files = [*shared_data(f"reports/{folder}").glob(pattern)]
    assert files
    assert {load_image(file).size for file in files} == {size}


def test_reported_bombs_are_refused():
    for name in ("scanbomb_100.jpg", "scanbomb_1000.jpg"):
        with pytest.raises(ValueError, match="more than 64 JPEG scans"):
            load_image(shared_data("reports/server_bombs") / name)
