"""Escape names from outside in Markdown: languages, folders and models show as plain text.

This holds in tables, lines of text and code, for names with HTML, pipes, back-ticks, math or line ends.
"""

import re

from ...files.messages import printable

MAX_CHARACTERS = 300

# an underscore within a word, and a colon without an address behind it, need no escape
_SPECIAL = re.compile(r"[&<|`*~$\\]|(?<=\])[(\[]|!(?=\[)|(?<![^\W_])_|_(?![^\W_])|:(?=//)")
_PLAIN_CODE = re.compile(r"[\w ./:+@=,~-]+")


def _one_line(text: str) -> str:
    line = printable(text)
    return line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 1]}…"


def as_text(text: str) -> str:
    """Markdown that shows the text as it is, also in a table."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", _one_line(text))


def as_code(text: str) -> str:
    """Markdown that shows the text as it is, as code."""
    line = _one_line(text)
    return f"`{line}`" if _PLAIN_CODE.fullmatch(line) else f"<code>{as_text(line)}</code>"


__all__ = ["as_code", "as_text"]
