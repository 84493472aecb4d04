"""How captions were asked for, so that nobody goes on with them in another way unknowingly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_llava.files import check_output, whole_file
from mlx_llava.json_files import read_json, write_json

COMMAND = "mlx_llava.caption"


class RunSettings:
    """A file that says how the captions beside it were asked for."""

    def __init__(self, path: Path, given: Mapping[str, Any]) -> None:
        """Names the file, and what is given now.

        Raises:
            FileExistsError: There is such a file of somebody else's.
        """
        check_output(path, COMMAND)
        text = json.dumps(given, ensure_ascii=False).encode(errors="replace")
        self.path, self.given = path, json.loads(text)  # as it is read again

    def check(self, folder: str | None = None) -> bool:
        """Whether it is known how the captions so far were asked for.

        Args:
            folder (str, optional): Of captions that lie beside their pictures.

        Raises:
            ValueError: It was otherwise than now.
        """
        data = read_json(self.path)
        before = data.get("asked") if folder is None else data.get("folders", {}).get(folder)
        if before is None:
            return False
        differing = [
            f"--{key.replace('_', '-')} was {_short(value)}, now {_short(self.given[key])}"
            for key, value in before.items()
            if key in self.given and value != self.given[key]  # other versions have other flags
        ]
        if differing:
            where = "" if folder is None else f" in {folder}"
            raise ValueError(
                f"{self.path} says that captions so far{where} were asked for otherwise: "
                f"{'; '.join(differing)}. Ask as then, name another --out, or let --skip-existing "
                "add to them all the same."
            )
        return True

    def keep(self, folder: str | None = None) -> None:
        """Writes down what is given now."""
        data = read_json(self.path) | {"command": COMMAND}
        if folder is None:
            data["asked"] = self.given
        else:
            data["folders"] = {**data.get("folders", {}), folder: self.given}
        with whole_file(self.path) as beside:
            write_json(beside, data)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
