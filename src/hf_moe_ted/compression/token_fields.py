"""The fields of a config, or of a generation config, that name tokens by their ids."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

# fields with tokens, or sequences of tokens, that must not be generated: removed tokens are left out of them
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")

Config = TypeVar("Config")


def named_tokens(config: Any) -> dict[str, list[int]]:
    """Name of each field that gives a token a role, such as `eos_token_id` -> its ids.

    Args:
        config: of a model, of generation, or `None`.
    """
    fields = {} if config is None else config.to_dict()
    found = {name: _ids(value) for name, value in fields.items() if name.endswith("_token_id")}
    return {name: ids for name, ids in found.items() if ids}


def with_new_ids(config: Config, new_of_old: Mapping[int, int]) -> Config:
    """A copy of a config in which the same tokens have new ids.

    Args:
        config: of a model, of generation, or `None`.
        new_of_old: id -> new id, for at least all tokens of `named_tokens`. Other tokens are left out of the fields
            with tokens that must not be generated.
    """
    changed: Any = copy.deepcopy(config)
    for name in named_tokens(config):
        value = getattr(config, name)
        setattr(changed, name, new_of_old[value] if isinstance(value, int) else [new_of_old[i] for i in value])
    for name in _SUPPRESSED:
        if (tokens := getattr(config, name, None)) is not None:
            setattr(changed, name, [new_of_old[token] for token in tokens if token in new_of_old])
    if words := getattr(config, "bad_words_ids", None):
        changed.bad_words_ids = [new for word in words if (new := _renumbered(word, new_of_old))] or None
    if bias := getattr(config, "sequence_bias", None):
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        changed.sequence_bias = [[new, by] for word, by in pairs if (new := _renumbered(word, new_of_old))] or None
    return changed


def _ids(value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    return [index for index in ids if isinstance(index, int)]


def _renumbered(word: Any, new_of_old: Mapping[int, int]) -> list[int] | None:
    """A sequence of tokens; `None` if one of them was removed, because it can no longer be generated."""
    return [new_of_old[token] for token in word] if all(token in new_of_old for token in word) else None


__all__ = ["named_tokens", "with_new_ids"]
