"""Write docs/api.md from the docstrings.

python scripts/make_api_docs.py
"""

from __future__ import annotations

import inspect
import pydoc
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
#: What is described, by module.
NAMES = {
    "mlx_llava": (
        *("load", "generate", "stream_generate", "batch_generate", "GenerationResponse"),
        *("Processor", "Llava", "LlavaConfig", "load_image", "convert"),
    ),
    "mlx_llava.inputs.processor": ("Inputs",),
    "mlx_llava.generation.steps": ("generate_step",),
    "mlx_llava.generation.sampling": ("Options",),
    "mlx_llava.generation.batch": ("BatchGenerator",),
    "mlx_llava.generation.prompt_cache": ("PromptCache",),
    "mlx_llava.inputs.templates": ("get_template",),
    "mlx_llava.explain": (
        *("explain", "Explanation", "trace", "Trace", "nearest_words", "logit_lens"),
        *("mask_effect", "MaskEffect"),
    ),
    "mlx_llava.analysis.plots": (
        *("plot_pictures", "plot_maps", "plot_attention", "plot_heads", "plot_rollout"),
        *("plot_mask_effect", "plot_lens", "plot_nearest_words", "plot_shares", "plot_flow"),
        "plot_losses",
    ),
    "mlx_llava.tuner.recipe": ("TrainingOptions",),
}
#: The docstrings' way of writing results: one, without a name.
OPTIONS = {
    "returns_multiple_items": False,
    "returns_named_value": False,
    "warn_unknown_params": False,  # those of **options
}
HEAD = """# Python API

Made from the docstrings by `scripts/make_api_docs.py`. What the top level does not export may
change with a minor version.
"""


def page() -> str:
    """The whole page."""
    package = griffe.load(
        "mlx_llava", search_paths=[ROOT], docstring_parser="google", docstring_options=OPTIONS
    )
    parts = [HEAD]
    for module, names in NAMES.items():
        parts.append(f"## {module}\n")
        found = package if module == package.path else package[module.partition(".")[2]]
        for name in names:
            path = found.imports.get(name, f"{module}.{name}")  # where it is defined
            parts += describe(package[path.partition(".")[2]])
    return "\n".join(parts)


def describe(thing: Any) -> list[str]:
    """A function, or a class and its public methods."""
    if thing.docstring:  # a decorator may have said more than the source does
        thing.docstring.value = inspect.getdoc(pydoc.locate(thing.path)) or ""
    lines = [f"### {thing.name}\n", f"```text\n{signature(thing)}\n```\n", *sections(thing)]
    methods = thing.functions if thing.is_class else {}
    for name, method in methods.items():
        if (not name.startswith("_") or name == "__call__") and method.docstring:
            shown = f"```text\n{signature(method)}\n```\n"
            lines += [f"#### {thing.name}.{name}\n", shown, *sections(method)]
    return lines


def signature(thing: Any) -> str:
    """How it is called, on one line or on one for each parameter."""
    shown, keyword_only = [], False
    real: Any = pydoc.locate(thing.path)
    found = inspect.signature(real)
    function = thing.functions.get("__init__") if thing.is_class else thing
    written = {} if is_dataclass(real) else {p.name: p.default for p in function.parameters}
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        stars: dict[Any, str] = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        has_default = parameter.default is not parameter.empty
        value = written.get(parameter.name) or repr(parameter.default)
        default = f" = {value}" if has_default else ""
        annotation = f": {parameter.annotation}" if isinstance(parameter.annotation, str) else ""
        shown.append(f"{stars.get(parameter.kind, '')}{parameter.name}{annotation}{default}")
    result = "" if thing.is_class else f" -> {found.return_annotation}"
    line = f"{thing.name}({', '.join(shown)}){result}"
    if len(line) <= 90:
        return line
    inner = "".join(f"    {parameter},\n" for parameter in shown)
    return f"{thing.name}(\n{inner}){result}"


def sections(thing: Any) -> list[str]:
    """What its docstring says."""
    lines = []
    for section in thing.docstring.parsed if thing.docstring else []:
        kind = section.kind.value
        if kind == "text":
            lines.append(f"{section.value}\n")
        elif kind in ("parameters", "attributes"):
            lines += [f"- `{item.name}`: {flat(item.description)}" for item in section.value]
            lines.append("")
        elif kind in ("returns", "yields", "raises"):
            for item in section.value:
                known = "" if kind == "raises" else f"{item.annotation}: "  # in the signature
                what = f"`{item.annotation}`: " if kind == "raises" else ""
                description = flat(item.description).removeprefix(known)
                lines.append(f"{kind.capitalize()}: {what}{description}\n")
    return lines


def flat(text: str) -> str:
    """A description on one line."""
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
