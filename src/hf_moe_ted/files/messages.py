"""Text of untrusted files and values for error messages: one short line without control characters."""

import reprlib
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path


class UnreadableFileError(ValueError):
    """A file is missing, damaged, or not what its name says. The message names it."""


def check_is_file(path: Path) -> None:
    """Raise unless `path` is a regular file: opening a pipe may wait forever, and a device may never end.

    Raises:
        UnreadableFileError: it does not exist, or is something else.
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
    """A value for a message; a long one is cut."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, Exception) else _repr(value)
    text = " ".join(printable(text).split())
    return text if len(text) <= max_chars else text[:max_chars] + "..."


def printable(line: str) -> str:
    """The line without control characters, line ends and other characters that cannot be printed."""
    return "".join(character if character.isprintable() else " " for character in line)


def _repr(value: object) -> str:
    """Like `repr`, but only of the first items of a collection, because untrusted ones may be endless."""
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str | bytes):
        return reprlib.repr(value)
    return repr(value)


__all__ = ["UnreadableFileError", "check_is_file", "printable", "shorten"]
