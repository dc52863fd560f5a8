"""Names of others in Markdown: languages, folders and models say what they are called, and nothing more.

In a table, in a line of text or in code, whatever a name has in it: HTML, pipes, back-ticks, math, line ends.
"""

import re

from ...files.messages import printable

MAX_CHARACTERS = 300

# an underscore within a word, and a colon without an address behind it, are nothing special
_SPECIAL = re.compile(r"[&<|`*~$\\]|(?<=\])[(\[]|!(?=\[)|(?<![^\W_])_|_(?![^\W_])|:(?=//)")
_PLAIN_CODE = re.compile(r"[\w ./:+@=,~-]+")


def _one_line(text: str) -> str:
    line = printable(text)
    return line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 1]}…"


def as_text(text: str) -> str:
    """Markdown that reads as the text, in a table, too."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", _one_line(text))


def as_code(text: str) -> str:
    """Markdown that reads as the text in the type of code."""
    line = _one_line(text)
    return f"`{line}`" if _PLAIN_CODE.fullmatch(line) else f"<code>{as_text(line)}</code>"


__all__ = ["as_code", "as_text"]
