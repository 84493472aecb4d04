"""Whatever a user has -> an RGB image of 8 bits."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageGrab

from mlx_llava.files import expand_home
from mlx_llava.inputs.image_files import Essence, essence, orientation
from mlx_llava.inputs.rgb import from_array, to_rgb

ImageSource: TypeAlias = (
    "str | Path | bytes | BinaryIO | Image.Image | npt.NDArray[Any]"  # str: a path or a URL
)

MAX_PIXELS = 100_000_000
#: Pillow takes time and memory for each row, however short it is.
MAX_SIDE = 1_000_000
MAX_FILE_BYTES = 1_000_000_000
MAX_DATA_HEADER = 4096
_DATA_SCHEME = re.compile(r"\s*data:", re.IGNORECASE)
_DATA_HEADER = re.compile(_DATA_SCHEME.pattern + r'((?:[^",]|"[^"]*")*),', re.IGNORECASE)
_BASE64_OF_URLS = bytes.maketrans(b"-_", b"+/")
_BLANKS = b" \t\r\n\v\f"
_PERCENT_CODES = {b"%2B": b"+", b"%2F": b"/", b"%3D": b"=", b"%0A": b"", b"%0D": b"", b"%20": b""}
#: What is tried on a file, by Pillow's names, and how each begins. Pillow knows more, one of which
#: runs a program (EPS, Ghostscript). The brands of AVIF and HEIC may stand after another.
_BEGINNINGS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
    "TIFF": rb"(II|MM)(\*\0|\0\*|\+\0|\0\+)",
    "PPM": rb"P[1-6f]\s",
    "ICO": rb"\0\0\x01\0",
    "JPEG2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n",
    "AVIF": rb"\0\0..ftyp(....)*?avi[fs]",
    "HEIC": rb"\0\0..ftyp(....)*?(hei[cxms]|hev[cx]|mif1)",
}
FORMATS = tuple(_BEGINNINGS)
#: What is often found instead of an image.
_OTHERS = {
    rb"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file)",
    rb"\s*<(.*<)?svg\b": "SVG (save it as PNG first)",
    rb"\s*<(!doctype\s+)?html\b": "a web page, not the image on it",
    rb"%PDF": "PDF (save its pages as PNG first)",
}
#: What a shell makes for ``<(command)``.
_OPEN_FILES = (Path("/dev/fd"), Path("/proc/self/fd"))
#: By EXIF's number of an orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: ImageSource, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """Reads one image as RGB.

    EXIF orientation is applied to everything that is a file; a ready PIL image or array is
    taken as it stands. Transparency is composited on white, greys of more than 8 bits are
    rescaled (with a warning where their white had to be guessed), and of an animation the first
    frame is used. A ready RGB image is returned as it is.

    Args:
        source: A path, an http(s) or data: URL, the bytes of a file, an open binary file, a PIL
            image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool,
            or floats in 0..1.
        max_pixels: The largest width x height; checked before anything is decoded.
        formats: What a file may be, by Pillow's names.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        ValueError: It is no image, it is broken, it is too large, or would take long to decode.
    """
    if isinstance(source, np.ndarray):
        source = from_array(source)
    if isinstance(source, Image.Image):
        check_pixels(source.size, max_pixels, "The image")
        is_plain = type(source) is Image.Image and "transparency" not in source.info
        if is_plain and source.mode == "RGB":
            return source
        with naming("The image"):
            return to_rgb(source)
    image, file, name = open_image(source, max_pixels, formats)
    with naming(name):
        image.load()
        held = file.orientation or orientation(_bytes(image, "exif"), _bytes(image, "xmp"))
        image = to_rgb(image, file.levels, name)
        return image.transpose(_TURNS[held]) if held in _TURNS else image


def image_size(
    source: ImageSource, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> tuple[int, int]:
    """The (width, height) that a file says; nothing is decoded. See `load_image`."""
    return open_image(source, max_pixels, formats)[0].size


def open_image(
    source: ImageSource, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> tuple[Image.Image, Essence, str]:
    """An image that is not decoded yet, what is known of its file, and its name in errors."""
    content, name = read_source(source)
    format = _format(content, name, formats)
    try:
        file = essence(content, format, max_pixels)
    except ValueError as error:
        raise ValueError(f"{name} {error}.") from error
    decoder = _decoder(format, name)
    with naming(name):
        image = decoder(io.BytesIO(file.content), "")
    check_pixels(image.size, max_pixels, name)
    return image, file, name


@contextmanager
def naming(name: str, kind: str = "image") -> Iterator[None]:
    """Makes a ValueError of whatever decoders raise on a broken file."""
    try:
        yield
    except Exception as error:
        is_clear = isinstance(error, (OSError, SyntaxError, ValueError)) and str(error)
        said = getattr(error, "strerror", None) or str(
            error
        )  # FFmpeg's number tells nobody anything
        why = said if is_clear else f"{type(error).__name__} {error}"
        raise ValueError(f"{name} is a broken {kind}: {' '.join(why.split())}") from error


def _bytes(image: Image.Image, key: str) -> bytes:
    found = image.info.get(key, b"")
    return found if isinstance(found, bytes) else b""


def from_clipboard() -> Image.Image:
    """The image that was copied, or the first of the copied files.

    Raises:
        ValueError: There is none, or this system has no clipboard that Pillow can read.
    """
    try:
        found = ImageGrab.grabclipboard()
    except (OSError, NotImplementedError) as error:
        raise ValueError(f"The clipboard cannot be read: {error}") from error
    first = found[0] if isinstance(found, list) and found else found
    if not isinstance(first, (str, Image.Image)):
        raise ValueError("There is no picture in the clipboard.")
    return load_image(first)


def check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    """Raises ValueError for a (width, height) of too many pixels, of none, or of a long side."""
    width, height = size
    pixels = width * height
    if pixels > max_pixels:
        size_text = f"{width}x{height} = {pixels:,} pixels"
        raise ValueError(f"{name} is {size_text}; the limit is {max_pixels:,}.")
    if max(size) > MAX_SIDE:
        raise ValueError(f"{name} is {width}x{height}; the limit of a side is {MAX_SIDE:,}.")
    if not width or not height:
        raise ValueError(f"{name} is empty ({width}x{height} pixels).")


def read_source(source: Any, kind: str = "image") -> tuple[bytes, str]:
    """The bytes of an image, or of a file of another kind, and its name in errors."""
    if isinstance(source, bytes):
        return source, f"The {kind} ({len(source):,} bytes)"
    if hasattr(source, "read"):
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)
        return _read_open(source, str(getattr(source, "name", f"The {kind}")))
    if not isinstance(source, (str, Path)):
        kinds = "a path, URL, bytes, file, PIL image or array"
        raise ValueError(f"An image must be {kinds}, not {type(source).__name__}.")
    text = str(source)
    if is_data_url(text):
        return decode_data_url(text), "The data: URL"
    if text.startswith(("http://", "https://")):
        from mlx_llava.inputs.fetch import download

        return download(text), text
    with find_file(text, kind).open("rb") as file:
        return _read_open(file, text)


def find_file(text: str, kind: str = "image") -> Path:
    """The path of a file that can be read to its end.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is something else.
    """
    path = expand_home(text)
    if path.is_dir():
        raise ValueError(f"{text} is a folder, not an image.")
    if not path.exists():
        raise FileNotFoundError(f"There is no {kind} {text}.")
    # Opening another pipe would wait for its writer, and a device may never end.
    if not path.is_file() and not (path.is_fifo() and path.parent in _OPEN_FILES):
        raise ValueError(f"{text} is a pipe, a socket or a device, not an image file.")
    return path


def _read_open(file: BinaryIO, name: str) -> tuple[bytes, str]:
    content = file.read(MAX_FILE_BYTES + 1)
    if not isinstance(content, bytes):
        raise ValueError(f"{name} was opened as text; open it with mode 'rb'.")
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{name} is larger than {MAX_FILE_BYTES:,} bytes.")
    return content, name


def has_image_beginning(content: bytes) -> bool:
    """Whether a file begins as an image does."""
    return _find_format(content, FORMATS) is not None


def _find_format(content: bytes, formats: Sequence[str]) -> str | None:
    begins = (f for f in formats if re.match(_BEGINNINGS[f], content[:64], re.DOTALL))
    return next(begins, None)


def _format(content: bytes, name: str, formats: Sequence[str]) -> str:
    if (format := _find_format(content, formats)) is not None:
        return format
    what = f"not an image ({', '.join(formats)})" if content else "empty, not an image"
    for beginning, other in _OTHERS.items():
        if re.match(beginning, content[:1000], re.DOTALL | re.IGNORECASE):
            what = other
    raise ValueError(f"{name} is {what}.")


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    image.save(file := io.BytesIO(), format="PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    """The bytes of a PNG file as a URL that holds all of it, which `load_image` reads."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def is_data_url(text: str) -> bool:
    """Whether a text holds a file rather than naming one."""
    return _DATA_SCHEME.match(text) is not None


def decode_data_url(url: str) -> bytes:
    """What a data: URL holds, in all the spellings that clients send.

    Beside RFC 2397's these are line breaks, base64 of URLs (RFC 4648), percent-encoding of base64
    and missing padding. What kind of file it is said to be is not believed.

    Raises:
        ValueError: It is none, or broken.
    """
    header = _DATA_HEADER.match(url[:MAX_DATA_HEADER])
    content = "" if header is None else url[header.end() :]
    parameters = () if header is None else map(str.strip, header[1].lower().split(";")[1:])
    if "base64" not in parameters:
        if "%" not in content:  # as no picture is without
            raise ValueError("A data: URL must look like data:image/png;base64,...")
        return _decode_percents(content.encode("utf-8", "replace"))
    try:
        data = content.encode("ascii")
        for code, letter in _PERCENT_CODES.items() if b"%" in data else ():
            data = data.replace(code, letter).replace(code.lower(), letter)
        data = data.translate(_BASE64_OF_URLS, _BLANKS).rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        why = "it has other letters" if isinstance(error, UnicodeError) else error
        raise ValueError(f"The data: URL is not valid base64: {why}.") from error


def _decode_percents(data: bytes) -> bytes:
    """As `urllib.parse.unquote_to_bytes` does, in the memory of one text: they differ in a sign."""
    return binascii.a2b_qp(data.replace(b"=", b"=3D").replace(b"%", b"="))


def _decoder(format: str, name: str) -> Callable[[BinaryIO, str], Image.Image]:
    """What opens files of a format; HEIC (iPhone photos) through the optional pillow-heif.

    `Image.open` would do the same, and warn of sizes that are allowed here.
    """
    if format == "HEIC":
        try:
            import pillow_heif
        except ImportError as error:
            raise ValueError(
                f"{name} is HEIC: pip install 'mlx_llava[heic]' to read it."
            ) from error
        pillow_heif.register_heif_opener()
        format = "HEIF"
    if format not in Image.OPEN:
        Image.init()
    if format not in Image.OPEN:
        raise ValueError(f"{name} is {format}: pip install -U pillow to read it.")
    return Image.OPEN[format][0]
