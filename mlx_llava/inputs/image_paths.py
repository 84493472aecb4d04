"""The images of folders and patterns, each once, whatever links lead to them."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from PIL import Image

from mlx_llava.files import expand_home, real_path
from mlx_llava.inputs.image import FORMATS


def find_images(
    places: Sequence[str],
    recursive: bool = False,
    skipped: set[Path] | None = None,
    others: Collection[str] = (),
) -> list[str]:
    """The images of folders, files and patterns as ``photos/**/*.jpg``, of each by their names.

    Links are followed, and an image that several lead to is found once, by its own name if that
    is among them.

    Args:
        places: Folders, files and patterns.
        recursive: Looks into the folders of folders.
        skipped: Takes the files that are no images by their names, links that lead nowhere, and
            folders that cannot be read.
        others: What the names of files end in that are found too.

    Raises:
        ValueError: A place has no image, or is a folder that cannot be read.
    """
    found: dict[Path, str] = {}
    skipped = set() if skipped is None else skipped
    for place in places:
        path = expand_home(place)
        endings = {*image_endings(), *others}
        files = [path] if path.is_file() else _find_files(path, recursive, skipped, endings)
        new = _name_once(files)
        if not new and path in skipped and path.is_dir():
            raise ValueError(f"The folder {place} cannot be read; see its permissions.")
        if not new:
            hint = "; --recursive looks into its folders" if path.is_dir() and not recursive else ""
            raise ValueError(f"There is no picture in {place}{hint}.")
        for real, name in sorted(new.items(), key=lambda item: item[1]):
            found.setdefault(real, name)
    return list(found.values())


def _name_once(files: Iterable[Path]) -> dict[Path, str]:
    """Where each file is, and the name that leads there through the fewest links."""
    links_to = cache(_links_to)  # of a folder, once for all that is in it
    named: list[tuple[int, str, Path]] = []
    for file in files:
        links, folder = links_to(file.parent)
        if file.is_symlink():
            named.append((links + 1, str(file), real_path(file)))
        else:
            named.append((links, str(file), folder / file.name))
    names: dict[Path, str] = {}
    for _, name, real in sorted(named):
        names.setdefault(real, name)
    return names


def _links_to(folder: Path) -> tuple[int, Path]:
    return sum(part.is_symlink() for part in (folder, *folder.parents)), real_path(folder)


def _find_files(
    path: Path, recursive: bool, skipped: set[Path], endings: Collection[str]
) -> Iterator[Path]:
    start, parts = Path(path.anchor), path.parts[bool(path.anchor) :]
    if path.is_dir():
        start, parts = path, ("**", "*") if recursive else ("*",)
    for file in _match(start, parts, skipped):
        mode = _mode(file)
        if _has_ending(file, endings) and stat.S_ISREG(mode):
            yield file
        elif not stat.S_ISDIR(mode):
            skipped.add(file)


def _match(folder: Path, parts: Sequence[str], skipped: set[Path]) -> Iterator[Path]:
    first, rest = parts[0], parts[1:]
    if first == "**":
        for below in _folders(folder, skipped):
            yield from _match(below, rest or ["*"], skipped)
        return
    for path in _entries(folder, first, skipped):
        if not rest:
            yield path
        elif stat.S_ISDIR(_mode(path)):
            yield from _match(path, rest, skipped)


def _folders(folder: Path, skipped: set[Path]) -> Iterator[Path]:
    """A folder and all below it, each once, those behind links last."""
    seen: set[tuple[int, int]] = set()
    waiting = deque([folder])
    while waiting:
        here = waiting.popleft()
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield here
        for path in _entries(here, "*", skipped):
            if stat.S_ISDIR(_mode(path)):
                (waiting.append if path.is_symlink() else waiting.appendleft)(path)


def _entries(folder: Path, pattern: str, skipped: set[Path]) -> list[Path]:
    """What is in a folder under a name or a pattern; hidden files match only a hidden pattern."""
    if not any(letter in pattern for letter in "*?["):
        return [folder / pattern] if os.path.lexists(folder / pattern) else []
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        skipped.add(folder)
        return []
    hidden = pattern.startswith(".")
    return [folder / n for n in names if fnmatchcase(n, pattern) and n.startswith(".") == hidden]


def _mode(path: Path) -> int:
    """What a path leads to, as `stat.S_ISREG` and the like tell; 0 where it leads nowhere."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


@cache
def image_endings() -> set[str]:
    """What the names of images end in."""
    endings = Image.registered_extensions()
    return {ending for ending in endings if endings[ending] in FORMATS} | {".heic", ".heif"}


def _has_ending(file: Path, endings: Collection[str]) -> bool:
    """macOS writes ``._`` files beside real ones."""
    return file.suffix.lower() in endings and not file.name.startswith(".")
