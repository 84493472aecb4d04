"""Pictures: whatever a user has -> an RGB image of 8 bits."""

from __future__ import annotations

import base64
import http.client
import io
import re
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageGrab, ImageOps, UnidentifiedImageError

ImageSource: TypeAlias = (
    "str | Path | bytes | BinaryIO | Image.Image | npt.NDArray[Any]"  # str: a path or a URL
)

MAX_PIXELS = 100_000_000
MAX_DOWNLOAD_BYTES = 100_000_000
DOWNLOAD_SECONDS = 30
MAX_DATA_HEADER = 4096
_DATA_SCHEME = re.compile(r"\s*data:", re.IGNORECASE)
_DATA_HEADER = re.compile(_DATA_SCHEME.pattern + r'((?:[^",]|"[^"]*")*),', re.IGNORECASE)
_BASE64_OF_URLS = bytes.maketrans(b"-_", b"+/")
_BLANKS = b" \t\r\n\v\f"
HEIC = "HEIC"
#: What is tried on a file. Pillow knows more, one of which runs a program (EPS, Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", HEIC)


class PixelsError(ValueError):
    """A picture has more pixels than it may have.

    Attributes:
        pixels: how many.
    """

    def __init__(self, message: str, pixels: int) -> None:
        super().__init__(message)
        self.pixels = pixels


def load_image(
    source: ImageSource, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """Reads one picture as RGB.

    EXIF orientation is applied to everything that is a file; a ready PIL image or array is
    taken as it stands. Transparency is composited on white, 16-bit greys are rescaled to 8
    bits, and of an animation the first frame is used.

    Args:
        source (str, Path, bytes, file, PIL.Image.Image or numpy.ndarray): A path, an http(s)
            or data: URL, the bytes of a file, an open binary file, a PIL image, or an array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool, or floats in 0..1.
        max_pixels (int): The largest width x height; checked before anything is decoded.
        formats (sequence of str): What a file may be, by Pillow's names.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no picture, it is broken, or it is too large.
    """
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if isinstance(source, Image.Image):
        check_pixels(source.size, max_pixels, "The image")
        return to_rgb(source)
    file, name = _open(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = _identify(file, name, formats)
            check_pixels(image.size, max_pixels, name)
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image ({', '.join(formats)}).") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error}") from error
    except (OSError, SyntaxError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{name} is a broken image: {error}") from error
    finally:
        if file is not source:
            file.close()


def from_clipboard() -> Image.Image:
    """The picture that was copied, or the first of the copied files.

    Raises:
        ValueError: There is none, or this system has no clipboard that Pillow can read.
    """
    try:
        found = ImageGrab.grabclipboard()
    except (OSError, NotImplementedError) as error:
        raise ValueError(f"The clipboard cannot be read: {error}") from error
    if isinstance(found, list) and found:
        return load_image(found[0])
    if not isinstance(found, Image.Image):
        raise ValueError("There is no picture in the clipboard.")
    return load_image(found)


def check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    """Raises ValueError for a (width, height) of too many pixels, or of none."""
    width, height = size
    pixels = width * height
    if pixels > max_pixels:
        message = f"{name} is {width}x{height} = {pixels:,} pixels; the limit is {max_pixels:,}."
        raise PixelsError(message, pixels)
    if not width or not height:
        raise ValueError(f"{name} is empty ({width}x{height} pixels).")


def _open(source: Any) -> tuple[BinaryIO, str]:
    """An open binary file and the words to name it with in an error."""
    if isinstance(source, bytes):
        return io.BytesIO(source), f"The image ({len(source):,} bytes)"
    if hasattr(source, "read"):
        return source, str(getattr(source, "name", "The image"))
    if not isinstance(source, (str, Path)):
        kinds = "a path, URL, bytes, file, PIL image or array"
        raise ValueError(f"An image must be {kinds}, not {type(source).__name__}.")
    text = str(source)
    if text.startswith("data:"):
        return io.BytesIO(decode_data_url(text)), "The data: URL"
    if text.startswith(("http://", "https://")):
        return io.BytesIO(_download(text)), text
    path = Path(text).expanduser()
    if path.is_dir():
        raise ValueError(f"{text} is a folder, not an image.")
    if not path.exists():
        raise FileNotFoundError(f"There is no image {text}.")
    return path.open("rb"), text


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    """The bytes of a PNG file as a URL that holds all of it, which `load_image` reads."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def is_data_url(text: str) -> bool:
    """Whether a text holds a file rather than naming one."""
    return _DATA_SCHEME.match(text) is not None


def decode_data_url(url: str) -> bytes:
    """What a data: URL in base64 holds, in all the spellings that clients send.

    Beside RFC 2397's these are line breaks, base64 of URLs (RFC 4648), percent-encoding and
    missing padding. What kind of file it is said to be is not believed.

    Raises:
        ValueError: It is none in base64.
    """
    header = _DATA_HEADER.match(url[:MAX_DATA_HEADER])
    if header is None or "base64" not in map(str.strip, header[1].lower().split(";")[1:]):
        raise ValueError("A data: URL must look like data:image/png;base64,...")
    try:
        data = url[header.end() :].encode("ascii")
        data = unquote_to_bytes(data) if b"%" in data else data
        data = data.translate(_BASE64_OF_URLS, _BLANKS).rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        why = "it has other letters" if isinstance(error, UnicodeError) else error
        raise ValueError(f"The data: URL is not valid base64: {why}.") from error


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "mlx_llava"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            data: bytes = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"{url} cannot be fetched: {error}") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{url} is larger than {MAX_DOWNLOAD_BYTES:,} bytes.")
    return data


def _identify(file: BinaryIO, name: str, formats: Sequence[str]) -> Image.Image:
    """Opens the picture; HEIC (iPhone photos) through the optional pillow-heif."""
    try:
        return Image.open(file, formats=[known for known in formats if known != HEIC])
    except UnidentifiedImageError:
        if HEIC not in formats:
            raise
        file.seek(0)
        # ISO base media file: size, "ftyp", then the brand of the format.
        is_heic = file.read(12)[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc")
        if not is_heic:
            raise
    try:
        import pillow_heif
    except ImportError as error:
        raise ValueError(f"{name} is HEIC: pip install 'mlx_llava[heic]' to read it.") from error
    pillow_heif.register_heif_opener()
    file.seek(0)
    return Image.open(file, formats=["HEIF"])


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    """Turns (H, W) or (H, W, C) of any usual dtype into a PIL image."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"An image array must be (H, W) or (H, W, 1|3|4), not {array.shape}.")
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _to_8_bits(array, 65535)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("A floating-point image array must lie in 0..1.")
        array = _to_8_bits(array, 1)
    elif array.dtype != np.uint8:
        kinds = "uint8, uint16, bool or floating point"
        raise ValueError(f"An image array must be {kinds}, not {array.dtype}.")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_8_bits(array: npt.NDArray[Any], white: float) -> npt.NDArray[np.uint8]:
    scaled = np.nan_to_num(array.astype(np.float32)) * (255 / white)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any PIL mode to RGB, as transformers 5 does.

    The exception are greys of more than 8 bits, which Pillow would clip at 255: modes ``I;16``
    and ``I`` are taken as 16 bits, ``F`` as 0..1.
    """
    if image.mode.startswith("I") or image.mode == "F":
        white = 1 if image.mode == "F" else 65535
        image = Image.fromarray(_to_8_bits(np.asarray(image), white))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white_canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white_canvas, image)
    return image.convert("RGB")
