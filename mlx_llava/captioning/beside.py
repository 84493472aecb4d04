"""Files beside pictures: texts as trainers read them, and XMP sidecars."""

from __future__ import annotations

import os
import shutil
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_llava.captioning.questions import TEXT, whole_text
from mlx_llava.captioning.xmp import MAX_BYTES, read_description, with_description
from mlx_llava.files import whole_file
from mlx_llava.inputs.image_paths import image_endings
from mlx_llava.inputs.video import ENDINGS, is_film


class Beside:
    """Which file belongs to which picture.

    ``photo.txt`` is that of ``photo.jpg``. Where there is ``photo.png`` too, the first in order
    has it, and the other has ``photo.png.txt``, as each has whose file is there under that name,
    and as both have where nothing tells whose ``photo.txt`` is.
    """

    def __init__(self, ending: str, takes_any: bool = False) -> None:
        """Names an ending.

        Args:
            ending (str): Of the files.
            takes_any (bool): A file of which nothing tells whose it is belongs to the first
                picture that is asked for.
        """
        self.ending, self.takes_any = ending, takes_any
        self._owners: dict[str, str | None] = {}
        self._names: tuple[Any, Mapping[str, list[str]]] = (None, {})

    def path(self, image: str) -> Path:
        """The file of a picture; of two that would share one, whichever is asked for first."""
        picture = Path(image)
        whole = picture.with_name(picture.name + self.ending)
        short = picture.with_suffix(self.ending)
        if os.path.lexists(whole):
            return whole
        key = same_name(str(short))
        if key not in self._owners:
            is_doubtful = not self.takes_any and os.path.lexists(short) and self._has_twin(picture)
            self._owners[key] = None if is_doubtful else image
        return short if self._owners[key] == image else whole

    def _has_twin(self, picture: Path) -> bool:
        """Whether another picture would have the same file, and has none of its whole name."""
        endings = image_endings() | (ENDINGS if is_film(picture) else set())
        twins = self._by_stem(picture.parent)[same_name(picture.stem)]
        return any(
            Path(name).suffix.lower() in endings
            and name != picture.name
            and not os.path.lexists(picture.with_name(name + self.ending))
            for name in twins
        )

    def _by_stem(self, folder: Path) -> Mapping[str, list[str]]:
        """The names in a folder, looked for again where it has changed."""
        state = (folder, folder.stat().st_mtime_ns)
        if self._names[0] != state:
            by_stem: dict[str, list[str]] = defaultdict(list)
            for path in folder.iterdir():
                by_stem[same_name(path.stem)].append(path.name)
            self._names = (state, by_stem)
        return self._names[1]


def same_name(name: str) -> str:
    """A name as disks compare it that ignore case, and how accents are written."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class TextFiles:
    """A ``.txt`` beside each picture, which is there whole or not at all."""

    def __init__(self, overwrite: bool = False, takes_any: bool = False) -> None:
        self.overwrite, self._beside = overwrite, Beside(".txt", takes_any)

    def has(self, image: str) -> bool:
        """Whether a picture has a text."""
        return self._beside.path(image).is_file()

    def mend(self) -> None:
        """Nothing is ever half written."""

    def row(self, image: str) -> dict[str, Any]:
        """What a picture's text says."""
        text = self._beside.path(image).read_text(encoding="utf-8", errors="replace")
        return {TEXT: text.removesuffix("\n")}

    def write(self, image: str, values: Mapping[str, Any]) -> None:
        """Keeps a caption for good.

        Raises:
            ValueError: This one cannot be kept; the others may.
        """
        path = self._beside.path(image)
        if os.path.lexists(path) and not self.overwrite:  # or under another case of letters
            raise ValueError(f"There is {path} already.")
        with _writing(path), whole_file(path) as beside:
            beside.write_text(whole_text(values) + "\n", encoding="utf-8")


class Sidecars:
    """An XMP file beside each picture, with its caption as dc:description.

    Lightroom calls it ``photo.xmp``, as Adobe's specification does, and darktable
    ``photo.jpg.xmp``. The one that is there is gone on with, of two the longer name, which can only
    be this picture's; a new one is ``photo.xmp``.
    """

    def __init__(self, overwrite: bool = False, takes_any: bool = False) -> None:
        self.overwrite, self._beside = overwrite, Beside(".xmp", takes_any)

    def is_described(self, image: str) -> bool:
        """Whether a picture has a description; False where its file cannot be read."""
        try:
            return bool(read_description(_read(self._beside.path(image)) or b""))
        except (ValueError, OSError):
            return False

    def write(self, image: str, text: str) -> None:
        """Merges a description into what is there.

        Raises:
            ValueError: There is another one, or the file cannot be read or written.
        """
        path = self._beside.path(image)
        with _writing(path):
            before = _read(path)
            try:
                there = read_description(before or b"")
                if there and there != text.strip() and not self.overwrite:
                    raise ValueError("has a description already; --overwrite replaces it")
                data = with_description(before, text)
            except ValueError as error:
                raise ValueError(f"{path} {error}.") from error
            if data == before:
                return
            if before is not None and not path.stat().st_mode & stat.S_IWUSR:
                raise ValueError(f"{path} is protected from being written.")
            with whole_file(path) as beside:
                beside.write_bytes(data)
                if before is not None:
                    shutil.copymode(path, beside)


def _read(path: Path) -> bytes | None:
    """What a sidecar holds, or a little more than it may; None where there is none."""
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise ValueError(f"{path} is no file.")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}.") from error
