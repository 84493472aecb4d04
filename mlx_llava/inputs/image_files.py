"""What a decoder gets to see of an image file: the image, and no more than it does quickly.

Metadata is not handed on: of a few bytes of it, decoders make gigabytes, or stumble. What turns an
image is read here. Nothing is decoded, and no file takes longer than a walk over its parts.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from mlx_llava.inputs.rgb import UNKNOWN, Levels
from mlx_llava.inputs.tiff import ORIENTATION, read_directory

#: A JPEG is decoded once for each of its scans. Ten are usual, mozjpeg writes up to about 20.
MAX_SCANS = 64
#: Parts of a file of which there are a few hundred; of PNG, IDAT has 8 kB in each.
MAX_SEGMENTS = 4096
MAX_CHUNKS = 100_000
MAX_BLOCKS = 100_000
#: What is looked through for the orientation.
MAX_TEXT = 1 << 20

# Anything but fill bytes, FF 00, restarts (D0..D7) and TEM (01), which have no length.
_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")
_END_OF_IMAGE, _START_OF_SCAN, _APP1 = 0xD9, 0xDA, 0xE1
#: All APPn and COM, but for JFIF (APP0) and Adobe (APP14), which say what the colours are.
_LEFT_OUT = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_EXIFS = re.compile(rb"(?:Exif\0\0)+")
_PNG_EXIF, _PNG_XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"
_CHUNKS_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# An item of type Exif, after the version, number and protection of its entry.
_EXIF_ITEM = re.compile(rb"(infe.{8}(?:..)?)Exif", re.DOTALL)
_BLOCK = re.compile(rb"[!,;]")
_GRAPHIC_CONTROL = b"!\xf9"
# Size, compression and offsets of the pixels, and what they mean; the old and the new JPEG; LERC.
_TAGS_KEPT = frozenset(
    {
        *(*range(256, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, 320),
        *(*range(322, 326), 338, 339, 347, *range(512, 516), *range(517, 522), 529, 530, 532),
        50674,
    }
)
_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANES = 258, 259, 262, 277, 284
_TILE_WIDTH, _TILE_LENGTH, _TIFF_XMP = 322, 323, 700
_LOWEST, _HIGHEST = (280, 340), (281, 341)


class Essence(NamedTuple):
    """What is needed of a file."""

    content: bytes  # to decode
    orientation: int | None = None  # as in EXIF, 1..8, or None where only the decoder knows
    levels: Levels = UNKNOWN


def essence(content: bytes, format: str, max_pixels: int) -> Essence:
    """What is needed of a file of a format, by Pillow's name of it.

    Raises:
        ValueError: Decoding it could take long; the message wants its name before it.
    """
    readers = {"JPEG": _jpeg, "PNG": _png, "GIF": _gif, "AVIF": _avif}
    readers["TIFF"] = partial(_tiff, max_pixels=max_pixels)
    return readers.get(format, Essence)(content)


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """How a camera was held, 1..8: by EXIF, or else by XMP; 1 where neither makes sense."""
    start = _EXIFS.match(exif)
    try:
        directory = read_directory(exif[start.end() :] if start else exif)
    except ValueError:
        directory = None
    number = directory.number(ORIENTATION) if directory else None
    if number is None:
        found = re.search(rb"tiff:Orientation(?:=[\"']|>)([1-8])", xmp)
        return int(found[1]) if found else 1
    return int(number) if number in range(1, 9) else 1


def _jpeg(content: bytes) -> Essence:
    """Without what is no image; ITU-T T.81, annex B."""
    kept, exif, xmp, scans = [content[:2]], b"", b"", 0
    for marker, start, body, end in _segments(content):
        if marker == _START_OF_SCAN:
            scans += 1
            if scans == 1:
                kept.append(content[start:])
            elif scans > MAX_SCANS:
                raise ValueError(f"has more than {MAX_SCANS} JPEG scans; save it anew")
        elif scans:
            continue
        elif marker not in _LEFT_OUT:
            kept.append(content[start:end])
        elif marker == _APP1 and content.startswith(_EXIF, body):
            exif = exif or content[body:end]
        elif marker == _APP1 and content.startswith(_XMP, body):
            xmp = xmp or content[body:end]
    return Essence(b"".join(kept), orientation(exif, xmp))


def _segments(content: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Marker, start, start of the body and end of each part of a JPEG.

    They are found as libjpeg finds them, so that it cannot see more scans than are counted.
    """
    at = 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(content, at)
        if found is None or found[1][0] == _END_OF_IMAGE:
            return
        body = found.end() + 2
        at = found.end() + int.from_bytes(content[found.end() : body], "big")
        yield found[1][0], found.start(), body, at
    raise ValueError(f"has more than {MAX_SEGMENTS:,} JPEG segments; save it anew")


def _png(content: bytes) -> Essence:
    """Without text, profiles and animation; the PNG specification, 5.3 and 11."""
    kept, texts, exif, at = [content[:8]], dict[bytes, bytes](), b"", 8
    for _ in range(MAX_CHUNKS):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        start, at = at, at + length + 12
        if kind in _CHUNKS_KEPT:
            kept.append(content[start:at])
        elif kind == b"eXIf":
            exif = exif or content[start + 8 : at - 4]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = content[start + 8 : start + 88].partition(b"\0")[0]
            if keyword in (_PNG_XMP, _PNG_EXIF) and keyword not in texts:
                texts[keyword] = _png_text(kind, content[start + 9 + len(keyword) : at - 4])
        if kind == b"IEND" or at >= len(content):
            break
    else:
        raise ValueError(f"has more than {MAX_CHUNKS:,} PNG chunks; save it anew")
    exif = exif or _unhex(texts.get(_PNG_EXIF, b""))
    levels = Levels(bits=content[24] if len(content) > 24 else 8)
    return Essence(b"".join(kept), orientation(exif, texts.get(_PNG_XMP, b"")), levels)


def _png_text(kind: bytes, body: bytes) -> bytes:
    is_packed, body = kind == b"zTXt", body[kind == b"zTXt" :]
    if kind == b"iTXt":
        is_packed, body = body.startswith(b"\1"), body[2:].split(b"\0", 2)[-1]
    if not is_packed:
        return body[:MAX_TEXT]
    try:
        return zlib.decompressobj().decompress(body, MAX_TEXT)
    except zlib.error:
        return b""


def _unhex(profile: bytes) -> bytes:
    """What ImageMagick writes as a text: a name, a length, and hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(profile.split(b"\n")[3:]).decode())
    except ValueError:
        return b""


def _gif(content: bytes) -> Essence:
    """Without comments and other extensions before the first frame; GIF89a, 23 to 26."""
    flags = content[10] if len(content) > 10 else 0
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    kept, blocks = [content[:at]], 0
    while (found := _BLOCK.search(content, at)) and found[0] == b"!":
        start, at = found.start(), found.end() + 1
        size = 1
        while size:
            size = int.from_bytes(content[at : at + 1], "big")
            at, blocks = at + 1 + size, blocks + 1
            if blocks > MAX_BLOCKS:
                raise ValueError(f"has more than {MAX_BLOCKS:,} GIF blocks; save it anew")
        if content.startswith(_GRAPHIC_CONTROL, start):
            kept.append(content[start:at])
    kept.append(content[found.start() :] if found else b"")
    return Essence(b"".join(kept), orientation=1)


def _avif(content: bytes) -> Essence:
    """Without EXIF, which Pillow would write anew; boxes of AVIF itself say how it was held."""
    return Essence(_EXIF_ITEM.sub(rb"\1none", content))


def _tiff(content: bytes, max_pixels: int) -> Essence:
    """Its first image and nothing else; TIFF 6.0, section 8."""
    directory = read_directory(content)
    if directory is None:
        return Essence(content, orientation=1)
    number = directory.number
    width, length = number(_TILE_WIDTH) or 0, number(_TILE_LENGTH) or 0
    if width * length > max_pixels:
        raise ValueError(f"has tiles of {width:.0f}x{length:.0f} pixels")
    bits = number(_BITS) or 1
    is_raw = number(_COMPRESSION) in (None, 1)
    if is_raw and bits > 8 and number(_PLANES) == 2 and (number(_SAMPLES) or 1) > 1:
        raise ValueError(f"has colours of {bits:.0f} bits in planes of their own; interleave them")
    black, white = (
        next((found for tag in tags if (found := number(tag)) is not None), default)
        for tags, default in ((_LOWEST, None), (_HIGHEST, 4095 if bits == 12 else None))
    )
    levels = Levels(black, white, is_inverted=number(_PHOTOMETRIC) == 0, bits=int(bits))
    held = orientation(content, directory.value(_TIFF_XMP)[1])
    return Essence(directory.only(_TAGS_KEPT), held, levels)
