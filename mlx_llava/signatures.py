"""Options: fields of dataclasses, which functions take as keywords and commands as flags."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar, cast

Class = TypeVar("Class")
Function = TypeVar("Function", bound="Callable[..., Any]")


#: What a bound may be, by the field's name for it, and how that is said.
_BOUNDS: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


def option(
    default: Any, kind: type, what: str, flag: Mapping[str, Any] | None = None, **bounds: float
) -> Any:
    """A field: of what kind it is, what it does, and what else argparse is told of its flag.

    Its bounds are ``ge``, ``gt``, ``le`` and ``lt``, as pydantic has them.
    """
    if kind is bool:
        usual: dict[str, Any] = {"action": "store_true", "help": what}
    else:
        given = "" if default is None or default == () else " (default: %(default)s)"
        usual = {"type": kind, "default": default, "help": what + given}
    return field(
        default=default,
        metadata={"kind": kind, "help": what, "flag": {**usual, **(flag or {})}, "bounds": bounds},
    )


def check_bounds(options: Any, prefix: str = "") -> None:
    """Raises ValueError unless the options of a dataclass lie within their bounds.

    Args:
        options: An instance of it.
        prefix (str): What errors put before an option's name.
    """
    for one in fields(options):
        value, bounds = getattr(options, one.name), one.metadata["bounds"]
        if value is not None and not all(_BOUNDS[b][0](value, bounds[b]) for b in bounds):
            expected = " and ".join(f"{_BOUNDS[b][1]} {bounds[b]}" for b in bounds)
            raise ValueError(f"{prefix}{one.name} is {value}; it must be {expected}.")


def documented(cls: type[Class]) -> type[Class]:
    """Lists the options of a dataclass in its docstring."""
    lines = [
        f"    {option.name}: {option.metadata['help']}."
        for option in fields(cast("type[Any]", cls))
    ]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines])
    return cls


def takes(cls: type, *omitted: str, others: bool = False) -> Callable[[Function], Function]:
    """Shows fields of a dataclass in the signature and the docstring of a function.

    They stand in the place of its ``**keywords``; a field's metadata hold its ``help``.

    Args:
        cls (type): The dataclass.
        *omitted (str): Fields that the function has under another name.
        others (bool): The function takes other keywords too, which its docstring names.
    """
    shown = [option for option in fields(cls) if option.name not in omitted]

    def show(function: Function) -> Function:
        changed: Any = function
        signature = inspect.signature(function)
        *named, rest = signature.parameters.values()
        keywords = [
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=option.type,
            )
            for option in shown
        ]
        parameters = [*named, *keywords, *([rest] if others else [])]
        changed.__signature__ = signature.replace(parameters=parameters)
        lines = []
        for option in shown:
            what = option.metadata["help"]
            lines.append(f"        {option.name} ({option.type}): {what[0].upper()}{what[1:]}.\n")
        before, mark, after = (function.__doc__ or "").partition(f"        **{rest.name}")
        if not others:
            mark, after = "", after.partition("\n")[2]
        changed.__doc__ = "".join([before, *lines, mark, after])
        return function

    return show
