"""The body of a request -> a form: what an API's clients may send, checked."""

from __future__ import annotations

import reprlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from mlx_llava.generation.sampling import Options
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.kept import Kept
from mlx_llava.serving.replies import Reply
from mlx_llava.serving.requests import Request

MAX_TEXTS = MAX_BRACKETS = 100_000
MAX_COMMAS = 250_000  # of which texts have many
MAX_MESSAGES = MAX_PARTS = 1000
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: Options that a request has under their own names, and as they are.
_OPTIONS = {option.name for option in fields(Options)} - {"stop", "json_schema"}
_BOUNDS = {option.name: option.metadata["bounds"] for option in fields(Options)}
#: Tells what was found, of whatever length, by its beginning and its end.
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 60


class Form(BaseModel):
    """A request or a part of it; fields that it does not know ask nothing of the answer."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class RequestForm(Form):
    """A request for answers, as an API has it."""

    media_type: ClassVar[str] = "text/event-stream"

    def options(self, defaults: Options, stop: Sequence[str] = ()) -> Options:
        """How to answer: by its fields of the same names, and as the server does otherwise."""
        options = replace(defaults, **self.model_dump(include=_OPTIONS, exclude_none=True))
        if getattr(self, "top_p", None) == 0:  # the likeliest alone; for `Options` it is off
            options = replace(options, temp=0)
        return replace(options, stop=(*defaults.stop, *filter(None, stop)))

    def recall(self, kept: Kept) -> None:
        """Tells where earlier answers are, for an API that goes on with these."""

    def request(self, defaults: Options) -> Request:
        """What is asked, where the server's defaults are for what is not said."""
        raise NotImplementedError

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """All answers in one object."""
        raise NotImplementedError

    def events(self, reply: Reply) -> AsyncGenerator[str, None]:
        """The answers as they are made, which end with an error where there is one."""
        raise NotImplementedError

    def headers(self) -> Mapping[str, str]:
        """What the answer's head says beside the usual."""
        return {}


AnyForm = TypeVar("AnyForm", bound=Form)


def as_list(value: Any) -> Any:
    """Takes a text for a list of one."""
    return [value] if isinstance(value, str) else value


def as_parts(content: Any, kind: str = "text") -> Any:
    """Takes texts for parts of a kind."""
    parts = as_list(content)
    if not isinstance(parts, list):
        return parts
    return [{"type": kind, "text": p} if isinstance(p, str) else p for p in parts]


Stops: TypeAlias = Annotated[
    list[Annotated[str, Field(max_length=MAX_STOP_LENGTH)]],
    BeforeValidator(as_list),
    Field(max_length=MAX_STOPS),
]


def parameter(option: str, **others: Any) -> Any:
    """A request's field for an option that it need not have, with the option's bounds."""
    return Field(None, **{**_BOUNDS[option], **others})


def read_form(body: bytes, kind: type[AnyForm]) -> AnyForm:
    """Reads a request.

    Raises:
        ApiError: It is no JSON, lacks something, or asks for what there is not.
    """
    data = {key: value for key, value in read_json(body).items() if value is not None}
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from error


def read_json(body: bytes) -> dict[str, Any]:
    """Reads a JSON object, in bounded time and memory.

    Raises:
        ApiError: It is none, or has too many keys and values.
    """
    _check_structure(body)
    text = body.removeprefix(_BYTE_ORDER_MARK)
    try:
        data = from_json(text, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return data


def _check_structure(body: bytes) -> None:
    """Refuses more keys and values than any request needs.

    A parser makes an object of each, and the whole process waits for it; a request has few of
    them, if long ones. Each text opens with a quote that follows no backslash, each list and
    object with a bracket, and each value but the first of these follows a comma. Those within
    texts count as well, but images in base64 have none.
    """
    for name, found, most in (
        ("texts", (body.count(b'"') - body.count(b'\\"')) // 2, MAX_TEXTS),
        ("commas", body.count(b","), MAX_COMMAS),
        ("brackets", body.count(b"[") + body.count(b"{"), MAX_BRACKETS),
    ):
        if found > most:
            message = f"The body has {found:,} {name}; the limit is {most:,}."
            raise ApiError(400, message, "request_too_complex")


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    param = _path(first["loc"])
    if first["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return ApiError(400, message, "missing_required_parameter", param=param)
    message = f"{param}: {first['msg']}; found {_BRIEF.repr(first['input'])}"
    return ApiError(400, message, param=param)


def _path(location: Sequence[int | str]) -> str:
    """Where something is, without the kinds of parts and formats that pydantic puts between."""
    kinds = {
        *("text", "image_url", "video_url", "image", "tool_use", "tool_result"),
        *("message", "function_call", "function_call_output", "reasoning"),
        *("item_reference", "refusal"),
        *("input_text", "input_image", "input_file", "output_text", "file"),
    }
    return ".".join(
        str(step)
        for before, step in zip((None, *location), location, strict=False)
        if not (
            before in ("response_format", "source") or (isinstance(before, int) and step in kinds)
        )
    )
