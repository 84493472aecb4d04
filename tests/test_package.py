"""What the package promises: its layers, its public names, its weight."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import mlx_llava
from tests.conftest import ROOT

PACKAGE = ROOT / "mlx_llava"

#: Imports point only downward.
LAYERS = (
    {"files", "rgb", "tiff"},
    {"image_files"},
    {
        "api_errors",
        "version",
        "backend",
        "command",
        "image",
        "known_keys",
        "limits",
        "sampling",
        "workers",
    },
    {
        "api_messages",
        "config_checks",
        "display",
        "json_bodies",
        "json_files",
        "kernels",
        "parameters",
        "picture_files",
        "remote",
    },
    {
        "scores",
        "folders",
        "activations",
        "cache",
        "machine",
        "vocabulary",
        "hub",
        "quantized",
        "rope_config",
    },
    {"byte_bpe", "config", "tokenizer", "checkpoint.tensors", "doctor", "mentions", "sources"},
    {
        "prompt",
        "template_choice",
        "streaming",
        "structured",
        "checkpoint.gguf_blocks",
        "checkpoint.gguf_config",
        "checkpoint.layout",
        "checkpoint.safetensors",
        "checkpoint.torch_file",
        "checkpoint.plain",
    },
    {"checkpoint.lora", "checkpoint.folder", "checkpoint.gptq"},
    {"checkpoint.peft", "checkpoint.mlx_lora", "tuner.samples"},
    {"anyres", "answer_formats", "templates", "clip", "projector", "llama", "tuner.skipped"},
    {"preprocess", "llava", "checkpoint.gguf", "checkpoint.original", "checkpoint.adapters"},
    {"processor", "checkpoint.open", "adapter", "precision", "memory"},
    {"load", "decoding", "reuse", "work", "tuner.data", "tuner.options"},
    {"batch", "plan", "tuner.losses", "tuner.optimizer", "tuner.stages", "verify"},
    {"prompts_file", "random_model", "tuner.trainer", "loading", "trace", "places"},
    {"generate", "evaluate", "engine", "protocol"},
    {"peers", "explanation", "session", "replies", "metrics", "bodies", "guard", "http_server"},
    {"connection", "measuring", "plots", "api"},
    {"report"},
    {"benchmark", "caption", "chat", "convert", "explain", "fuse", "server", "train"},
    {"", "cli"},
    {"__main__"},
)
LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer}

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def imports(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    path = PACKAGE / (module.replace(".", "/") or "__init__")
    tree = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_llava"):
            name = node.module.removeprefix("mlx_llava").removeprefix(".")
            submodules = {f"{name}.{alias.name}".strip(".") for alias in node.names} & {*LAYER_OF}
            found |= submodules or {name}
    return found


@pytest.mark.parametrize("module", ["", *MODULES])
def test_imports_point_only_downward(module):
    assert module in LAYER_OF, f"give {module} a layer"
    upward = {name for name in imports(module) if LAYER_OF[name] >= LAYER_OF[module]}
    assert not upward


def test_no_layer_lists_a_module_that_is_gone():
    assert {*LAYER_OF} == {"", *MODULES}


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
        "from mlx_llava.generate import main; main(['--help'])",
        "from mlx_llava.generate import main; "
        "main(['--model', 'tests/goldens/llava', '--image', 'tests/goldens/picture.png', "
        "'--prompt', 'hi', '-m', '3'])",
        "from mlx_llava.generate import main; "
        "main(['--model', 'tests/goldens/llava', '--prompt', 'hi', '-m', '3', '--temp', '1', "
        "'--top-p', '0.9', '--top-k', '9', '--min-p', '0.1', '--repetition-penalty', '1.1'])",
    ],
    ids=["import", "help", "generate", "sampling"],
)
def test_transformers_and_torch_are_not_imported(code):
    check = (
        "import sys\ntry:\n    " + code + "\nexcept SystemExit: pass\n"
        "heavy = {'transformers', 'torch', 'mlx_lm', 'huggingface_hub'} & {*sys.modules}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True)


def test_the_version_is_in_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{mlx_llava.__version__}]" in changelog
