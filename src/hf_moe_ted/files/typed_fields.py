"""Dataclasses that are read from JSON of others: every field is of the type that it is said to be."""

import dataclasses
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .messages import shorten

MAX_NUMBER = 2**63

T = TypeVar("T")


def from_fields(kind: type[T], fields: Mapping[str, Any], **made: Any) -> T:
    """An instance of a dataclass; lists become tuples where it says so.

    Args:
        kind: its fields are annotated with `str`, `int`, `float`, `None`, `Any`, and unions, lists, tuples and dicts of
            them. Numbers of such classes are finite, not negative and less than `MAX_NUMBER`.
        fields: values by name.
        made: those that are checked already.

    Raises:
        ValueError: with the first field that is missing, unknown, or of another type.
    """
    types = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    hints = {name: types[name] for name in names if name not in made}
    if missing := sorted(hints.keys() - fields.keys()):
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown := sorted(fields.keys() - hints.keys()):
        raise ValueError(f"it has {shorten(', '.join(unknown))}, which this version of hf_moe_ted does not know")
    return kind(**made, **{name: of_type(hint, fields[name], name) for name, hint in hints.items()})


def of_type(hint: Any, value: Any, name: str) -> Any:
    """The value, if it is of a type as `from_fields` knows them.

    Raises:
        ValueError: it is not; `name` says what it is.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        hint = next((part for part in arguments if (part is NoneType) == (value is None)), None)
        return of_type(hint, value, name)
    if origin is dict and isinstance(value, dict):
        return {
            of_type(str, key, name): of_type(arguments[1], item, f"{name} of {shorten(key)}")
            for key, item in value.items()
        }
    if origin in (list, tuple) and isinstance(value, list):
        each = arguments if origin is tuple and arguments[-1] is not ... else [arguments[0]] * len(value)
        if len(each) == len(value):
            return origin(of_type(part, item, f"an item of {name}") for part, item in zip(each, value, strict=True))
    elif (is_one := _SIMPLE.get(hint)) is not None and is_one(value):
        return value
    shown = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
    sign = ", finite and not negative" if hint in (int, float) else ""
    raise ValueError(f"{name} ({shorten(value, 80)}) must be {shown}{sign}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MAX_NUMBER


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


_SIMPLE: dict[Any, Callable[[Any], bool]] = {
    Any: lambda _: True,
    str: _is_text,
    float: _is_number,  # not NaN, which is not less
    int: lambda value: _is_number(value) and isinstance(value, int),
    NoneType: lambda value: value is None,
}

__all__ = ["from_fields", "of_type"]
