"""Files that are there whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import IO, Any

#: The longest name that is kept in a hidden one; file systems take 255 bytes, some fewer.
_LONGEST = 100
#: Within so many bytes HTML, PNG and JSON files say what wrote them.
_HEAD = 4096
_MARKS = ('<meta name="generator" content="{}">', "Software\0{}", '"command": "{}"')


def size_said(nbytes: float) -> str:
    """How large something is: 13.5 GB, or 3.9 MB of what is below a GB."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def hidden(path: Path, ending: str) -> Path:
    """A hidden path beside another, always the same, with a name that is never too long."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return path.with_name(f".{name}{ending}")


@contextmanager
def locked(path: Path, what: str | Path) -> Iterator[None]:
    """Holds a file as long as this process lives, so that one alone writes something.

    Args:
        path (Path): The file, which is made where there is none.
        what (str or Path): What is written, for the error.

    Raises:
        FileExistsError: Another process holds it.
    """
    with path.open("a") as file:
        if not _lock(file):
            raise FileExistsError(
                f"{what} is being written by another command; wait until it has ended."
            )
        yield


def _lock(file: IO[Any]) -> bool:
    """Holds a file while it is open; False where another process does. Some disks have no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def only_writer(path: Path, what: str | Path = "") -> Iterator[None]:
    """Holds that no other process writes what belongs to a file; FileExistsError where one does."""
    path = real_path(path)
    lock = hidden(path, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock, what or path):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def expand_home(path: str | Path) -> Path:
    """A path with ``~`` as the home folder, or as it is where there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises RuntimeError there


def real_path(path: Path) -> Path:
    """Where a path leads through all links, or as far as they lead."""
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError on a loop


def absolute_path(path: str | Path) -> Path:
    """A path from the root on, without ``..``; links stay as they are."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def lasting_name(source: str) -> str:
    """A path or URL that means the same in another folder."""
    is_url = source.startswith(("http://", "https://", "data:"))
    return source if is_url else str(real_path(expand_home(source)))


def check_output(path: Path, command: str, inputs: Iterable[object] = ()) -> None:
    """Raises FileExistsError unless a command may write a file, before anything is computed.

    Args:
        path (Path): The file.
        command (str): What the beginning of all that it writes names as its maker.
        inputs (iterable): What it reads; what is no path, as URLs, is passed over.
    """
    check_not_read(path, inputs)
    if not os.path.lexists(path):
        return
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if any(mark.format(command).encode() in head for mark in _MARKS):
            return
    raise FileExistsError(f"{path} exists already, and {command} did not write it; it stays.")


def check_not_read(path: Path, inputs: Iterable[object]) -> None:
    """Raises FileExistsError if a file that is to be written is one of those that are read."""
    names = [name for name in inputs if isinstance(name, (str, Path))]
    if any(is_same_file(expand_home(name), path) for name in names):
        raise FileExistsError(f"{path} is read, and cannot be written; choose another name.")


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file; False where one of them leads nowhere."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


@contextmanager
def own_file(path: Path, command: str) -> Iterator[Path]:
    """As `whole_file`, but replaces only what the same command wrote; see `check_output`."""
    check_output(path, command)
    with whole_file(path) as beside:
        yield beside


@contextmanager
def whole_file(path: Path, ending: str = "") -> Iterator[Path]:
    """Gives a hidden path beside `path` to write to; what is there takes its place at the end.

    Of several processes that write one file, each has a path of its own, and the last one's stays.

    Args:
        path (Path): The file to make or to replace; of a link, what it leads to.
        ending (str): What the hidden path must end in.
    """
    path = real_path(path)

    def paths() -> Iterator[Path]:
        return (hidden(path, f".partial{number or ''}{ending}") for number in count())

    for one in takewhile(Path.exists, paths()):
        with _held(one) as is_left:
            if is_left:
                one.unlink()  # a kill has left it
    with ExitStack() as stack:
        beside = next(one for one in paths() if stack.enter_context(_held(one)))
        try:
            yield beside
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Holds a file, which is made where there is none; False where another process does."""
    while True:
        with path.open("a") as file:
            is_free = _lock(file)
            if not is_free or _is_at(file, path):  # else it was renamed before it was held
                yield is_free
                return


def _is_at(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def add_bytes(path: Path, data: bytes) -> None:
    """Adds to a file all that is given or, where the disk is full, nothing of it.

    Raises:
        OSError: It cannot be added.
    """
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            file.truncate(size)
            raise OSError(f"{path} cannot be written: {error.strerror}.") from error


def disk_room(path: Path) -> tuple[Path, int]:
    """The folder that is there of those around a path, and the bytes that its disk has free."""
    whole = path.absolute()
    there = next(folder for folder in (whole, *whole.parents) if folder.exists())
    return there, shutil.disk_usage(there).free


def is_file(path: Path) -> bool:
    """Whether there is a file; False for a name that no file can have."""
    return _is(path.is_file)


def is_folder(path: Path) -> bool:
    """The same of a folder."""
    return _is(path.is_dir)


def _is(what: Callable[[], bool]) -> bool:
    try:
        return what()
    except (OSError, ValueError):
        return False


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())
