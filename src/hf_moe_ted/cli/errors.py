"""A command that fails prints one line on stderr that names what is wrong, and ends with exit code 1."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A wrong input or a file error inside this context ends the process with one line, without a stack trace."""
    try:
        try:
            yield
        finally:
            _flush_output()
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {_one_line(str(error))}", fg="red", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more
        raise SystemExit(1) from None


def _one_line(message: str) -> str:
    """The message without line ends and control characters; names in files may have them."""
    line = re.sub(r"\s*\n\s*", "; ", re.sub(r":\s*\n\s*", ": ", message.strip()))
    return "".join(character if character.isprintable() else " " for character in line)


def _flush_output() -> None:
    """A full disk behind `> file` is an error, too."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, f"the output cannot be written: {error.strerror}; choose another file") from None


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Errors inside this context name the argument that they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
