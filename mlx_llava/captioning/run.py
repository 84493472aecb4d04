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
from mlx_llava.files import is_same_file, one_line
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
    def is_refused(self) -> bool:
        """Whether nothing may be there."""
        return not (self.resumes or self.skips or self.overwrites)


class Run:
    """The files of a run, and which pictures are done.

    Attributes:
        errors: why pictures have no caption.
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
        self._sidecars = Sidecars(existing.overwrites) if xmp else None
        self._existing = existing
        self._seen, self._before, self._passed = set[str](), set[str](), set[str]()
        self._written, self._has_begun = set[str](), False
        self._broken, self._rows = {*dict(self.errors.rows())}, dict[str, dict[str, Any]]()
        self._look_back()

    def _look_back(self) -> None:
        """Reads the captions of an earlier run, unless this one replaces them."""
        if self._existing.starts_over:
            self._broken = set()
            return
        if not isinstance(self._captions, TextFiles):
            self._rows = self._named_as_now(self._captions.rows())
        begun = [path for path in self._tables() if path.exists()]
        if begun and self._existing.is_refused:
            raise FileExistsError(f"There is {begun[0]} already; --resume goes on.")
        if not self._existing.resumes or self._existing.skips:
            return
        if not self._settings.check() and begun:
            warnings.warn(
                f"Nothing says how the captions in {begun[0]} were asked for.", stacklevel=2
            )

    def _named_as_now(
        self, rows: Iterable[tuple[str, dict[str, Any]]]
    ) -> dict[str, dict[str, Any]]:
        """Rows by the names that pictures have now; a new picture may have an old name."""
        renamed = defaultdict[str, list[str]](list)
        for first, now in self.renames.names():
            renamed[first].append(Path(now).name)
        named = {}
        for image, row in rows:
            later = renamed.get(os.path.abspath(image))  # noqa: PTH100 - links stay as they are
            named[str(Path(image).with_name(later.pop(0))) if later else image] = row
        return named

    def _tables(self) -> list[Path]:
        """The files with a line for each picture."""
        own = [] if isinstance(self._captions, TextFiles) else [self._captions.path]
        return [*own, self.errors.path]

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
        if image in self._broken:
            return True
        if self._has_caption(image):
            self._before.add(image)
            if self._sidecars and not self._sidecars.is_described(image):
                self._keep(image, [self._write_sidecar])
            return True
        if self._sidecars and not self._existing.overwrites and self._sidecars.is_described(image):
            self._passed.add(image)
            return True
        return False

    def _has_caption(self, image: str) -> bool:
        if isinstance(self._captions, TextFiles):
            return self._captions.has(image)
        return image in self._rows

    def keep(self, image: str, values: Mapping[str, Any]) -> None:
        """Keeps a caption for good, or why it cannot be kept."""
        self._begin()
        self._rows[image] = dict(values)
        steps = [self._write_caption, *([self._write_sidecar] if self._sidecars else [])]
        # What is written last may be missing after a kill: what is replaced is replaced again,
        # and what is new is written anew from the caption.
        self._keep(image, steps[::-1] if self._existing.overwrites else steps)

    def fail(self, image: str, error: Exception) -> None:
        """Keeps why a picture has no caption."""
        self._begin()
        self.errors.write(image, {"error": one_line(error)})
        self._broken.add(image)

    def _keep(self, image: str, steps: Iterable[Callable[[str], None]]) -> None:
        try:
            with waiting_interrupts():
                for step in steps:
                    step(image)
        except ValueError as error:
            self.fail(image, error)

    def _write_caption(self, image: str) -> None:
        self._captions.write(image, self._rows[image])
        self._written.add(image)

    def _write_sidecar(self, image: str) -> None:
        if self._sidecars:
            self._sidecars.write(image, whole_text(self.caption(image)))

    def _begin(self) -> None:
        """Before the first line: takes away what is replaced, and what is half written."""
        if self._has_begun:
            return
        self._has_begun = True
        if self._existing.starts_over:
            for path in self._tables():
                path.unlink(missing_ok=True)
        self.errors.path.parent.mkdir(parents=True, exist_ok=True)
        self._captions.mend()
        self.errors.mend()
        self._settings.keep()

    def caption(self, image: str) -> dict[str, Any]:
        """The caption of a picture that has one."""
        if isinstance(self._captions, TextFiles):
            return self._captions.row(image)
        return self._rows[image]

    def titles(self) -> dict[str, str]:
        """What captioned pictures may be called by, in order of their names."""
        captioned = [i for i in sorted(self._seen - self._broken) if self._has_caption(i)]
        return {image: as_text(next(iter(self.caption(image).values()))) for image in captioned}

    def check(self) -> None:
        """Raises ValueError where something is wrong with a picture."""
        if failed := len(self._broken & self._seen):
            raise ValueError(
                f"{failed} of {len(self._seen)} pictures have no caption; {self.errors.path} says "
                "why."
            )

    def summary(self, others: Iterable[Path]) -> str:
        """What has become of everything that was found.

        Args:
            others (iterable): Files that were found and are no pictures.
        """
        own = [*self._tables(), self.renames.path, self._settings.path]
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
        done = len(self._before - self._broken)
        before = f"{done} done before, " if done else ""
        skipped = f"{kinds.total()} skipped" + (f" ({listed})" if listed else "")
        failed = self._broken & self._seen
        return f"{len(self._written - failed)} written, {before}{len(failed)} failed, {skipped}"


def _open_captions(out: str, columns: Sequence[str], existing: Existing) -> Captions:
    if out == BESIDE:
        if existing.overwrites and not existing.starts_over:
            raise ValueError(f"--overwrite with --out {BESIDE} cannot tell what is done already.")
        return TextFiles(existing.overwrites)
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
