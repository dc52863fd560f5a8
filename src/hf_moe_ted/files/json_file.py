"""Read untrusted JSON files: each must be a JSON object of bounded size."""

import json
from pathlib import Path
from typing import Any

from .messages import UnreadableFileError, check_is_file, shorten

MAX_JSON_BYTES = 32 * 2**20


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """Fields by name of a JSON file.

    Args:
        path: the file.
        what: name of the file for messages, such as an argument's name.

    Raises:
        ValueError: the file is missing, unreadable, larger than `MAX_JSON_BYTES`, or invalid, see
            [`parse_json_object`].
    """
    return parse_json_object(read_text(path, what, MAX_JSON_BYTES), f"{what} ({path})")


def parse_json_object(text: str, what: str) -> dict[str, Any]:
    """Fields by name of a JSON text.

    Args:
        text: text of one JSON object.
        what: name of the file for messages, such as an argument's name.

    Raises:
        ValueError: the text is not JSON (NaN and infinity are not JSON), has a field twice, or is not an object.
    """
    try:
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {shorten(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} must be a JSON object (fields by name), but is {shorten(content, 80)}")
    return content


def read_text(path: Path, what: str, max_bytes: int) -> str:
    """The text of a file in UTF-8.

    Args:
        path: the file.
        what: name of the file for messages, such as an argument's name.
        max_bytes: largest size of the file.

    Raises:
        ValueError: the file is missing, no file, unreadable, too large or not UTF-8.
    """
    try:
        check_is_file(path)
        if path.stat().st_size > max_bytes:
            raise ValueError(f"{what} ({path}) has {path.stat().st_size:,} bytes, more than {max_bytes:,}")
        return path.read_text(encoding="utf-8")
    except UnreadableFileError as error:
        raise ValueError(f"{what}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} ({path}) is not a text in UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"{what} ({path}) cannot be read: {error}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the field {name!r} occurs twice")
        content[name] = value
    return content


__all__ = ["MAX_JSON_BYTES", "parse_json_object", "read_json_object", "read_text"]
