"""Patterns of names: with placeholders, or as regular expressions of users.

Either may be invalid, or may take forever to match, such as `(a+)+b`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import regex

MAX_PATTERN_CHARS = 2_000
MATCH_S = 2.0  # time limit for one name; usual patterns take microseconds

PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]+))?\}")
_NUMBERS = ("layer", "expert")


class Pattern:
    """A regular expression whose searches have a time limit.

    Args:
        text: the pattern, as in the module `re`.
        origin: source of the pattern, for messages.

    Raises:
        ValueError: it is no regular expression. In a search: it takes longer than `MATCH_S` seconds.
    """

    def __init__(self, text: str, origin: object):
        self.text, self._origin = text, origin
        if len(text) > MAX_PATTERN_CHARS:
            raise ValueError(f"{origin}: a pattern has {len(text):,} characters, more than {MAX_PATTERN_CHARS:,}")
        try:
            self._compiled: Any = regex.compile(text)
        except (regex.error, OverflowError, RecursionError, ValueError) as error:
            raise ValueError(f"{origin}: {text!r} is no regular expression: {error}") from error

    def search(self, name: str) -> Any:
        """A match anywhere in `name`, or `None`."""
        return self._run(self._compiled.search, name)

    def fullmatch(self, name: str) -> Any:
        """A match of all of `name`, or `None`."""
        return self._run(self._compiled.fullmatch, name)

    def _run(self, match: Any, name: str) -> Any:
        try:
            return match(name, timeout=MATCH_S)
        except TimeoutError:
            raise ValueError(
                f"{self._origin}: {self.text!r} takes more than {MATCH_S:.0f} s to match {name[:200]!r}; repetitions "
                f"inside repetitions and many {{name:**}} are slow: make the pattern simpler"
            ) from None


@dataclass(frozen=True)
class NamePattern:
    """A name with placeholders, see the module `conversion_rules`."""

    text: str

    def __post_init__(self) -> None:
        self.match("")  # raises if the pattern is invalid

    @cached_property
    def _pattern(self) -> Pattern:
        *parts, rest = PLACEHOLDER.split(self.text)  # text, name, choices, text, name, ...
        if "{" in rest or "}" in rest:
            raise ValueError(f"the pattern {self.text!r} has a brace that belongs to no placeholder such as {{layer}}")
        pattern, seen = "", set()
        for text, name, choices in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            pattern += re.escape(text)
            pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{_choices_pattern(name, choices)})"
            seen.add(name)
        return Pattern(pattern + re.escape(rest), f"the pattern {self.text!r}")

    @property
    def placeholders(self) -> frozenset[str]:
        return frozenset(match[1] for match in PLACEHOLDER.finditer(self.text))

    def match(self, name: str) -> dict[str, str] | None:
        """Values of the placeholders in `name`; `None` if it does not match this pattern."""
        found = self._pattern.fullmatch(name)
        return None if found is None else found.groupdict()

    def fill(self, values: Mapping[str, str]) -> str:
        """The name for these values; a placeholder without one becomes its first choice.

        Raises:
            ValueError: a placeholder has neither a value nor a choice.
        """

        def value(placeholder: re.Match[str]) -> str:
            name, choices = placeholder[1], placeholder[2]
            if name in values:
                return values[name]
            first = (choices or "*").split("|")[0]
            if "*" in first:
                raise ValueError(f"{{{name}}} of {self.text!r} has no value: give it a first choice")
            return first

        return PLACEHOLDER.sub(value, self.text)


def _choices_pattern(name: str, choices: str | None) -> str:
    if choices is None:
        return r"\d+" if name in _NUMBERS else r"[^.]+"
    wild = {"*": r"[^.]+", "**": r"[^.]+(?:\.[^.]+)*?"}
    return "|".join(wild.get(choice, re.escape(choice)) for choice in choices.split("|"))


__all__ = ["MATCH_S", "PLACEHOLDER", "NamePattern", "Pattern"]
