"""What the package promises: its layers, its public names, its weight."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_llava
from tests.conftest import ROOT

PACKAGE = ROOT / "mlx_llava"

#: The rooms, lowest first; each imports only from lower ones, and rooms on one line never meet.
#: Files at the top that are none of these are commands.
ROOMS = (
    {"version", "files", "json_files", "folders", "signatures", "interrupts"},
    {"model"},
    {"inputs"},
    {"checkpoint"},
    {"generation"},
    {"tuner", "serving", "analysis", "captioning"},
    {"commands"},
)
GROUND, *_ = ROOMS
LEVEL_OF = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
)


def room_of(module: str) -> str:
    room = module.partition(".")[0]
    return room if room in LEVEL_OF else "commands"


def imports(module: str) -> set[str]:
    """The modules of this package that a module imports when it is used."""
    path = PACKAGE / module.replace(".", "/")
    tree = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_llava"):
            name = node.module.removeprefix("mlx_llava").removeprefix(".")
            found |= {name} if name else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            found |= {n.removeprefix("mlx_llava.") for n in names if n.startswith("mlx_llava.")}
    return found


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_imports_point_only_downward(module):
    room = room_of(module)
    upward = {
        name
        for name in imports(module)
        if room_of(name) != room and LEVEL_OF[room_of(name)] >= LEVEL_OF[room]
    }
    assert room in GROUND or not upward
    assert room not in GROUND or all(room_of(name) in GROUND for name in imports(module))


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) == "inputs"])
def test_inputs_never_import_mlx(module):
    tree = ast.parse((PACKAGE / module.replace(".", "/")).with_suffix(".py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in nodes for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not [name for name in names if name.partition(".")[0] == "mlx"]


def test_inputs_work_without_mlx():
    names = [module for module in MODULES if room_of(module) == "inputs"]
    lines = [f"import mlx_llava.{name.removesuffix('.__init__')}" for name in names]
    check = "\n".join(["import sys", "sys.modules['mlx'] = None", *lines])
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True)


def test_no_file_is_too_long():
    long = {path.name for path in PACKAGE.rglob("*.py") if path.read_text().count("\n") > 400}
    assert not long


def test_the_network_is_short():
    """The five statements that a LLaVA is, and what they are made of: 600 lines of code at most."""
    names = "clip", "siglip", "projector", "llama", "llava"
    assert sum(lines_of_code(PACKAGE / "model" / f"{name}.py") for name in names) <= 600


def lines_of_code(path: Path) -> int:
    """Without comments and texts that stand alone."""
    text = path.read_text()
    texts = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(line) and line[0] != "#" and i not in texts for i, line in lines)


def test_public_names():
    assert mlx_llava.__all__ == [
        "GenerationResponse",
        "Llava",
        "LlavaConfig",
        "Processor",
        "__version__",
        "batch_generate",
        "convert",
        "generate",
        "load",
        "load_image",
        "stream_generate",
    ]
    for name in ("batch_generate", "convert", "generate", "load", "load_image", "stream_generate"):
        assert callable(getattr(mlx_llava, name))


def test_everything_public_is_documented():
    undocumented = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [tree, *(n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))]
        undocumented += [
            f"{path.name}:{getattr(node, 'name', 'module')}"
            for node in nodes
            if not getattr(node, "name", "").startswith("_") and not ast.get_docstring(node)
        ]
    assert not undocumented


@pytest.mark.parametrize(
    "code",
    [
        "import mlx_llava",
        "from mlx_llava.generate import main\n    try: main(['--help'])\n"
        "    finally: assert not {'numpy', 'PIL', 'tokenizers'} & {*sys.modules}",
        "from mlx_llava.generate import main; "
        "main(['--model', 'tests/goldens/llava', '--image', 'tests/goldens/picture.png', "
        "'--prompt', 'hi', '-m', '3'])",
        "from mlx_llava.generate import main; "
        "main(['--model', 'tests/goldens/llava', '--prompt', 'hi', '-m', '3', '--temp', '1', "
        "'--top-p', '0.9', '--top-k', '9', '--min-p', '0.1', '--repetition-penalty', '1.1'])",
        "from mlx_llava.train import main; "
        "main(['--model', 'tests/goldens/llava', '--data', f'{folder}/train.json', '--stage', "
        "'lora', '--steps', '1', '--batch-size', '1', '--output', f'{folder}/trained']); "
        "from mlx_llava.generate import main; "
        "main(['--model', 'tests/goldens/llava', '--adapter-path', f'{folder}/trained/adapter', "
        "'--prompt', 'hi', '-m', '3'])",
    ],
    ids=["import", "help", "generate", "sampling", "lora"],
)
def test_transformers_and_torch_are_not_imported(code, tmp_path):
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A star."}]
    (tmp_path / "train.json").write_text(json.dumps([{"conversations": turns}]))
    check = (
        f"import sys\nfolder = {str(tmp_path)!r}\ntry:\n    {code}\nexcept SystemExit: pass\n"
        "heavy = {'transformers', 'torch', 'mlx_lm', 'huggingface_hub', 'httpx'} & {*sys.modules}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True)


def test_the_version_is_in_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{mlx_llava.__version__}]" in changelog
