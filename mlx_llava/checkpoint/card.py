"""README.md of a converted model: where it comes from, its licence, how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_llava.files import size_said
from mlx_llava.model.quantized import layer_settings
from mlx_llava.version import __version__

#: What a source's own card says that holds for what is made of it.
_INHERITED = ("license", "license_name", "license_link", "language", "datasets")
_BODY = """\
# {name}

Converted from {source} ({layout}) by mlx_llava {version}.

- size: {size}
- quantisation: {quantization}
- template: {template}

```sh
python -m mlx_llava.generate --model {name} --image photo.jpg --prompt "What is in this picture?"
```
"""


def model_card(
    name: str,
    source: str,
    read_from: Path,
    *,
    layout: str,
    nbytes: int,
    quantization: Mapping[str, Any] | None,
    template: str | None,
) -> str:
    """The text of README.md.

    Args:
        name (str): What the result is called: its folder, or its repository.
        source (str): What was converted, as `checkpoint_name` calls it.
        read_from (Path): The folder of that, whose own card may say its licence.
        layout (str): What it was found to be.
        nbytes (int): The size of the weights.
        quantization (dict, optional): As config.json has it.
        template (str, optional): The name of a built-in one.
    """
    from huggingface_hub import ModelCardData

    said = _metadata(read_from / "README.md")
    is_repository = source.count("/") == 1
    settings = layer_settings(quantization) if quantization else {}
    data = ModelCardData(
        **{key: said[key] for key in _INHERITED if key in said},
        library_name="mlx",
        pipeline_tag="image-text-to-text",
        tags=["mlx", "llava"],
        base_model=source if is_repository else said.get("base_model"),
        base_model_relation="quantized" if is_repository and settings else None,
    )
    body = _BODY.format(
        name=name,
        source=f"[{source}](https://huggingface.co/{source})" if is_repository else source,
        layout=layout,
        version=__version__,
        size=size_said(nbytes),
        quantization=", ".join(f"{key} {value}" for key, value in settings.items()) or "none",
        template=template or "in chat_template.jinja, or chosen by shape",
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _metadata(path: Path) -> dict[str, Any]:
    """What stands at the head of a card, if there is one that can be read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {} if path.is_file() else {}
    except Exception:  # no YAML, no mapping: somebody's notes
        return {}
