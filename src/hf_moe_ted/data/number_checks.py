"""Checks of numbers from users."""

import math
import operator
from typing import Any


def require_integer(name: str, value: Any, minimum: float = -math.inf) -> int:
    """The value as an int; numpy's integers are accepted.

    Raises:
        ValueError: it is not an integer, or is less than `minimum`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} ({value!r}) must be an integer") from None
    if isinstance(value, bool) or number < minimum:
        raise ValueError(f"{name} ({value!r}) must be at least {minimum}")
    return number


def require_number(name: str, value: Any) -> float:
    """The value as a float; numpy's numbers are accepted.

    Raises:
        ValueError: it is not a number, or is NaN.
    """
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"{name} ({value!r}) must be a number")
    return number


__all__ = ["require_integer", "require_number"]
