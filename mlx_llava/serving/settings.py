"""How a server serves: what its owner allows, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_llava.files import expand_home
from mlx_llava.generation.sampling import BATCH_SIZE
from mlx_llava.json_files import read_text
from mlx_llava.serving.durations import as_seconds
from mlx_llava.signatures import check_bounds, documented, option

MIN_KEY_LENGTH = 16
MEGA = 1_000_000


@documented
@dataclass(frozen=True)
class Settings:
    """A server's settings; its command has a flag for each."""

    host: str = option("127.0.0.1", str, "where to listen; 127.0.0.1 is this machine only")
    port: int = option(8080, int, "0 takes a free one", ge=0, le=65535)
    model_id: str | None = option(
        None, str, "what clients call the only model (default: its own name)", {"metavar": "NAME"}
    )
    alias: Sequence[str] = option(
        (),
        str,
        "another name of the first model, as llava, with whatever :tag; repeatable",
        {"action": "append", "default": [], "metavar": "NAME"},
    )
    api_key: str | None = option(None, str, "what clients must send", {"metavar": "KEY"})
    api_key_file: str | None = option(None, str, "a file that holds it", {"metavar": "FILE"})
    allow_host: Sequence[str] = option(
        (),
        str,
        "a name of this machine that clients use; repeatable",
        {"action": "append", "default": [], "metavar": "NAME"},
    )
    allow_origin: Sequence[str] = option(
        (),
        str,
        "a web page of another server that may ask, as https://example.org; repeatable",
        {"action": "append", "default": [], "metavar": "URL"},
    )
    allow_remote_images: bool = option(False, bool, "fetch pictures from public addresses")
    image_root: str | None = option(
        None, str, "a folder whose pictures may be named in requests", {"metavar": "DIR"}
    )
    batch_size: int = option(BATCH_SIZE, int, "answers at once", ge=1)
    max_waiting: int = option(64, int, "answers that wait", ge=0)
    max_images: int = option(16, int, "of a request", ge=1)
    max_pixels: int = option(100, int, "of a request, in millions", ge=1)
    max_body: int = option(50, int, "of a request, in MB", ge=1)
    keep_alive: str = option(
        "-1",
        str,
        "how long a model that nobody asks stays loaded, as 5m or 0; -1 is for ever",
        {"metavar": "TIME"},
    )
    timeout: float = option(600, float, "seconds for an answer", gt=0)
    prompt_cache: int = option(1000, int, "earlier prompts, in MB")

    def __post_init__(self) -> None:
        """Checks what was given, and reads the file of the key.

        Raises:
            ValueError: It makes no sense, or the key can be guessed or fits no header.
        """
        check_bounds(self)
        as_seconds(self.keep_alive)
        if self.root is not None and not self.root.is_dir():
            raise ValueError(f"--image-root is {self.root}, which is no folder.")
        key = self.api_key
        if self.api_key_file is not None:
            if key is not None:
                raise ValueError("There are --api-key and --api-key-file; give one of them.")
            key = read_text(expand_home(self.api_key_file)).strip()
            object.__setattr__(self, "api_key", key)
        if key is not None and not (
            len(key) >= MIN_KEY_LENGTH and key.isascii() and key.isprintable()
        ):
            raise ValueError(
                f"The API key has {len(key)} characters; use at least {MIN_KEY_LENGTH} of ASCII, "
                "as openssl rand -hex 16 makes them."
            )

    @property
    def keep_alive_seconds(self) -> float:
        """Of a model that nobody asks; infinite for ever."""
        return as_seconds(self.keep_alive)

    @property
    def root(self) -> Path | None:
        """Of the images that may be named."""
        return None if self.image_root is None else expand_home(self.image_root)
