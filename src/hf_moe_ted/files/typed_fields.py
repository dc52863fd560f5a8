"""Read dataclasses from untrusted JSON: every field must have its annotated type."""

import dataclasses
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .messages import shorten

MAX_NUMBER = 2**63

T = TypeVar("T")


def from_fields(kind: type[T], fields: Mapping[str, Any], **made: Any) -> T:
    """Make an instance of a dataclass; lists become tuples if the annotation says so.

    Args:
        kind: the dataclass; its fields are annotated with `str`, `int`, `float`, `None`, `Any`, and unions, lists,
            tuples and dicts of them. Numbers of such classes are finite, not negative and less than `MAX_NUMBER`.
        fields: values by name.
        made: fields that are checked already.

    Raises:
        ValueError: a field is missing, unknown, or of another type; the message names the first one.
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
    """The value, if it has a type that `from_fields` supports.

    Raises:
        ValueError: it has another type; `name` is its name in the message.
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
    float: _is_number,  # refuses NaN, too, because NaN is not less
    int: lambda value: _is_number(value) and isinstance(value, int),
    NoneType: lambda value: value is None,
}

__all__ = ["from_fields", "of_type"]
