"""All tensors of a folder: safetensors or PyTorch files, one or shards with an index."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mlx_llava.checkpoint import safetensors
from mlx_llava.checkpoint.tensors import LazyTensor
from mlx_llava.checkpoint.torch_file import read_torch_file
from mlx_llava.json_files import is_pointer, read_json

#: The two ways to store weights: the index of shards, the file that is no shard, all files.
_KINDS = (
    (safetensors.INDEX, "model.safetensors", "*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
)

#: What names of unfinished downloads end in: of browsers, curl, wget, aria2 and huggingface_hub.
_PARTIAL = (
    *(".aria2", ".crdownload", ".download", ".incomplete", ".opdownload", ".part", ".partial"),
    *(".tmp", ".filepart"),
)


def find_files(folder: Path) -> list[Path]:
    """The weight files of a folder, checked to be all there; safetensors go first."""
    for index_name, whole, pattern in _KINDS:
        index = read_json(folder / index_name)
        expected = set(index.get("weight_map", {}).values())
        if any(Path(name).name != name for name in expected):
            raise ValueError(f"{folder / index_name} names files outside its folder.")
        if not expected:
            found = {path.name for path in visible_files(folder, pattern)}
            expected = {sibling for name in found for sibling in _siblings(name)}
        missing = sorted(name for name in expected if not (folder / name).exists())
        if len(missing) == len(expected) and (folder / whole).exists():
            return [folder / whole]  # the index of what it was made of
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {len(expected)} weight files: "
                f"{', '.join(missing)}{_unfinished(folder)}. Download them again."
            )
        if expected:
            return [folder / name for name in sorted(expected)]
    raise FileNotFoundError(
        f"{folder} has no *.safetensors and no pytorch_model*.bin files{_unfinished(folder)}."
    )


def visible_files(folder: Path, *patterns: str) -> list[Path]:
    """The files of some patterns, in order, but for hidden ones.

    On disks of other systems, macOS writes a ._NAME beside each NAME.
    """
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if not path.name.startswith("."))


def _unfinished(folder: Path) -> str:
    """What downloads that did not end left in a folder, as the end of a sentence."""
    inside = [*folder.iterdir(), *folder.glob(".cache/huggingface/download/*")]
    names = sorted(path.name for path in inside if path.name.endswith(_PARTIAL))
    return f", but unfinished downloads: {', '.join(names)}" if names else ""


def _siblings(name: str) -> Iterable[str]:
    """All shards of model-00001-of-00003.safetensors; a plain name is its own only sibling."""
    match = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.\w+)", name)
    if not match:
        return [name]
    stem, number, of, total, end = match.groups()
    return [f"{stem}{i:0{len(number)}}{of}{total}{end}" for i in range(1, int(total) + 1)]


def check_download(path: Path) -> None:
    """Raises ValueError for a file that was not downloaded to its end."""
    with path.open("rb") as file:
        head = file.read(64)
    if is_pointer(head):
        raise ValueError(f"{path} is only Git LFS's pointer to the file: run git lfs pull.")
    control = path.with_name(f"{path.name}.aria2")
    if not head or control.exists():
        what = f"is not whole: there is {control.name}" if head else "is empty"
        raise ValueError(f"{path} {what}{_unfinished(path.parent)}. Download it again.")


def read_file(path: Path) -> tuple[dict[str, LazyTensor], bool]:
    """The tensors of one file, however they are stored, and whether MLX laid them out."""
    check_download(path)
    if path.suffix == ".safetensors":
        return safetensors.read_file(path)
    return read_torch_file(path), False


def read_folder(folder: Path) -> tuple[dict[str, LazyTensor], bool]:
    """The tensors of all files, and whether they are in MLX's own layout."""
    tensors: dict[str, LazyTensor] = {}
    is_mlx = False
    for path in find_files(folder):
        new, new_is_mlx = read_file(path)
        is_mlx |= new_is_mlx
        for key in new.keys() & tensors.keys():
            raise ValueError(f"{tensors[key].source} and {new[key].source} are the same tensor.")
        tensors |= new
    return tensors, is_mlx
