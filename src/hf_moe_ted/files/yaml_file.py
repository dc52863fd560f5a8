"""Read untrusted YAML files as plain data of bounded size."""

from pathlib import Path
from typing import Any

import yaml

from .json_file import read_text
from .messages import shorten

MAX_YAML_BYTES = 2**18


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file. Anchors are refused, because with them a few lines can expand to any amount of data.

    Args:
        path: the file.
        what: name of the file for messages, such as an argument's name.

    Raises:
        ValueError: the file is missing, unreadable, larger than `MAX_YAML_BYTES`, or not YAML; it has anchors or a key
            twice.
    """
    text = read_text(path, what, MAX_YAML_BYTES)
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{what} ({path}) is not YAML: {shorten(error)}") from error


class _Loader(yaml.SafeLoader):
    """Plain data only."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it has the alias *{self.peek_event().anchor}; write its content instead")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        content = super().construct_mapping(node, deep)
        if len(content) != len(node.value):
            raise yaml.YAMLError(f"a key occurs twice: {[key.value for key, _ in node.value]}")
        return content


__all__ = ["MAX_YAML_BYTES", "read_yaml"]
