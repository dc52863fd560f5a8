"""Read untrusted configs from JSON; every problem becomes one kind of error that names their origin."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..files.json_file import read_json_object
from ..files.messages import shorten
from ..models.configuration_zcode_m3 import ZCodeM3Config


@contextmanager
def config_errors(origin: object) -> Iterator[None]:
    """Turn any error in the fields of a config into a `ValueError` that names `origin`.

    A field of a wrong type fails at its first use, which may be anywhere in transformers.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{origin}: {shorten(error, 600) or type(error).__name__}") from error


def config_path(folder: Path, argument: str) -> Path:
    """The `config.json` of a folder.

    Args:
        folder: the user's argument.
        argument: name of the argument, for messages.

    Raises:
        ValueError: there is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{argument} ({folder}) must be a folder with config.json; `hf download` makes one of a Hub id"
        )
    return path


def read_config_fields(
    config: PreTrainedConfig | Mapping[str, Any] | str | os.PathLike[str],
    argument: str,
    model_types: Collection[str | None],
    otherwise: str,
    *,
    forms: str = "",
) -> tuple[object, dict[str, Any]]:
    """The name of a config for messages, and its fields.

    Args:
        config: a folder with `config.json`, or, with `forms`, also a JSON file, fields or an object.
        argument: name of the argument, for messages.
        model_types: allowed model types; `None` allows a config without one.
        otherwise: end of the message for another model type.
        forms: end of the message that says what `config` must be.

    Raises:
        ValueError: there is no config, it is no JSON object, or it is of another model.
    """
    origin: object = f"{argument} ({config})" if isinstance(config, str | os.PathLike) else argument
    if isinstance(config, PreTrainedConfig):
        fields = config.to_dict()
    elif isinstance(config, Mapping):
        fields = dict(config)
    elif not forms:
        origin = path = config_path(Path(config), argument)
        fields = read_json_object(path, "config")
    else:
        path = Path(config, "config.json") if Path(config).is_dir() else Path(config)
        if not path.is_file():
            raise ValueError(f"{origin} must be {forms}")
        fields = read_json_object(path, argument)
    if fields.get("model_type") not in model_types:
        raise ValueError(f"{origin} has model_type {fields.get('model_type')!r}{otherwise}")
    return origin, fields


def read_zcode_m3_config(folder: Path, argument: str) -> ZCodeM3Config:
    """The config of a folder of a ZCodeM3 model.

    Args:
        folder: the user's argument.
        argument: name of the argument, for messages.

    Raises:
        ValueError: there is no config, it is of another model, or one of its fields is wrong.
    """
    ours = ZCodeM3Config.model_type
    otherwise = f" but must have {ours!r}; `hf-moe-ted convert` converts other models to ZCodeM3"
    path, fields = read_config_fields(folder, argument, (ours,), otherwise)
    return zcode_m3_config(fields, path)


def checked_overrides(config_overrides: Any) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is not a dict of fields.
    """
    if not isinstance(config_overrides or {}, Mapping):
        raise ValueError(f"config_overrides ({config_overrides!r}) must be a dict of fields of ZCodeM3Config")
    return dict(config_overrides or {})


def zcode_m3_config(fields: Mapping[str, Any], origin: object) -> ZCodeM3Config:
    """A config of these fields.

    Raises:
        ValueError: a field is wrong; the message names `origin`.
    """
    with config_errors(origin):
        return ZCodeM3Config.from_dict(dict(fields))


__all__ = [
    "checked_overrides",
    "config_errors",
    "config_path",
    "read_config_fields",
    "read_zcode_m3_config",
    "zcode_m3_config",
]
