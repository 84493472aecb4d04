"""What a run has to do, and what becomes of it: captions, errors, sidecars, and the sum of it."""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mlx_llava.captioning.beside import Sidecars, TextFiles
from mlx_llava.captioning.questions import as_text, whole_text
from mlx_llava.captioning.rename import Renames
from mlx_llava.captioning.settings import RunSettings
from mlx_llava.captioning.tables import Lines, Table
from mlx_llava.files import absolute_path, is_same_file, one_line, whole_file
from mlx_llava.interrupts import waiting_interrupts

#: ``--out`` for a text file beside each picture.
BESIDE = "txt"
Captions: TypeAlias = "Lines | Table | TextFiles"


def renames_path(out: str) -> Path:
    """The undo file of captions that go to `out`.

    Raises:
        ValueError: They cannot go there.
    """
    return _base(out).with_suffix(".renamed.jsonl")


def _base(out: str) -> Path:
    path = Path("captions.jsonl" if out == BESIDE else out)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"--out is {out}; it must end in .jsonl or .csv, or be {BESIDE}.")
    return path


@dataclass(frozen=True)
class Existing:
    """What becomes of captions that are there already; without any of these, a run is refused.

    Attributes:
        resumes: goes on with what the same command has left.
        skips: passes over pictures that have a caption, whoever wrote it and however.
        overwrites: replaces captions, whoever wrote them.
    """

    resumes: bool = False
    skips: bool = False
    overwrites: bool = False

    @property
    def starts_over(self) -> bool:
        """Whether nothing that is there counts."""
        return self.overwrites and not (self.resumes or self.skips)

    @property
    def takes_any(self) -> bool:
        """Whether a file counts of which nothing tells whose it is."""
        return self.skips or self.overwrites

    @property
    def asks_as_before(self) -> bool:
        """Whether captions are added to only if they were asked for in the same way."""
        return self.resumes and not self.skips

    @property
    def is_refused(self) -> bool:
        """Whether nothing may be there."""
        return not (self.resumes or self.skips or self.overwrites)


class Run:
    """The files of a run, and which pictures are done.

    Attributes:
        errors: why pictures have no caption; who goes on tries them again.
        renames: what was renamed by captions.
    """

    def __init__(
        self,
        out: str,
        columns: Sequence[str],
        asked: Mapping[str, Any],
        existing: Existing,
        xmp: bool = False,
    ) -> None:
        """Looks at what there is; nothing is written yet.

        Args:
            out (str): Where captions go: a .jsonl or .csv file, or ``txt``.
            columns (list): What each caption has.
            asked (dict): How they are asked for.
            existing (Existing): What becomes of what is there.
            xmp (bool): Writes sidecars too.

        Raises:
            ValueError: `out` is none of these, holds what this command did not write, or was
                asked for otherwise.
            FileExistsError: There are captions already.
        """
        base = _base(out)
        self._captions = _open_captions(out, columns, existing)
        self.errors = Lines(base.with_suffix(".errors.jsonl"), ("error",))
        self.renames = Renames(renames_path(out))
        self._settings = RunSettings(base.with_suffix(".settings.json"), asked)
        self._sidecars = Sidecars(existing.overwrites, existing.takes_any) if xmp else None
        self._existing = existing
        self._seen, self._before, self._passed = set[str](), set[str](), set[str]()
        self._written, self._failed, self._has_begun = set[str](), set[str](), False
        self._checked_for, self._kept_for = set[str](), set[str | None]()
        self._rows = dict[str, dict[str, Any]]()
        self._reasons = {_key(image) for image, _ in self.errors.rows()}
        self._look_back()

    def _look_back(self) -> None:
        """Reads the captions of an earlier run, unless this one replaces them."""
        if self._existing.starts_over:
            return
        table = None if isinstance(self._captions, TextFiles) else self._captions
        if table:
            self._rows = self._named_as_now(table.rows())
        begun = table.path if table and table.path.exists() else None
        if begun and self._existing.is_refused:
            raise FileExistsError(f"There is {begun} already; --resume goes on.")
        if begun and self._existing.asks_as_before and not self._settings.check():
            warnings.warn(f"Nothing says how the captions in {begun} were asked for.", stacklevel=2)

    def _named_as_now(
        self, rows: Iterable[tuple[str, dict[str, Any]]]
    ) -> dict[str, dict[str, Any]]:
        """Rows by the paths that pictures have now; a new picture may have an old name."""
        renamed = defaultdict[str, list[list[str]]](list)
        for chain in self.renames.names():
            for name in chain[:-1]:
                renamed[name].append(chain)
        named = {}
        for image, row in rows:
            path = _key(image)
            chain = next(filter(None, renamed[path]), [path])
            named[chain[-1]] = row
            chain.clear()  # another row of this name is of another picture
        return named

    def todo(self, images: Sequence[str]) -> list[str]:
        """Those of some pictures that the model has to see.

        Raises:
            FileExistsError: Some have a caption, and nothing says what becomes of it.
        """
        if self._existing.is_refused:
            done = sum(map(self._has_caption, images))
            _refuse(done, f"of {len(images)} text files already; --resume goes on")
        rest = [image for image in images if not self.is_done(image)]
        if not self._existing.skips:
            _refuse(
                len(self._passed),
                f"of {len(images)} pictures with a description already; --skip-existing passes "
                "over them, and --overwrite replaces it",
            )
        return rest

    def is_done(self, image: str) -> bool:
        """Whether a picture needs no caption; counts it, and completes what a kill has left."""
        self._seen.add(image)
        if self._existing.starts_over:
            return False
        folder = self._folder(image)
        if folder and self._existing.asks_as_before and folder not in self._checked_for:
            self._checked_for.add(folder)
            self._settings.check(folder)
        if self._has_caption(image):
            self._before.add(image)
            if self._sidecars and not self._sidecars.is_described(image):
                self._keep(image, [self._write_sidecar])
            else:
                self._forget_reason(image)
            return True
        if self._sidecars and not self._existing.overwrites and self._sidecars.is_described(image):
            self._passed.add(image)
            return True
        return False

    def _folder(self, image: str) -> str | None:
        """The folder of a caption that lies beside its picture; None of a line in a table."""
        is_beside = isinstance(self._captions, TextFiles)
        return str(absolute_path(image).parent) if is_beside else None

    def _has_caption(self, image: str) -> bool:
        if isinstance(self._captions, TextFiles):
            return self._captions.has(image)
        return _key(image) in self._rows

    def keep(self, image: str, values: Mapping[str, Any]) -> None:
        """Keeps a caption for good, or why it cannot be kept."""
        self._begin()
        if (folder := self._folder(image)) not in self._kept_for:
            self._kept_for.add(folder)
            self._settings.keep(folder)
        self._rows[_key(image)] = dict(values)
        steps = [self._write_caption, *([self._write_sidecar] if self._sidecars else [])]
        # What is written last may be missing after a kill: what is replaced is replaced again,
        # and what is new is written anew from the caption.
        self._keep(image, steps[::-1] if self._existing.overwrites else steps)

    def fail(self, image: str, error: Exception) -> None:
        """Keeps why a picture has no caption."""
        self._forget_reason(image)
        if not self._failed:
            self.errors.mend()
        self.errors.write(image, {"error": one_line(error)})
        self._reasons.add(_key(image))
        self._failed.add(image)

    def _forget_reason(self, image: str) -> None:
        """Takes away why a picture had no caption, as it is tried again."""
        if _key(image) in self._reasons:
            self._keep_reasons(self._reasons - {_key(image)})
            self._failed.discard(image)

    def _keep_reasons(self, kept: set[str]) -> None:
        lines = [(image, row) for image, row in self.errors.rows() if _key(image) in kept]
        if lines:
            with whole_file(self.errors.path) as beside:
                for image, row in lines:
                    Lines(beside, self.errors.columns).write(image, row)
        else:
            self.errors.path.unlink(missing_ok=True)
        self._reasons &= kept

    def _keep(self, image: str, steps: Iterable[Callable[[str], None]]) -> None:
        try:
            with waiting_interrupts():
                for step in steps:
                    step(image)
                self._forget_reason(image)
        except ValueError as error:
            self.fail(image, error)

    def _write_caption(self, image: str) -> None:
        self._captions.write(image, self._rows[_key(image)])
        self._written.add(image)

    def _write_sidecar(self, image: str) -> None:
        if self._sidecars:
            self._sidecars.write(image, whole_text(self.caption(image)))

    def _begin(self) -> None:
        """Before the first caption: takes away what is replaced, and what is half written."""
        if self._has_begun:
            return
        self._has_begun = True
        if self._existing.starts_over:
            self._keep_reasons({*map(_key, self._failed)})
            if not isinstance(self._captions, TextFiles):
                self._captions.path.unlink(missing_ok=True)
        self.errors.path.parent.mkdir(parents=True, exist_ok=True)
        self._captions.mend()

    def caption(self, image: str) -> dict[str, Any]:
        """The caption of a picture that has one."""
        if isinstance(self._captions, TextFiles):
            return self._captions.row(image)
        return self._rows[_key(image)]

    def titles(self) -> dict[str, str]:
        """What captioned pictures may be called by, in order of their names."""
        captioned = [i for i in sorted(self._seen - self._failed) if self._has_caption(i)]
        return {image: as_text(next(iter(self.caption(image).values()))) for image in captioned}

    def own_files(self) -> list[Path]:
        """The files that say what became of pictures, none of which lies beside one."""
        own = [] if isinstance(self._captions, TextFiles) else [self._captions.path]
        return [*own, self.errors.path, self.renames.path, self._settings.path]

    def check(self) -> None:
        """Raises ValueError where something is wrong with a picture."""
        if failed := len(self._failed):
            raise ValueError(
                f"{failed} of {len(self._seen)} pictures failed; {self.errors.path} says why."
            )

    def summary(self, others: Iterable[Path]) -> str:
        """What has become of everything that was found.

        Args:
            others (iterable): Files that were found and are no pictures.
        """
        own = self.own_files()
        beside = {".txt"} if isinstance(self._captions, TextFiles) else set[str]()
        beside |= {".xmp"} if self._sidecars else set()
        kinds = Counter(
            _kind(file)
            for file in others
            if not any(is_same_file(file, path) for path in own)
            and file.suffix.lower() not in beside
        )
        kinds["described"] = len(self._passed)
        listed = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()) if n)
        done = len(self._before - self._failed)
        left = self._seen - self._before - self._written - self._failed - self._passed
        counts = (
            f"{len(self._written - self._failed)} written",
            f"{done} done before" if done else "",
            f"{len(self._failed)} failed",
            f"{n} left" if (n := sum(map(os.path.lexists, left))) else "",
            f"{kinds.total()} skipped" + (f" ({listed})" if listed else ""),
        )
        return ", ".join(filter(None, counts))


def _key(image: str) -> str:
    """By what a picture is known, however its path was given; links stay as they are."""
    return str(absolute_path(image))


def _open_captions(out: str, columns: Sequence[str], existing: Existing) -> Captions:
    if out == BESIDE:
        if existing.overwrites and not existing.starts_over:
            raise ValueError(f"--overwrite with --out {BESIDE} cannot tell what is done already.")
        return TextFiles(existing.overwrites, existing.takes_any)
    path = Path(out)
    return Lines(path, columns) if path.suffix == ".jsonl" else Table(path, columns)


def _refuse(count: int, what: str) -> None:
    if count:
        raise FileExistsError(f"There are {count} {what}.")


def _kind(file: Path) -> str:
    """What a file is that is not captioned, in a word."""
    if not file.exists():
        return "broken link"
    return "closed folder" if file.is_dir() else file.suffix.lower() or "without ending"
