"""Invertible tables that map the names and shapes of one model's tensors to those of another model.

A rule has patterns of names on both sides:

    source: model.{stack:encoder|decoder}.layers.{layer}.{moe:fc1|**}.experts.deepspeed_experts.{expert}.fc1.weight
    target: model.{stack}.layers.{layer}.ffn.experts.up_proj

`{layer}` and `{expert}` stand for numbers, `{name}` for one part of a name between dots, `{name:a|b}` for one of
several choices. Among choices, `*` is any part, and `**` is any parts with the dots between them. Choices that are
given once hold for the whole rule. A placeholder has the same value in source and target. A placeholder that is on one
side only may have any value; the other direction writes its first choice. If only one side has `{expert}`, that side
has one tensor per expert, and the other side has all experts stacked in dim 0.
"""

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..files.messages import shorten
from ..files.yaml_file import read_yaml
from ..tensors.lazy_tensors import LazyTensors
from .patterns import PLACEHOLDER, NamePattern
from .rule import Rule, check_shard_rule, parse_rule

RULES_DIR = Path(__file__).parent / "rules"

_NUM_NAMES_SHOWN = 20


@dataclass(frozen=True)
class _Source:
    """The tensors from which a target is made.

    Attributes:
        rule: the rule that makes it.
        part: index among the rule's targets.
        names: for each source of the rule, the names of its experts' tensors, or of one tensor.
        is_stacked: whether these tensors are experts that are stacked.
        expert: the index of this expert in a stacked source.
    """

    rule: Rule
    part: int
    names: tuple[tuple[str, ...], ...]
    is_stacked: bool = False
    expert: int | None = None


@dataclass
class _Group:
    """The tensors from which a rule makes the same targets.

    Attributes:
        rule: the rule.
        values: value of each placeholder, without `{expert}` if experts are stacked.
        names: for each of the rule's sources, expert -> name of the tensor; the expert is 0 if none are stacked.
    """

    rule: Rule
    values: dict[str, str]
    names: dict[int, dict[int, str]] = field(default_factory=dict)

    def add(self, part: int, expert: int, name: str) -> str | None:
        """Add a tensor; return the tensor that had its place before."""
        experts = self.names.setdefault(part, {})
        other = experts.get(expert)
        experts[expert] = name
        return other

    def targets(self, specs: Mapping[str, Tensor]) -> Iterator[tuple[str, _Source]]:
        """Names of the targets, with their sources.

        Raises:
            ValueError: a tensor is missing, or differs from those of other experts.
        """
        rule = self.rule
        names = tuple(self._experts(part, specs) for part in range(len(rule.source)))
        if len({len(experts) for experts in names}) > 1:
            raise ValueError(
                f"{names[0][-1]} and {names[1][-1]} have different numbers of experts; the checkpoint is incomplete"
            )
        is_stacked = "expert" in rule.source[0].placeholders and "expert" not in self.values
        is_unstacked = "expert" in rule.target[0].placeholders and "expert" not in rule.source[0].placeholders
        for part, pattern in enumerate(rule.target):
            if not is_unstacked:
                yield pattern.fill(self.values), _Source(rule, part, names, is_stacked)
                continue
            for expert in range(specs[names[0][0]].shape[0]):
                filled = pattern.fill({**self.values, "expert": str(expert)})
                yield filled, _Source(rule, part, names, expert=expert)

    def _experts(self, part: int, specs: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The tensors of one of the rule's sources, in the order of the experts."""
        if part not in self.names:
            some_name = next(name for experts in self.names.values() for name in experts.values())
            missing = self.rule.source[part].fill({"expert": "{expert}", **self.values})
            raise ValueError(f"{missing} is missing, though {some_name} exists; the checkpoint is incomplete")
        experts = self.names[part]
        num_missing = max(experts) + 1 - len(experts)
        if num_missing:
            shown = list(islice((i for i in range(max(experts)) if i not in experts), _NUM_NAMES_SHOWN))
            more = " and more" if num_missing > len(shown) else ""
            raise ValueError(
                f"experts {shown}{more} are missing, though {experts[max(experts)]} exists; the checkpoint is "
                "incomplete"
            )
        names = tuple(experts[expert] for expert in range(len(experts)))
        _check_alike(names, specs)
        return names


@dataclass(frozen=True)
class RuleSet:
    """A table of rules.

    Attributes:
        name: name for messages.
        rules: each tensor must match exactly one of them.
        tensor_parallel: (regular expression on a source name, dimension in which tensor-parallel ranks hold shards of
            it, or `None` if each holds all).
    """

    name: str
    rules: tuple[Rule, ...]
    tensor_parallel: tuple[tuple[str, int | None], ...] = field(default=())

    @classmethod
    def load(cls, name_or_path: "str | os.PathLike[str] | RuleSet") -> "RuleSet":
        """Load a set that is shipped, by its name, or a YAML file of the same form (docs/deepspeed.md).

        Raises:
            ValueError: there is no such set, or one of its rules is invalid.
        """
        if isinstance(name_or_path, RuleSet):
            return name_or_path
        shipped = RULES_DIR / f"{name_or_path}.yaml"
        path = shipped if shipped.is_file() else Path(name_or_path)
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in RULES_DIR.glob("*.yaml")))
            raise ValueError(f"rules ({name_or_path}) must be one of {known}, or a YAML file")
        content = read_yaml(path, "rules")
        if not isinstance(content, dict) or not set(content) <= {"rules", "tensor_parallel"} or "rules" not in content:
            raise ValueError(f"{path} must have the key rules, and may have tensor_parallel; both are lists")
        for key, entries in content.items():
            if not isinstance(entries, list):
                raise ValueError(f"{path}: {key} must be a list, but is {shorten(entries)}")
        rules = tuple(parse_rule(entry, str(path)) for entry in content["rules"])
        tensor_parallel = tuple(check_shard_rule(pair, str(path)) for pair in content.get("tensor_parallel", ()))
        return cls(path.stem if path == shipped else str(path), rules, tensor_parallel)

    def inverse(self) -> "RuleSet":
        """The rules of the other direction. Tensors that a rule leaves out cannot be restored by its inverse."""
        return replace(self, rules=tuple(rule.inverse() for rule in self.rules if rule.target))

    def with_names(self, **names: str) -> "RuleSet":
        """The set with placeholders replaced by names: `with_names(moe="ffn")` for the attribute of a MoE layer."""

        def filled(pattern: NamePattern) -> NamePattern:
            return NamePattern(PLACEHOLDER.sub(lambda found: names.get(found[1], found[0]), pattern.text))

        rules = tuple(
            replace(rule, source=tuple(map(filled, rule.source)), target=tuple(map(filled, rule.target)))
            for rule in self.rules
        )
        return replace(self, rules=rules)

    def apply(self, tensors: LazyTensors, *, num_heads: int | None = None) -> LazyTensors:
        """The targets of all tensors; each is read when it is used.

        Args:
            tensors: tensors under the names of the sources.
            num_heads: attention heads, for rules with `interleave_heads`.

        Raises:
            ValueError: a tensor matches no rule or several (the message names the nearest rules), two tensors would get
                the same name, an expert or a part is missing, experts differ in shape, or a tensor cannot be split.
        """
        sources: dict[str, _Source] = {}
        for group in self._groups(tensors):
            for target, source in group.targets(tensors.specs):
                if target in sources:
                    raise ValueError(f"{source.names[0][0]} and {sources[target].names[0][0]} both become {target}")
                sources[target] = source
        on_meta = LazyTensors(tensors.specs, tensors.specs.__getitem__)
        specs = {target: _build(source, on_meta, num_heads, "meta") for target, source in sources.items()}

        def read_into(target: str, out: Tensor) -> None:
            source = sources[target]
            if source.is_stacked and source.rule.operation is None and len(source.names) == 1:
                _stack(source.names[0], tensors, out)
            elif source.rule.operation is None and source.expert is None:
                tensors.into(source.names[0][0], out)
            else:
                out.copy_(_build(source, tensors, num_heads, "cpu"))

        return LazyTensors(
            specs, lambda target: _build(sources[target], tensors, num_heads, "cpu"), read_into=read_into
        )

    def _groups(self, names: Iterable[str]) -> Iterable[_Group]:
        """Group the tensors by their targets.

        Raises:
            ValueError: tensors match no rule or more than one; the message names all of them.
        """
        groups: dict[tuple[int, str], _Group] = {}
        problems: list[Callable[[], str]] = []  # called only for the problems that are shown
        for name in names:
            matches = self._matches(name)
            if len(matches) != 1:
                matching = [self.rules[number] for number, _, _ in matches]
                problems.append(partial(self._match_problem, name, matching))
                continue
            number, part, values = matches[0]
            rule = self.rules[number]
            if not rule.target:
                continue
            is_stacked = "expert" in values and "expert" not in rule.target[0].placeholders
            expert = int(values.pop("expert")) if is_stacked else 0
            target = rule.target[0].fill({"expert": "{expert}", **values})
            group = groups.setdefault((number, target), _Group(rule, values))
            if (other := group.add(part, expert, name)) is not None:
                problems.append(partial(str, f"{other} and {name} both become {target}"))
        if problems:
            shown = "\n  ".join(problem() for problem in problems[:_NUM_NAMES_SHOWN])
            more = f"\n  and {len(problems) - _NUM_NAMES_SHOWN} more" if len(problems) > _NUM_NAMES_SHOWN else ""
            raise ValueError(f"{len(problems)} tensors do not fit the rules {self.name}:\n  {shown}{more}")
        return groups.values()

    def _matches(self, name: str) -> list[tuple[int, int, dict[str, str]]]:
        """For each pattern that a name matches: number of the rule, index of the source, values of the placeholders."""
        return [
            (number, part, values)
            for number, rule in enumerate(self.rules)
            for part, pattern in enumerate(rule.source)
            if (values := pattern.match(name)) is not None
        ]

    def _match_problem(self, name: str, matching: list[Rule]) -> str:
        if matching:
            return f"{name} matches {' and '.join(rule.source[0].text for rule in matching)}"
        patterns = [pattern.text for rule in self.rules for pattern in rule.source]
        plain = {re.sub(r"\d+", "0", PLACEHOLDER.sub("0", pattern)): pattern for pattern in patterns}
        nearest = difflib.get_close_matches(re.sub(r"\d+", "0", name), list(plain), n=1, cutoff=0.0)
        return f"{name} matches no rule" + (f"; the nearest is {plain[nearest[0]]}" if nearest else "")


def _check_alike(names: Sequence[str], specs: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` unless the experts are tensors of one shape and dtype."""
    kinds = Counter((tuple(specs[name].shape), specs[name].dtype) for name in names)
    if len(kinds) > 1:
        usual = kinds.most_common(1)[0][0]
        odd = next(name for name in names if (tuple(specs[name].shape), specs[name].dtype) != usual)
        raise ValueError(
            f"{odd} is {specs[odd].dtype} of shape {tuple(specs[odd].shape)}, but the other experts are {usual[1]} of "
            f"shape {usual[0]}"
        )


def _build(source: _Source, tensors: LazyTensors, num_heads: int | None, device: str) -> Tensor:
    """Make a target from its sources, which are on `device`."""
    if source.expert is not None:
        parts = [tensors.row(names[0], source.expert) for names in source.names]
    elif source.is_stacked:
        parts = []
        for names in source.names:
            spec = tensors.specs[names[0]]
            stacked = torch.empty(len(names), *spec.shape, dtype=spec.dtype, device=device)
            parts.append(_stack(names, tensors, stacked))
    else:
        parts = [tensors[names[0]] for names in source.names]
    try:
        return source.rule.apply(parts, num_heads)[source.part]
    except (RuntimeError, IndexError) as error:
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(
            f"{source.names[0][0]}: the shapes {shapes} do not fit the rule for {source.rule.source[0].text}: {error}"
        ) from error


def _stack(names: Sequence[str], tensors: LazyTensors, out: Tensor) -> Tensor:
    """Read the experts one by one into dim 0 of `out`."""
    for expert, name in enumerate(names):
        tensors.into(name, out[expert])
    return out


__all__ = ["RULES_DIR", "RuleSet"]
