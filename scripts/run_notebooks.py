"""Run notebooks from top to bottom, and keep their outputs in them.

    python scripts/run_notebooks.py [notebooks/1_quickstart.ipynb ...]

Needs ``pip install '.[notebook]'``.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
#: Of one cell.
SECONDS = 1200


def run(path: Path) -> Any:
    """A notebook with the outputs that it has now, and little that changes from run to run."""
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(NOTEBOOKS.parent)}
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": NOTEBOOKS}})
    client.execute(env=environment)
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(notebook.cells, 1):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs with what was printed in one piece, and of each result its best form only."""
    joined: list[Any] = []
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            data["image/png"] = _palette(data["image/png"])
        if data.keys() & {"image/png", "text/html"}:
            data.pop("text/plain", None)
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            joined.append(output)
    return joined


def _palette(png: str) -> str:
    """A figure in a palette of its own, which is half the size."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="(default: all)")
    for path in parser.parse_args().notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        started = time.perf_counter()
        notebook = run(path)
        nbformat.write(notebook, path)
        seconds, size = time.perf_counter() - started, path.stat().st_size
        print(f"{path.name}: {len(notebook.cells)} cells, {seconds:.0f} s, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
