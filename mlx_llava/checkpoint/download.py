"""A repository of the Hugging Face hub -> a local folder; what that takes is said before."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_llava.files import disk_room, size_said
from mlx_llava.model.device import memory_said, total_memory

logger = logging.getLogger("mlx_llava")

_FILES = [
    "README.md",  # says the licence
    "*.json",
    "*.jinja",
    "*.safetensors",
    "tokenizer.model",
    "merges.txt",
    "non_lora_trainables.bin",
]
#: For repositories without safetensors.
_TORCH_FILES = ["pytorch_model*.bin", "mm_projector.bin", "adapter_model.bin"]
_GB = 1e9

#: What to try first: the memory that it wants, the repository, and its size, in GB.
_FIRST_MODELS = (
    (20, "llava-hf/llava-1.5-7b-hf", 14),
    (8, "mlx-community/llava-1.5-7b-4bit", 4),
    (0, "llava-hf/llava-interleave-qwen-0.5b-hf", 1.8),
)


def fitting_model() -> str:
    """Which model of photographs this machine has memory for, as a flag."""
    memory = total_memory() / _GB
    repo, size = next(row[1:] for row in _FIRST_MODELS if memory >= row[0])
    return f"--model {repo} (downloads {size} GB)"


def download(name: str, revision: str | None, offline: bool, memory: int | None) -> Path:
    """The local folder of a repository, once all of it is there.

    Args:
        name (str): ``owner/repository``.
        revision (str, optional): A branch, tag or commit.
        offline (bool): Takes only what was downloaded before.
        memory (int, optional): How many bytes of weights can be loaded, where they are to be.

    Raises:
        FileNotFoundError: There is no such repository, or it cannot be had.
        ValueError: The disk has no room for it, or memory has none.
    """
    patterns = _FILES
    if not offline:
        patterns = _look_ahead(name, revision, memory)
    folder = _fetch(name, patterns, revision, offline)
    if patterns == _FILES and not any(folder.glob("*.safetensors")):
        folder = _fetch(name, _FILES + _TORCH_FILES, revision, offline)
    return folder


def _look_ahead(name: str, revision: str | None, memory: int | None) -> list[str]:
    """Which files are needed; says how large those are that are not here yet.

    Where the hub does not answer, `_fetch` finds what is here, or says why there is nothing.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        files: Any = snapshot_download(
            name, revision=revision, allow_patterns=_FILES + _TORCH_FILES, dry_run=True
        )
    except Exception:
        return _FILES
    suffix = ".safetensors" if any(f.filename.endswith(".safetensors") for f in files) else ".bin"
    weights = [file for file in files if file.filename.endswith(suffix)]
    missing = sum(file.file_size or 0 for file in weights if file.will_download)
    if missing:
        _check_memory(name, sum(file.file_size or 0 for file in weights), memory)
        _check_disk(name, missing, Path(constants.HF_HUB_CACHE))
    return _FILES if suffix == ".safetensors" else _FILES + _TORCH_FILES


def _check_memory(name: str, nbytes: int, memory: int | None) -> None:
    if memory is not None and nbytes > memory:
        raise ValueError(
            f"{name} has {size_said(nbytes)} of weights and {memory_said()}, so nothing is "
            f"downloaded; this machine holds {fitting_model()}, or what mlx_llava.convert -q makes "
            f"of {name}."
        )


def _check_disk(name: str, nbytes: int, cache: Path) -> None:
    _, free = disk_room(cache)
    if nbytes > free:
        raise ValueError(
            f"{name} takes {size_said(nbytes)} of disk and {cache} has {size_said(free)} free, "
            "so nothing is downloaded; make room, or let HF_HOME name a folder on another disk."
        )
    logger.warning(
        f"note: {name} is downloaded once, {size_said(nbytes)}, to {cache}, which has "
        f"{size_said(free)} free"
    )


def _fetch(name: str, patterns: Sequence[str], revision: str | None, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), local_files_only=offline
            )
        )
    except (LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        where = "among the downloaded repositories" if offline else "on the Hugging Face hub"
        raise FileNotFoundError(
            f"There is no folder {name}, and it is not {where}: {_reason(error)}"
        ) from error
    except Exception as error:  # the hub's other errors, those of its HTTP library, a full disk
        raise FileNotFoundError(
            f"{name} could not be downloaded: {_reason(error)} What has come is kept; the same "
            "command goes on."
        ) from error


def _reason(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return reason if reason.endswith(".") else f"{reason}."
