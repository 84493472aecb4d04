"""What a request may name as a picture -> its bytes, by what the server's owner allows."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from mlx_llava.inputs.image import decode_data_url, is_data_url

#: Of a picture that is elsewhere, or a file.
MAX_BYTES = 20_000_000
#: How JPEG, PNG, GIF and WebP begin in base64, which some clients send without data: before it.
_BARE = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
_NO_FILE = "There is no such file in the image root."


@dataclass(frozen=True)
class Sources:
    """Which pictures may be read.

    Attributes:
        remote: http(s) URLs, as `inputs.fetch` does it.
        root: the folder whose files may be named, by ``file://`` URLs or paths within it.
    """

    remote: bool = False
    root: Path | None = None

    async def fetch(self, url: str, max_bytes: int, seconds: float) -> bytes:
        """The bytes of a picture that is elsewhere; see `inputs.fetch`.

        Raises:
            ValueError: That is not allowed, or it cannot be fetched.
        """
        if not self.remote:
            raise ValueError(
                "Remote images are not allowed here (--allow-remote-images); send the "
                "picture as a data: URL."
            )
        from mlx_llava.inputs.fetch import fetch

        return await fetch(url, max_bytes, seconds)

    def read(self, url: str) -> bytes:
        """The bytes of a picture that is sent, or is here.

        Raises:
            ValueError: The source is not allowed, or cannot be read.
        """
        if url.startswith(_BARE):
            url = f"data:;base64,{url}"
        if is_data_url(url):
            return decode_data_url(url)
        if _scheme(url) not in ("", "file"):
            raise ValueError("An image URL must be a data: or an http(s) URL.")
        if self.root is None:
            raise ValueError(
                "Local files are not allowed here (--image-root); send the picture as a data: URL."
            )
        return read_below(self.root, _path_in(url, self.root))


def is_remote(url: str) -> bool:
    """Whether someone else has to be asked for a picture."""
    return _scheme(url) in ("http", "https")


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower() if ":" in url else ""


def _path_in(url: str, root: Path) -> PurePosixPath:
    """The path below a folder that a ``file://`` URL or a relative path names."""
    if not url.startswith("file:"):
        return PurePosixPath(url)
    parts = urlsplit(url)
    path = PurePosixPath(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_relative_to(root.resolve()):
        raise ValueError("The file is not in the image root.")
    return path.relative_to(root.resolve())


def read_below(root: Path, path: PurePosixPath, max_bytes: int = MAX_BYTES) -> bytes:
    """Reads a regular file below a folder, going through no link and no ``..``.

    Every step is opened from the one before, so that nothing can be exchanged in between.

    Raises:
        ValueError: There is no such file there, or it is too large.
    """
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in str(path):
        raise ValueError("The file is not in the image root.")
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
