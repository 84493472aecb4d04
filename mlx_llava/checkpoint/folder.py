"""All tensors of a folder: safetensors or PyTorch files, one or shards with an index."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mlx_llava.checkpoint import safetensors
from mlx_llava.checkpoint.tensors import LazyTensor
from mlx_llava.checkpoint.torch_file import read_torch_file
from mlx_llava.json_files import read_json

#: The two ways to store weights: their index, and the files where there is no index.
_KINDS = (
    (safetensors.INDEX, "*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
)


def find_files(folder: Path) -> list[Path]:
    """The weight files of a folder, checked to be all there; safetensors go first.

    Raises:
        FileNotFoundError: There are none, or a shard is missing.
    """
    for index_name, pattern in _KINDS:
        index = read_json(folder / index_name)
        expected = set(index.get("weight_map", {}).values())
        if any(Path(name).name != name for name in expected):
            raise ValueError(f"{folder / index_name} names files outside its folder.")
        if not expected:
            found = {path.name for path in folder.glob(pattern)}
            expected = {sibling for name in found for sibling in _siblings(name)}
        missing = sorted(name for name in expected if not (folder / name).exists())
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {len(expected)} weight files: "
                f"{', '.join(missing)}. Download them again."
            )
        if expected:
            return [folder / name for name in sorted(expected)]
    raise FileNotFoundError(f"{folder} has no *.safetensors and no pytorch_model*.bin files.")


def _siblings(name: str) -> Iterable[str]:
    """All shards of model-00001-of-00003.safetensors; a plain name is its own only sibling."""
    match = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.\w+)", name)
    if not match:
        return [name]
    stem, number, of, total, end = match.groups()
    return [f"{stem}{i:0{len(number)}}{of}{total}{end}" for i in range(1, int(total) + 1)]


def read_file(path: Path) -> tuple[dict[str, LazyTensor], bool]:
    """The tensors of one file, however they are stored, and whether MLX laid them out."""
    if path.suffix == ".safetensors":
        return safetensors.read_file(path)
    return read_torch_file(path), False


def read_folder(folder: Path) -> tuple[dict[str, LazyTensor], bool]:
    """The tensors of all files, and whether they are in MLX's own layout.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is broken, or two files hold a tensor of the same name.
    """
    tensors: dict[str, LazyTensor] = {}
    is_mlx = False
    for path in find_files(folder):
        new, new_is_mlx = read_file(path)
        is_mlx |= new_is_mlx
        for key in new.keys() & tensors.keys():
            raise ValueError(f"{tensors[key].source} and {new[key].source} are the same tensor.")
        tensors |= new
    return tensors, is_mlx
