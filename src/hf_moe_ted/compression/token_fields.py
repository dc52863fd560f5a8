"""The fields of a config, or of a generation config, that name tokens by their ids."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

# tokens or sequences of tokens that are kept from being generated: those that are gone need no mention
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")

Config = TypeVar("Config")


def named_tokens(config: Any) -> dict[str, list[int]]:
    """Name of each field that says what a token is for, such as `eos_token_id` -> its ids.

    Args:
        config: of a model, of generation, or `None`.
    """
    fields = {} if config is None else config.to_dict()
    found = {name: _ids(value) for name, value in fields.items() if name.endswith("_token_id")}
    return {name: ids for name, ids in found.items() if ids}


def with_new_ids(config: Config, new_of_old: Mapping[int, int]) -> Config:
    """A copy that names the same tokens by other ids.

    Args:
        config: of a model, of generation, or `None`.
        new_of_old: id -> new id, of all tokens of `named_tokens` at least. Others are left out where they were kept
            from being generated.
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
    """A sequence of tokens, `None` if one of them is gone: it cannot come up any more."""
    return [new_of_old[token] for token in word] if all(token in new_of_old for token in word) else None


__all__ = ["named_tokens", "with_new_ids"]
