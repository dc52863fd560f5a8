"""One rule of a table of names, and its form in YAML; see the module `conversion_rules`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..files.messages import shorten
from .patterns import PLACEHOLDER, NamePattern, Pattern

_OPERATIONS = ("transpose", "concatenate", "split")


@dataclass(frozen=True)
class Rule:
    """Tensors of `source` patterns become tensors of `target` patterns.

    Attributes:
        source: one pattern, or several that are concatenated.
        target: one pattern; several for the parts of a split or for copies; none to leave the tensor out.
        operation: `None` (one source, one target; or one source and its copies), `"transpose"` of the last two
            dimensions, `"concatenate"` or `"split"`.
        dim: dimension along which to concatenate or split.
        interleave_heads: whether the parts of a split alternate per attention head, as in Megatron's `query_key_value`.
    """

    source: tuple[NamePattern, ...]
    target: tuple[NamePattern, ...]
    operation: str | None = None
    dim: int = 0
    interleave_heads: bool = False

    def inverse(self) -> "Rule":
        """The rule of the other direction."""
        operation = {"concatenate": "split", "split": "concatenate"}.get(str(self.operation), self.operation)
        return replace(self, source=self.target, target=self.source, operation=operation)

    def apply(self, tensors: list[Tensor], num_heads: int | None) -> list[Tensor]:
        """Compute the targets from these sources; it works on meta tensors, too.

        Raises:
            ValueError: a tensor cannot be split into that many parts.
        """
        if self.operation == "transpose":
            return [tensors[0].transpose(-1, -2).contiguous()]
        if self.operation == "concatenate":
            if not self.interleave_heads:
                return [torch.cat(tensors, self.dim)]
            by_head = [tensor.unflatten(0, (num_heads or 1, -1)) for tensor in tensors]
            return [torch.stack(by_head, dim=1).flatten(0, 2).contiguous()]
        if self.operation == "split":
            return self._split(tensors[0], num_heads)
        for pattern, copy in zip(self.source[1:], tensors[1:], strict=True):
            if not copy.is_meta and not torch.equal(tensors[0], copy):
                raise ValueError(f"{self.source[0].text} and {pattern.text} must be copies of each other, but differ")
        return tensors[:1] * len(self.target)

    def _split(self, tensor: Tensor, num_heads: int | None) -> list[Tensor]:
        num_parts = len(self.target)
        if tensor.shape[self.dim] % (num_parts * (num_heads or 1) if self.interleave_heads else num_parts):
            raise ValueError(
                f"{self.source[0].text}: dimension {self.dim} of shape {tuple(tensor.shape)} cannot be split "
                f"into {num_parts} parts" + (f" of {num_heads} heads" if self.interleave_heads else "")
            )
        if self.interleave_heads:
            by_head = tensor.unflatten(0, (num_heads or 1, num_parts, -1))
            return [by_head[:, part].flatten(0, 1).contiguous() for part in range(num_parts)]
        return [part.contiguous() for part in tensor.chunk(num_parts, self.dim)]


def check_shard_rule(pair: Any, origin: str) -> tuple[str, int | None]:
    """Check a pair of a regular expression and a dimension; `None` means that every rank has the whole tensor.

    Raises:
        ValueError: the pair has another form; the message begins with `origin`.
    """
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError(
            f"{origin} has {shorten(pair)} in tensor_parallel; give pairs of a regular expression and a dimension or "
            "None"
        )
    pattern, dim = pair
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        raise ValueError(f"{origin} has {shorten(pair)} in tensor_parallel; the dimension must be an integer or None")
    Pattern(pattern, f"{origin}, tensor_parallel")
    return pattern, dim


def _parse_patterns(entry: Mapping[str, Any]) -> list[tuple[NamePattern, ...]]:
    """Sources and targets. Choices of a placeholder that are given once hold for the whole rule."""
    texts = [entry.get(side) or [] for side in ("source", "target")]
    sides = [[side] if isinstance(side, str) else side for side in texts]
    if not all(isinstance(side, list) and all(isinstance(text, str) for text in side) for side in sides):
        raise ValueError("source and target must be names or lists of names")
    placeholders = [found for side in sides for text in side for found in PLACEHOLDER.finditer(text)]
    choices = {found[1]: found[0] for found in placeholders if found[2]}
    return [
        tuple(NamePattern(PLACEHOLDER.sub(lambda found: choices.get(found[1], found[0]), text)) for text in side)
        for side in sides
    ]


def parse_rule(entry: Any, path: str) -> Rule:
    """Parse a rule of a YAML file. An invalid rule raises a `ValueError` that shows it."""
    try:
        return _rule_of(entry)
    except ValueError as error:
        raise ValueError(f"{path}: the rule {shorten(str(entry))}: {error}") from error


def _rule_of(entry: Any) -> Rule:
    keys = {"source", "target", "ignore", "interleave_heads", *_OPERATIONS}
    if not isinstance(entry, dict) or not set(entry) <= keys or ("ignore" in entry) == ("source" in entry):
        raise ValueError(f"it must have source and target, or ignore; it may have {sorted(keys)}")
    if "ignore" in entry:
        if not isinstance(entry["ignore"], str):
            raise ValueError(f"ignore must be a name, but is {entry['ignore']!r}")
        return Rule((NamePattern(entry["ignore"]),), ())
    source, target = _parse_patterns(entry)
    operations = [name for name in _OPERATIONS if entry.get(name) is not None and entry[name] is not False]
    operation = operations[0] if operations else None
    fits = {
        "transpose": len(source) == len(target) == 1,
        "concatenate": len(target) == 1 < len(source),
        "split": len(source) == 1 < len(target),
    }
    if len(operations) > 1 or not source or not target or not fits.get(str(operation), len(source) == 1):
        raise ValueError(
            "it must have one source and one target; several sources with concatenate, several targets with split or "
            "as copies"
        )
    dim = entry[operation] if operation in ("concatenate", "split") else 0
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise ValueError(f"{operation} must be the number of a dimension")
    for name in ("transpose", "interleave_heads"):
        if not isinstance(entry.get(name, False), bool):
            raise ValueError(f"{name} must be true or false")
    return Rule(source, target, operation, dim, bool(entry.get("interleave_heads")))


__all__ = ["Rule", "check_shard_rule", "parse_rule"]
