"""What errors say of files and values of others: one line, short, with nothing in it that a terminal obeys."""

import reprlib
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path


class UnreadableFileError(ValueError):
    """A file that is missing, damaged or something else than its name says. The message names it."""


def check_is_file(path: Path) -> None:
    """Raise unless `path` is a file: opening a pipe waits for ever, and a device never ends.

    Raises:
        UnreadableFileError: there is nothing, or something else.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UnreadableFileError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise UnreadableFileError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise UnreadableFileError(f"{path} cannot be read: it is {kind}, not a file")


def shorten(value: object, max_chars: int = 300) -> str:
    """A value of a file for a message, the start of a long one."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, Exception) else _repr(value)
    text = " ".join(printable(text).split())
    return text if len(text) <= max_chars else text[:max_chars] + "..."


def printable(line: str) -> str:
    """The line without characters that move the cursor of a terminal, end the line, or cannot be printed."""
    return "".join(character if character.isprintable() else " " for character in line)


def _repr(value: object) -> str:
    """As `repr`, but of the first items of a collection only: those of others may share parts without end."""
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str | bytes):
        return reprlib.repr(value)
    return repr(value)


__all__ = ["UnreadableFileError", "check_is_file", "printable", "shorten"]
