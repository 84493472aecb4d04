"""What a request names as images -> pixels, as far as the server's owner allows it."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from mlx_llava.inputs.image import decode_data_url, image_size, is_data_url, load_image
from mlx_llava.inputs.video import Limits, load_video, video_pixels
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.requests import VideoUrl
from mlx_llava.serving.settings import MEGA, Settings
from mlx_llava.serving.workers import Workers

#: Of a picture or a video that is elsewhere, or a file.
MAX_BYTES = 20_000_000
#: How JPEG, PNG, GIF and WebP begin in base64, which some clients send without data: before it.
_BARE = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
#: What browsers and cameras make; each further decoder is one more that strangers can feed.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
#: What telephones and browsers film; ten minutes of it, or five in 1920 x 1080.
FILMS = Limits(
    decoded=20_000_000_000,
    seconds=600,
    containers=("mov", "matroska"),
    codecs=("h264", "hevc", "vp8", "vp9", "libdav1d", "av1"),
    images=("GIF", "WEBP"),
)
#: Pixels of a request up to which its pictures are small, as those of most telephones are.
SMALL_PIXELS = 16_000_000
#: So many requests have pictures fetched at a time, and keep them until they are decoded.
FETCHES = 8
#: How long fetching all pictures of a request may take.
REMOTE_SECONDS = 30.0
#: And one of them.
SECONDS = 10.0
_OUTSIDE = "The file is not in the image root."
_NO_FILE = "There is no such file in the image root."

T = TypeVar("T")


class Images:
    """Reads the images of requests, so that their pixels never add up.

    Those of one request are decoded at a time, and beside those of one with small ones. Small
    images wait for no large ones, and those that are sent for none of elsewhere.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._max_pixels = settings.max_pixels * MEGA
        self._films = replace(FILMS, pixels=self._max_pixels)
        self._decoding, self._decoding_small, self._measuring = Workers(1), Workers(1), Workers(2)
        self._holding = asyncio.Semaphore(FETCHES)

    async def use(self, urls: Sequence[str], frames: int, work: Callable[[list[Any]], T]) -> T:
        """Does some work with images and so many frames of videos, in the thread that decodes them.

        Raises:
            ApiError: An image is not allowed, cannot be read, or they are too large together.
        """
        async with self._holding if any(map(is_remote, urls)) else nullcontext():
            files = await self._fetch_all(urls)
            pixels = await self._measuring.run(partial(self._pixels, urls, files, frames))
            workers = self._decoding if pixels > SMALL_PIXELS else self._decoding_small
            return await workers.run(partial(self._decode, urls, files, frames, work))

    async def _fetch_all(self, urls: Sequence[str]) -> dict[str, bytes]:
        """The images that are elsewhere; all of a request together have one deadline."""
        until = time.monotonic() + REMOTE_SECONDS
        files: dict[str, bytes] = {}
        for url in filter(is_remote, urls):
            left = until - time.monotonic()
            if left <= 0:
                message = f"The pictures at URLs took longer than {REMOTE_SECONDS:g} s."
                raise _image_error(message, "invalid_image_url")
            max_body = self._settings.max_body * MEGA
            room = min(MAX_BYTES, max_body - sum(map(len, files.values())))
            if url not in files:
                with _refusing("invalid_image_url"):
                    files[url] = await self.fetch(url, room, min(SECONDS, left))
        return files

    async def fetch(self, url: str, max_bytes: int, seconds: float) -> bytes:
        """The bytes of an image that is elsewhere; see `inputs.fetch`.

        Raises:
            ValueError: That is not allowed, or it cannot be fetched.
        """
        if not self._settings.allow_remote_images:
            raise ValueError(
                "Remote images are not allowed here (--allow-remote-images); send the "
                "picture as a data: URL."
            )
        from mlx_llava.inputs.fetch import fetch

        return await fetch(url, max_bytes, seconds)

    def read(self, url: str) -> bytes:
        """The bytes of an image that is sent, or is here.

        Raises:
            ValueError: The source is not allowed, or cannot be read.
        """
        if url.startswith(_BARE):
            url = f"data:;base64,{url}"
        if is_data_url(url):
            return decode_data_url(url)
        if _scheme(url) not in ("", "file"):
            raise ValueError("An image URL must be a data: or an http(s) URL.")
        root = self._settings.root
        if root is None:
            raise ValueError(
                "Local files are not allowed here (--image-root); send the picture as a data: URL."
            )
        return read_below(root, _path_in(url, root))

    def _files(self, urls: Sequence[str], files: Mapping[str, bytes]) -> Iterator[bytes]:
        """The images of a request, from what was fetched and what is at hand."""
        for url in urls:
            with _refusing("invalid_image_url"):
                file = files[url] if url in files else self.read(url)
            yield file

    def _pixels(self, urls: Sequence[str], files: Mapping[str, bytes], frames: int) -> int:
        """How many pixels the images of a request have, which may not be too many."""
        limit, pixels = self._max_pixels, 0
        contents = zip(urls, self._files(urls, files), strict=True)
        for count, (url, file) in enumerate(contents, 1):
            with _refusing("invalid_image"):
                if isinstance(url, VideoUrl):
                    pixels += video_pixels(file, frames, self._films)
                else:
                    width, height = image_size(file, limit, FORMATS)
                    pixels += width * height
            if pixels > limit:
                message = (
                    f"The first {count} pictures have {pixels:,} pixels together; the limit of a "
                    f"request is {limit:,}."
                )
                raise _image_error(message, "invalid_image")
        return pixels

    def _decode(
        self,
        urls: Sequence[str],
        files: Mapping[str, bytes],
        frames: int,
        work: Callable[[list[Any]], T],
    ) -> T:
        with _refusing("invalid_image"):
            images = [
                load_video(content, frames, self._films)
                if isinstance(url, VideoUrl)
                else load_image(content, self._max_pixels, FORMATS)
                for url, content in zip(urls, self._files(urls, files), strict=True)
            ]
        return work(images)


def _image_error(message: str, code: str) -> ApiError:
    return ApiError(400, message, code, param="messages")


@contextmanager
def _refusing(code: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise _image_error(str(error), code) from error


def is_remote(url: str) -> bool:
    """Whether someone else has to be asked for an image."""
    return _scheme(url) in ("http", "https")


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower() if ":" in url else ""


def _path_in(url: str, root: Path) -> PurePosixPath:
    """The path below a folder that a ``file://`` URL or a path names; others stay as they are."""
    path = PurePosixPath(url)
    if _scheme(url) == "file":
        parts = urlsplit(url)
        path = PurePosixPath(unquote(parts.path))
        if parts.netloc not in ("", "localhost") or not path.is_absolute():
            raise ValueError(_OUTSIDE)
    for folder in (root, root.resolve()) if path.is_absolute() else ():
        if path.is_relative_to(folder):
            return path.relative_to(folder)
    return path


def read_below(root: Path, path: PurePosixPath, max_bytes: int = MAX_BYTES) -> bytes:
    """Reads a regular file below a folder, going through no link and no ``..``.

    Every step is opened from the one before, so that nothing can be exchanged in between.

    Raises:
        ValueError: There is no such file there, or it is too large.
    """
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in str(path):
        raise ValueError(_OUTSIDE)
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *above, name = path.parts
        for part in above:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except (OSError, UnicodeEncodeError) as error:
        raise ValueError(_NO_FILE) from error
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError(_NO_FILE)
    with os.fdopen(file, "rb") as opened:
        content = opened.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"The file is larger than {max_bytes:,} bytes.")
    return content
