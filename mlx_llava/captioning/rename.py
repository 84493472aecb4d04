"""Files named by their captions, and given their old names again.

All that belongs to a picture moves with it: files of the same name with another ending, as the RAW
beside a JPEG, and sidecars. What moves is written down first, and nothing is ever replaced.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_llava.captioning.beside import same_name
from mlx_llava.files import absolute_path, whole_file
from mlx_llava.json_files import JsonLines, field

#: Bytes of a name without its ending: long enough to be read, and short enough for any disk.
MAX_NAME = 100
_MAX_FILE_NAME = 255
#: What some disk or shell takes for something else.
_RESERVED = re.compile(r'[/\\:*?"<>|\s\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+')
#: Names that are devices on Windows, which sees a shared disk.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_KEYS = ("folder", "from", "to", "files")
#: Stands where all that was to be renamed has been.
_DONE = dict(zip(_KEYS, ("", "", "", []), strict=True))


@dataclass(frozen=True)
class Move:
    """Files of one folder that change the beginning of their names."""

    folder: str
    old: str
    new: str
    rests: tuple[str, ...]

    def paths(self) -> Iterator[tuple[Path, Path]]:
        """The old and the new path of each file."""
        folder = Path(self.folder)
        return ((folder / (self.old + r), folder / (self.new + r)) for r in self.rests)


class Renames(JsonLines):
    """The undo file: a JSON line for each group of files that was renamed.

    Folders stand in it as they are found from its own, so that all may be moved together.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, '{"folder": "', errors="surrogateescape")

    def moves(self) -> list[Move]:
        """All that was renamed, the first first.

        Raises:
            ValueError: There is something else in it.
        """
        return [move for move in self._read() if move.rests]

    def _read(self) -> list[Move]:
        moves = []
        for place, line in self.read():
            folder, old, new = (field(line, key, str, place) for key in _KEYS[:3])
            rests = field(line, "files", list, place)
            names = [old, new, *rests]
            if tuple(line) != _KEYS or any(not isinstance(n, str) or "/" in n for n in names):
                raise ValueError(f"{self.path} holds lines that this command did not write.")
            whole = str(absolute_path(self._home / folder))
            moves.append(Move(whole, old, new, tuple(rests)))
        return moves

    @property
    def _home(self) -> Path:
        return absolute_path(self.path).parent

    def _write_down(self, move: Move) -> None:
        folder = Path(move.folder)
        if folder.is_relative_to(self._home):
            folder = folder.relative_to(self._home)
        values = (str(folder), move.old, move.new, list(move.rests))
        self.add(dict(zip(_KEYS, values, strict=True)))

    def apply(self, move: Move) -> None:
        """Renames files, or none of them; what is done is written down before.

        Raises:
            OSError: It cannot be.
        """
        self._write_down(move)
        moved: list[tuple[Path, Path]] = []
        try:
            for old, new in move.paths():
                _move(old, new)
                moved.append((new, old))
        except OSError:
            for new, old in moved:
                _move(new, old)
            self._rewrite(self.moves()[:-1])
            raise

    def close(self) -> None:
        """Writes down that all is renamed: what has an old name from now on is another file."""
        self.add(_DONE)

    def finish(self) -> None:
        """Renames what a kill has left of the last group; what was not begun is forgotten."""
        self.mend()
        moves = self._read()
        if not moves or not moves[-1].rests:
            return
        pairs = list(moves[-1].paths())
        if not any(os.path.lexists(new) for _, new in pairs):
            self._rewrite(self.moves()[:-1])
            return
        for old, new in pairs:
            if os.path.lexists(old) and (not os.path.lexists(new) or _is_same(old, new)):
                _move(old, new)
        self.close()

    def names(self) -> list[list[str]]:
        """All names of each file that was renamed, up to the one that it has now."""
        known: dict[str, list[str]] = {}
        names = []
        for old, new in [pair for move in self.moves() for pair in move.paths()]:
            chain = known.pop(str(old), None)
            if chain is None:
                chain = [str(old)]
                names.append(chain)
            chain.append(str(new))
            known[str(new)] = chain
        return names

    def undo(self) -> tuple[int, list[str]]:
        """Gives files their old names, and forgets it; what has come to a picture goes with it.

        Returns:
            tuple: How many files have theirs again, and why others have not.
        """
        restored, failed, kept = 0, list[str](), set[Path]()
        left: list[Move] = []
        newcomers = _Newcomers()
        for move in reversed(self.moves()):
            rests, before = [], restored
            for rest, (old, new) in zip(move.rests, move.paths(), strict=True):
                try:
                    if new not in kept:
                        restored += _move_back(old, new)
                        continue
                except OSError as error:
                    failed.append(f"{new}: {error.strerror or error}")
                kept |= {old, new}
                rests.append(rest)
            come = replace(move, rests=newcomers.of(move) if restored > before else ())
            for rest, (old, new) in zip(come.rests, come.paths(), strict=True):
                try:
                    restored += _move_back(old, new)
                except OSError as error:
                    failed.append(f"{new}: {error.strerror or error}")
                    rests.append(rest)
            if rests:
                left.insert(0, replace(move, rests=tuple(rests)))
        self._rewrite(left)
        return restored, failed

    def _rewrite(self, moves: Sequence[Move]) -> None:
        if not moves:
            self.path.unlink()
            return
        with whole_file(self.path) as beside:
            rest = Renames(beside)
            for move in moves:
                rest._write_down(move)


class _Newcomers:
    """Files that belong to renamed pictures and came after the renaming, as sidecars do."""

    def __init__(self) -> None:
        self._folders: dict[str, _Folder] = {}
        self._restored: dict[tuple[str, str], list[str]] = defaultdict(list)

    def of(self, move: Move) -> tuple[str, ...]:
        """How the names go on of those that have come to a group, which now goes back."""
        folder = Path(move.folder)
        if move.folder not in self._folders:
            self._folders[move.folder] = _Folder(folder)
        names = self._folders[move.folder].group(move.new)
        rests = [name[len(move.new) :] for name in names] + self._restored[move.folder, move.new]
        new = [rest for rest in dict.fromkeys(rests) if rest not in move.rests]
        self._restored[move.folder, move.old] += [*move.rests, *new]
        return tuple(rest for rest in new if os.path.lexists(folder / (move.new + rest)))


def plan(captions: Mapping[str, str], others: Iterable[Path] = ()) -> Iterator[Move]:
    """How pictures are named by their captions, with all that belongs to them.

    Args:
        captions (dict): By picture; files that belong to two are named by the first.
        others (iterable): Files that keep their names, whatever pictures are called.
    """
    folders: dict[str, _Folder] = {}
    fixed = {*map(absolute_path, others)}
    for image, caption in captions.items():
        path = absolute_path(image)
        if str(path.parent) not in folders:
            folders[str(path.parent)] = _Folder(path.parent, fixed)
        if move := folders[str(path.parent)].rename(path, caption):
            yield move


class _Folder:
    """The names in a folder, as they are and as they will be."""

    def __init__(self, path: Path, fixed: Container[Path] = ()) -> None:
        self.path = path
        entries = list(os.scandir(path))
        files = (e.name for e in entries if e.is_symlink() or not e.is_dir())
        self.files = {name for name in files if path / name not in fixed}
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.files):
            self.by_stem[Path(name).stem].append(name)
        self.taken = Counter(b for e in entries for b in _beginnings(e.name))
        self.named: set[str] = set()
        self.numbers: Counter[str] = Counter()

    def rename(self, image: Path, caption: str) -> Move | None:
        """How a picture's files get a name; None where they have it, or had it from another."""
        group = self.group(image.stem)
        if image.name not in group or not self.named.isdisjoint(group):
            return None
        self.named.update(group)
        rests = [name[len(image.stem) :] for name in group]
        longest = max(len(os.fsencode(rest)) for rest in rests)
        wanted = clean_name(caption, max(0, min(MAX_NAME, _MAX_FILE_NAME - 8 - longest)))
        if not wanted or re.fullmatch(re.escape(wanted) + r"( \d+)?", image.stem):
            return None
        own = Counter(b for name in group for b in _beginnings(name))
        new = self._free_name(wanted, own)
        self.taken.subtract(own)
        self.taken.update(b for rest in rests for b in _beginnings(new + rest))
        self.named.update(new + rest for rest in rests)
        return Move(str(self.path), image.stem, new, tuple(rests))

    def _free_name(self, wanted: str, own: Mapping[str, int]) -> str:
        """A name that no other file begins with, numbered from 2 where it has to be."""
        while True:
            self.numbers[wanted] += 1
            number = self.numbers[wanted]
            name = wanted if number == 1 else f"{wanted} {number}"
            if self.taken[same_name(name)] == own.get(same_name(name), 0):
                return name

    def group(self, stem: str) -> list[str]:
        """The files of a picture: ``photo.jpg``, ``photo.cr2``, ``photo.xmp``, ``photo.jpg.xmp``.

        darktable's second development of ``photo.jpg`` is ``photo_01.jpg.xmp``.
        """
        same = self.by_stem.get(stem, [])
        named = [name for file in same for name in self.by_stem.get(file, [])]
        versions = [
            f"{version}.xmp"
            for file in same
            for version in (f"{stem}_{n:02}{file[len(stem) :]}" for n in range(1, 100))
            if f"{version}.xmp" in self.files and version not in self.files
        ]
        return [*same, *named, *versions]


def clean_name(caption: str, limit: int = MAX_NAME) -> str:
    """A caption as the name of a file, of so many bytes at most; cut where a word ends."""
    lines = caption.strip().splitlines() or [""]
    text = unicodedata.normalize("NFC", _RESERVED.sub(" ", lines[0])).lstrip(" .-~$")
    if len(text.encode()) > limit:
        text = text.encode()[: limit + 1].decode(errors="ignore")
        text = text.rpartition(" ")[0] or text.encode()[:limit].decode(errors="ignore")
    text = text.rstrip(" .,;-")
    return f"{text}_"[:limit] if _DEVICES.fullmatch(text) else text


def _beginnings(name: str) -> Iterator[str]:
    """A name up to each of its dots, and whole: what another file must not be named."""
    parts = same_name(name).split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _move_back(old: Path, new: Path) -> bool:
    """Gives a file its old name; False where it has it."""
    if not new.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {new.parent}")
    if not os.path.lexists(new):
        if os.path.lexists(old):
            return False
        raise FileNotFoundError("it is not there")
    _move(new, old)
    return True


def _move(old: Path, new: Path) -> None:
    """Renames a file; FileExistsError where there is another of that name, whoever made it when."""
    if _is_same(old, new):
        if same_name(old.name) == same_name(new.name):
            old.rename(new)  # on a disk to which both are one name
            return
        if old.lstat().st_nlink > 1:
            old.unlink()  # a kill came between linking and this
            return
    try:
        os.link(old, new, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links, as cameras' cards
        if os.path.lexists(new):
            raise FileExistsError(f"There is {new} already.") from None
        old.rename(new)
    else:
        old.unlink()


def _is_same(old: Path, new: Path) -> bool:
    """Whether two names lead to one file, or to one link."""
    return os.path.lexists(new) and os.path.samestat(old.lstat(), new.lstat())
