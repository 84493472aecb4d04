"""Ollama's endpoints below ``/api``: those of answers, and what is told of the model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.chat_template import ChatTemplate
from mlx_llava.inputs.messages import Message
from mlx_llava.inputs.processor import Processor
from mlx_llava.serving.engine import Engine
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.forms import Form, read_form
from mlx_llava.serving.ollama import LINES, ChatRequest, GenerateRequest, line, moment
from mlx_llava.version import __version__

if TYPE_CHECKING:
    from mlx_llava.serving.app import Api

#: Whose API this is; some clients refuse one that is older than they know.
VERSION = "0.12.11"
#: Far enough that Ollama's command says "Forever".
NEVER = "9999-12-31T23:59:59Z"
ABSENT = "blobs/{digest} copy create delete embed embeddings push".split()


class _Named(Form):
    """A request about a model, which Ollama's older clients call `name`."""

    model: str = Field(validation_alias=AliasChoices("model", "name"))
    stream: bool = True


class Ollama:
    """The endpoints of Ollama's API, below ``/api``."""

    def __init__(self, api: Api) -> None:
        self._api, self._since = api, moment()

    def routes(self) -> list[Route]:
        posts: dict[str, Callable[..., Any]] = {
            "chat": partial(self._api.complete, kind=ChatRequest),
            "generate": partial(self._api.complete, kind=GenerateRequest),
            "pull": self.pull,
            "show": self.show,
        }
        return [
            *(Route(f"/{name}", endpoint, methods=["POST"]) for name, endpoint in posts.items()),
            *(Route(f"/{name}", _absent, methods=["POST", "DELETE", "HEAD"]) for name in ABSENT),
            Route("/version", self.version),
            Route("/tags", self.tags),
            Route("/ps", self.ps),
        ]

    async def version(self, _: HttpRequest) -> Response:
        return JSONResponse({"version": VERSION, "mlx_llava": __version__})

    async def tags(self, _: HttpRequest) -> Response:
        """All models that there are; a name without a tag has Ollama's own."""
        about = {"modified_at": self._since}
        names = self._api.models.names.items()
        return JSONResponse({"models": [{**_listed(*named), **about} for named in names]})

    async def ps(self, _: HttpRequest) -> Response:
        """Those that are loaded, and until when."""
        loaded = [
            {
                **_listed(name, engine),
                "expires_at": _expires_at(engine),
                "size_vram": engine.weight_bytes,
                "context_length": engine.processor.context_length,
            }
            for name, engine in self._api.models.names.items()
            if engine.is_loaded
        ]
        return JSONResponse({"models": loaded})

    async def show(self, http: HttpRequest) -> Response:
        engine = self._api.models.find((await self._named(http)).model)
        processor = engine.processor
        text = processor.config.text_config
        info = {
            "general.architecture": text.model_type,
            "general.parameter_count": engine.parameters,
            f"{text.model_type}.context_length": processor.context_length,
            f"{text.model_type}.embedding_length": text.hidden_size,
            f"{text.model_type}.block_count": text.num_hidden_layers,
        }
        said = {
            "license": "",
            "modelfile": "",
            "parameters": _parameters(processor, self._api.defaults),
            "template": _template(processor.template),
        }
        videos = ["video"] if processor.config.pooling else []  # others see single images
        kinds = {"capabilities": ["completion", "vision", *videos], "model_info": info}
        about = {"details": _details(engine), "modified_at": self._since}
        return JSONResponse({**said, **about, **kinds})

    async def pull(self, http: HttpRequest) -> Response:
        """A model that is here needs no pulling; others are not found."""
        asked = await self._named(http)
        self._api.models.find(asked.model)
        if not asked.stream:
            return JSONResponse({"status": "success"})
        states = ("pulling manifest", "success")
        return Response("".join(line({"status": s}) for s in states), media_type=LINES)

    async def _named(self, http: HttpRequest) -> _Named:
        return await self._api.read(http, partial(read_form, kind=_Named))


def _listed(name: str, engine: Engine) -> dict[str, Any]:
    """Of which the digest tells no more than the name: nobody has summed the weights."""
    name = name if ":" in name else f"{name}:latest"
    return {
        "name": name,
        "model": name,
        "size": engine.weight_bytes,
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "details": _details(engine),
    }


def _details(engine: Engine) -> dict[str, Any]:
    config = engine.processor.config
    kind = config.vision_config.model_type.removesuffix("_vision_model")
    families = [config.text_config.model_type, kind]  # clip is how some tell that it sees
    bits = (config.quantization or {}).get("bits")
    return {
        "parent_model": "",
        "format": "mlx",
        "family": families[0],
        "families": families,
        "parameter_size": _short(engine.parameters),
        "quantization_level": f"Q{bits}" if bits else "",
    }


def _short(number: int) -> str:
    units = {"B": 1e9, "M": 1e6, "K": 1e3}
    unit = next((unit for unit, size in units.items() if number >= size), "K")
    return f"{number / units[unit]:.1f}{unit}"


def _parameters(processor: Processor, defaults: Options) -> str:
    """What holds where a request does not say, in the lines of a Modelfile."""
    said = {
        "num_ctx": processor.context_length,
        "num_predict": defaults.max_tokens,
        "temperature": defaults.temp,
    }
    lines = [*said.items(), *(("stop", json.dumps(stop)) for stop in processor.template.stops)]
    return "\n".join(f"{name:<30} {value}" for name, value in lines)


def _template(template: ChatTemplate) -> str:
    """What is put around a system text, if it may have one, and a question."""
    system, question = Message("system", "{{ .System }}"), Message("user", "{{ .Prompt }}")
    with suppress(ValueError):
        return template.render([system, question])
    return template.render([question])


def _expires_at(engine: Engine) -> str:
    seconds = engine.seconds_left()
    return NEVER if math.isinf(seconds) else moment(seconds)


async def _absent(http: HttpRequest) -> Response:
    path = http.scope["path"]
    raise ApiError(501, f"{path} is not there; this server answers with the model that it has.")
