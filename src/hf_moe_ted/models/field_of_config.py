"""Attributes of modules that follow their config."""

from collections.abc import Iterable
from typing import Any

import torch


class FieldOfConfig:
    """An attribute of a module that reads a field of its `config`; a value set on the module itself comes first."""

    def __init__(self, field: str | None = None):
        self.field: Any = field

    def __set_name__(self, owner: type, name: str) -> None:
        self.field = self.field or name

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        if torch.compiler.is_compiling():  # which does not know the other direction
            return getattr(module.config, self.field)
        # not with the config's own lookup, which resolves other names of fields and takes ten times as long
        return object.__getattribute__(module.config, self.field)


def are_set_on(modules: Iterable[Any], *fields: str) -> bool:
    """Whether one of the modules has its own value for one of these config fields."""
    return any(field in vars(module) for module in modules for field in fields)


__all__ = ["FieldOfConfig", "are_set_on"]
