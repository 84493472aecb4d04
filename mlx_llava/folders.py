"""Folders that are there whole or not at all, and that replace only what this package wrote.

A folder that is written here has a hidden manifest: its kind, and a fingerprint of each file.
While it is being written, its manifest lists nothing yet.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mlx_llava.files import expand_home, hidden, is_same_file, locked, real_path
from mlx_llava.json_files import read_json, write_json
from mlx_llava.version import __version__

Kind: TypeAlias = Literal["model", "adapter", "checkpoint"]

MANIFEST = ".mlx_llava.json"
#: What a file's fingerprint reads at either end.
_ENDS = 1 << 20
#: Files of model folders without a manifest: other programs', and those of versions before 0.2.
_MODEL_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(config|generation_config|"
    r"preprocessor_config|processor_config|tokenizer|tokenizer_config|added_tokens|"
    r"special_tokens_map|chat_template|vocab)\.json|merges\.txt|tokenizer\.model|"
    r"chat_template\.jinja|README\.md|\.gitattributes"
)
_SYSTEM_FILES = re.compile(r"\._.*|\.DS_Store|Thumbs\.db|desktop\.ini")


@contextmanager
def new_folder(
    target: Path, kind: Kind, force: bool = False, keep: Iterable[str | Path | None] = ()
) -> Iterator[Path]:
    """A folder to fill beside the target, which takes its name when it is complete.

    Whatever ends the program before leaves a hidden ``.NAME.partial``, which the next try
    removes, and under the target's name what was there. What is replaced steps aside as
    ``.NAME.replaced`` and is removed file by file, so that no moment loses anything.

    Args:
        target (Path): The folder to make.
        kind (str): ``model``, ``adapter`` or ``checkpoint``.
        force (bool): Replaces a folder of that kind that is there.
        keep (iterable of str or Path): See `check_target`.

    Raises:
        FileExistsError: There is something at the target that is not replaced.
    """
    keep = list(keep)
    check_target(target, kind, force, keep)
    place = real_path(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = hidden(place, ".partial")
    _remove_unfinished(beside, kind)
    remove_folder(beside, kind)
    remove_folder(hidden(place, ".replaced"), kind)
    beside.mkdir()
    with locked(beside / MANIFEST, beside):
        try:
            write_json(beside / MANIFEST, {"kind": kind})
            yield beside
            _write_manifest(beside, kind)
            check_target(target, kind, force, keep)
            _swap(beside, place, kind)
        except BaseException:
            with suppress(OSError):
                _empty(beside)
            raise


def check_target(
    target: Path, kind: Kind, force: bool = False, keep: Iterable[str | Path | None] = ()
) -> None:
    """Raises FileExistsError unless a folder may be written, before anything is computed.

    Args:
        target (Path): The folder to make.
        kind (str): ``model``, ``adapter`` or ``checkpoint``.
        force (bool): A folder that is there may be replaced, if everything in it is known to
            come from this package or to be of a model.
        keep (iterable of str or Path): What is read meanwhile, and never replaced, nor what it
            lies in, nor what lies in it; names of repositories are passed over.
    """
    if target.is_symlink():
        raise FileExistsError(f"{target} is a link to {target.readlink()}; give a folder.")
    place = real_path(target)
    _put_back(place, kind)
    if not place.exists():
        return
    if not force:
        raise FileExistsError(f"{target} exists already; --force replaces it.")
    if not place.is_dir() or os.path.ismount(place):
        raise FileExistsError(f"{target} is no folder that can be replaced; choose another.")
    if _contains(place, Path.cwd()):
        raise FileExistsError(f"{target} is where this command runs; choose another folder.")
    for path in [expand_home(path) for path in keep if path is not None]:
        if path.exists() and (_contains(place, path) or _contains(path, place)):
            raise FileExistsError(
                f"{target} is, holds or lies in {path}, which is read; choose another folder."
            )
    _, strangers = _sort(place, kind)
    if strangers:
        more = f" and {len(strangers) - 1} more" if strangers[1:] else ""
        raise FileExistsError(
            f"{target} holds {strangers[0]}{more}, not written by mlx_llava as a part of a {kind} "
            "or changed since; nothing was replaced, choose another folder."
        )


def _contains(folder: Path, path: Path) -> bool:
    """Whether a path is a folder or lies in it, whatever links, case or mounts lead there."""
    path = real_path(path)
    return any(is_same_file(parent, folder) for parent in (path, *path.parents))


def fingerprint(path: Path) -> str:
    """A hash of a file's size and of its first and last megabyte."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(max(0, size - _ENDS))
        digest.update(file.read(_ENDS))
    return digest.hexdigest()


def _remove_unfinished(beside: Path, kind: Kind) -> None:
    """Removes what a kill has left while it was being filled."""
    if beside.is_symlink() or not beside.is_dir():
        return
    if os.path.lexists(beside / MANIFEST):
        with locked(beside / MANIFEST, beside):
            is_unfinished = not _listed(beside, kind)
    else:
        is_unfinished = not any(beside.iterdir())
    if is_unfinished:
        _empty(beside)


def _empty(beside: Path) -> None:
    """Removes a folder that is ours; the manifest, without which the rest is nobody's, last."""
    for path in sorted(beside.iterdir(), key=lambda path: path.name == MANIFEST):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    beside.rmdir()


def _write_manifest(folder: Path, kind: Kind) -> None:
    listed = {
        path.relative_to(folder).as_posix(): fingerprint(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not _SYSTEM_FILES.fullmatch(path.name)
    }
    write_json(folder / MANIFEST, {"kind": kind, "version": __version__, "files": listed})


def _sort(folder: Path, kind: Kind) -> tuple[list[Path], list[str]]:
    """The files and folders of a folder that are ours, and the names of what may be a user's."""
    listed = _listed(folder, kind)
    is_model = kind == "model" and _is_bare_model(folder)

    def is_ours(path: Path, name: str) -> bool:
        if path.is_symlink() or not path.is_file():
            return not path.is_symlink() and any(file.startswith(f"{name}/") for file in listed)
        if name in listed:
            return fingerprint(path) == listed[name]
        is_known = is_model and _MODEL_FILES.fullmatch(name)
        return bool(is_known or _SYSTEM_FILES.fullmatch(path.name) or (name == MANIFEST and listed))

    ours: list[Path] = []
    strangers: list[str] = []

    def look(here: Path) -> None:
        for path in sorted(here.iterdir()):
            name = path.relative_to(folder).as_posix()
            if not is_ours(path, name):
                strangers.append(name)
                continue
            if path.is_dir():
                look(path)
            ours.append(path)

    look(folder)
    return ours, strangers


def _listed(folder: Path, kind: Kind) -> dict[str, Any]:
    """The files that a folder's manifest lists; none where it is unfinished or not there."""
    try:
        manifest = read_json(folder / MANIFEST)
        return dict(manifest.get("files", {})) if manifest.get("kind") == kind else {}
    except (ValueError, TypeError, OSError):
        return {}


def _is_bare_model(folder: Path) -> bool:
    """Whether a folder has no manifest, but the config and the weights of a model."""
    has_weights = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return has_weights and not os.path.lexists(folder / MANIFEST)


def _swap(beside: Path, place: Path, kind: Kind) -> None:
    """Gives a folder its name; what had the name steps aside first, and is removed last."""
    replaced = hidden(place, ".replaced")
    if place.exists():
        if _is_bare_model(place):
            _write_manifest(place, kind)  # so that what a kill leaves of it is known as ours
        place.rename(replaced)
    try:
        beside.rename(place)
    except BaseException:
        _put_back(place, kind)
        raise
    remove_folder(replaced, kind)


def _put_back(place: Path, kind: Kind) -> None:
    """Gives a folder its name again that a kill has left aside, if all of it is there."""
    replaced = hidden(place, ".replaced") if place.name else place
    if os.path.lexists(place) or not replaced.is_dir():
        return
    ours, strangers = _sort(replaced, kind)
    if not strangers and {*ours} >= {replaced / name for name in _listed(replaced, kind)}:
        replaced.rename(place)


def remove_folder(folder: Path, kind: Kind) -> None:
    """Removes a folder that was written here, file by file.

    Raises:
        FileExistsError: There is something else in it.
    """
    if not os.path.lexists(folder):
        return
    ours, strangers = _sort(folder, kind) if not folder.is_symlink() else ([], ["a link"])
    if strangers:
        raise FileExistsError(
            f"{folder} is in the way, and holds {strangers[0]}, which is not known to come from "
            "mlx_llava; move it away."
        )
    ours.sort(key=lambda path: path.name == MANIFEST)  # without it, the rest would be nobody's
    for path in ours:
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
