"""Where a checkpoint is: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_llava.checkpoint.download import download, fitting_model
from mlx_llava.files import expand_home, real_path
from mlx_llava.signatures import option

#: The model that comes with the package: beside it in a checkout, inside it when installed.
EMBEDDED = "tiny-llava"


@dataclass(frozen=True)
class Source:
    """Where a checkpoint and its parts are; `load` has a keyword, and commands a flag, for each."""

    model: str | Path | None = option(None, str, "a folder, a GGUF file, or a hub repository")
    base: str | Path | None = option(
        None, str, "the model that a delta, a LoRA or a projector belongs to"
    )
    vision_tower: str | Path | None = option(
        None, str, "CLIP or SigLIP, for checkpoints without a vision tower inside"
    )
    mmproj: str | Path | None = option(None, str, "the second file of a GGUF pair")
    revision: str | None = option(None, str, "branch, tag or commit of a hub repository")
    offline: bool = option(False, bool, "use only what was downloaded before")

    def find(self, part: str | Path) -> Path:
        """The local folder or file of a part."""
        return find_checkpoint(part, None, self.offline)


def embedded_model() -> Path:
    """The folder of the model that comes with the package."""
    package = Path(__file__).parent.parent
    for parent in (package, package.parent):
        folder = parent / "weights" / EMBEDDED
        if (folder / "config.json").exists():
            return folder
    raise FileNotFoundError(f"{package} came without its embedded model; name a model.")


def embedded_note() -> str:
    """What the embedded model is, and which model of photographs this machine has memory for."""
    return (
        "note: this is the embedded model, which only knows drawings of coloured shapes; for "
        f"photographs: {fitting_model()}"
    )


def find_checkpoint(
    path_or_repo: str | Path | None,
    revision: str | None,
    offline: bool,
    memory: int | None = None,
) -> Path:
    """The local folder (or file) of a checkpoint; a repository is downloaded, a folder never is.

    Without a name it is the embedded model. `memory` is what a repository's weights have to fit,
    where they are to be loaded.

    Raises:
        FileNotFoundError: It is none of these.
    """
    if path_or_repo is None:
        return embedded_model()
    path = expand_home(path_or_repo)
    if path.exists():
        return path
    name = str(path_or_repo)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder {name}.")
    return download(name, revision, offline, memory)


def lasting_part(part: str | Path | None) -> str | None:
    """A part of a checkpoint by a path that means the same in another folder, or by its repository.

    Without a name it stays without one.
    """
    if part is None:
        return None
    path = expand_home(part)
    return str(real_path(path) if path.exists() else part)


def checkpoint_name(path: Path) -> str:
    """What a checkpoint is called: its repository in the hub's cache, or its folder.

    A snapshot's folder is named by a hash. A training's ``checkpoint-500`` says as little, so the
    folder around it is named too, as the original does.
    """
    path = (path.parent if path.is_file() else path).absolute()
    for parent in path.parents:
        if parent.name.startswith("models--"):
            return parent.name.removeprefix("models--").replace("--", "/")
    return f"{path.parent.name}/{path.name}" if path.name.startswith("checkpoint-") else path.name
