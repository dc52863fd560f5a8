"""Configs of others, read from JSON; whatever is wrong with them is one kind of error that says where they are from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.json_file import read_json_object
from ..files.messages import shorten
from ..models.configuration_zcode_m3 import ZCodeM3Config


@contextmanager
def config_errors(origin: object) -> Iterator[None]:
    """What is wrong with the fields of a config, whatever it is, as a `ValueError` that names `origin`.

    A field of a wrong type fails where it is first used, which may be anywhere in transformers.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{origin}: {shorten(error, 600) or type(error).__name__}") from error


def config_path(folder: Path, argument: str) -> Path:
    """The `config.json` of a folder.

    Args:
        folder: what the user gave.
        argument: its name.

    Raises:
        ValueError: there is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{argument} ({folder}) must be a folder with config.json; `hf download` makes one of a Hub id"
        )
    return path


def read_zcode_m3_config(folder: Path, argument: str) -> ZCodeM3Config:
    """The config of a folder of a ZCodeM3 model.

    Args:
        folder: what the user gave.
        argument: its name.

    Raises:
        ValueError: there is none, it is of another model, or a field of it is wrong.
    """
    path = config_path(folder, argument)
    fields = read_json_object(path, "config")
    if fields.get("model_type") != ZCodeM3Config.model_type:
        raise ValueError(
            f"{path} has model_type {fields.get('model_type')!r} and must have {ZCodeM3Config.model_type!r}; "
            "`hf-moe-ted convert` makes ZCodeM3 models of others"
        )
    return zcode_m3_config(fields, path)


def zcode_m3_config(fields: Mapping[str, Any], origin: object) -> ZCodeM3Config:
    """A config of these fields.

    Raises:
        ValueError: a field is wrong; the message names `origin`.
    """
    with config_errors(origin):
        return ZCodeM3Config.from_dict(dict(fields))


__all__ = ["config_errors", "config_path", "read_zcode_m3_config", "zcode_m3_config"]
