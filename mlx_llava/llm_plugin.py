"""A plugin of llm (https://llm.datasette.io): ``llm -m mlx-llava -a photo.jpg 'What is it?'``.

llm reads this whatever it is asked for, so that what takes long is imported with the first prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import llm
import pydantic
from llm.parts import AttachmentPart, Message, TextPart

from mlx_llava.checkpoint.hub import Source, embedded_note
from mlx_llava.generation.sampling import Options

if TYPE_CHECKING:
    from mlx_llava import Llava, Processor
    from mlx_llava.generation.prompt_cache import PromptCache

_IMAGES = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "avif", "heic", "heif")
_VIDEOS = ("mp4", "quicktime", "webm", "x-matroska", "x-msvideo", "mpeg")
#: Options that llm's other models call by another name.
_OURS = {"temperature": "temp"}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
#: How a model is loaded, beside where it is.
_LOADING = {
    "adapter_path": "what was trained of the model, here or with PEFT",
    "template": "a built-in template instead of the checkpoint's own",
    "image_mode": "how pictures are cut: crop, pad or anyres",
    "dtype": "of all weights: float32, float16 or bfloat16",
}
#: How pictures are shown.
_SHOWING = {
    "frames": "how many frames are taken of a video",
    "image_tokens": "show at most so many features of each picture, those that differ most",
}
#: llm has schemas, and options of one text each.
_OMITTED = ("json_schema", "logit_bias")


def _options() -> dict[str, Any]:
    """All options as pydantic has them; None where one is not given."""
    options: dict[str, Any] = {
        _THEIRS.get(one.name, one.name): (
            one.metadata["kind"] | None,
            pydantic.Field(None, description=one.metadata["help"], **one.metadata["bounds"]),
        )
        for one in (*fields(Source), *fields(Options))
        if one.name not in _OMITTED
    }
    for names, kind in ((_LOADING, str | None), (_SHOWING, int | None)):
        options |= {n: (kind, pydantic.Field(None, description=d)) for n, d in names.items()}
    return options


class LlavaModel(llm.Model):
    """All of LLaVA's models; which one is an option."""

    model_id = "mlx-llava"
    can_stream = True
    supports_schema = True
    attachment_types = frozenset(
        [*(f"image/{kind}" for kind in _IMAGES), *(f"video/{kind}" for kind in _VIDEOS)]
    )
    Options = pydantic.create_model("Options", __base__=llm.Model.Options, **_options())

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,  # noqa: ARG002 - llm joins the words where it is not to be one
        response: llm.Response,
        conversation: llm.Conversation | None,  # noqa: ARG002 - the prompt has all of it
    ) -> Iterator[str]:
        """Answers a prompt, after all that was said and shown before."""
        from mlx_llava.generation.stream import stream_generate

        given = prompt.options.model_dump(exclude_none=True)
        options = {_OURS.get(name, name): value for name, value in given.items()}
        names = [*(one.name for one in fields(Source)), *_LOADING]
        where = {name: options.pop(name) for name in names if name in options}
        model, processor, cache = _load(**where)
        messages = [*map(_read, prompt.messages)]
        parts = stream_generate(
            *(model, processor, messages),
            prompt_cache=cache,
            json_schema=prompt.schema,
            **options,
        )
        for part in parts:
            yield part.text
        response.set_usage(input=part.prompt_tokens, output=part.generation_tokens)


@lru_cache(maxsize=1)
def _load(**where: Any) -> tuple[Llava, Processor, PromptCache]:
    """A model, its processor, and what it has read, of which a conversation reads nothing again."""
    from mlx_llava.checkpoint.load import load
    from mlx_llava.generation.prompt_cache import PromptCache

    name = where.pop("model", None)
    if name is None:
        print(embedded_note().replace("--model", "-o model"), file=sys.stderr)
    model, processor = load(name, **where)
    return model, processor, PromptCache(model)


def _read(message: Message) -> dict[str, Any]:
    """A message in OpenAI's shape."""
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, TextPart):
            text = part.text.strip() if message.role == "assistant" else part.text
            content.append({"type": "text", "text": text})
        elif isinstance(part, AttachmentPart) and (shown := part.attachment) is not None:
            kind = (shown.resolve_type() or "image").partition("/")[0]
            content.append({"type": kind, kind: shown.path or shown.url or shown.content})
    return {"role": message.role, "content": content}


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    """Tells llm what there is."""
    register(LlavaModel())
