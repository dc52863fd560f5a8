"""Checkpoints of DeepSpeed's Mixture-of-Experts engine, read without DeepSpeed and without executing anything in them.

Layout: `checkpoint_dir/latest` names a tag. The folder of the tag holds `mp_rank_*_model_states.pt` with everything
except the experts, `layer_*_expert_*_mp_rank_*_model_states.pt` with one expert each, and optimizer files
(`_save_moe_checkpoint` in https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/runtime/engine.py).
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...files.messages import printable
from ...tensors.lazy_tensors import LazyTensors
from ..patterns import Pattern
from ..rule import check_shard_rule
from .checks import check_contents
from .contents import Contents, meta, parse_expert_name, read_contents
from .files import FilePool, find_files, list_names, load_file
from .shards import Shards, open_shards
from .zero import is_equal

TensorParallelRule = tuple[str, int | None]


def read_deepspeed_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    *,
    tag: str | None = None,
    weights: str = "model",
    tensor_parallel_rules: Sequence[TensorParallelRule] = (),
) -> LazyTensors:
    """The tensors of a native DeepSpeed-MoE checkpoint (ZeRO 0, 1 or 2, any parallel layout) by DeepSpeed's names.

    Experts have global ids. Names, shapes and dtypes are known at once. A tensor is read and merged over
    tensor-parallel ranks and partitions when it is used. Memory holds at most `lazy_tensors.MAX_MAPPED_BYTES` of the
    files, and the parts of one tensor.

    Args:
        checkpoint_dir: the folder that was given to `engine.save_checkpoint`.
        tag: the folder inside it; by default the one that `latest` names.
        weights: `"model"` for the weights in the dtype of the model, `"master"` for the optimizer's copies: half
            precision becomes float32, other dtypes stay. Each master must round to its weight; this is checked when it
            is read. Buffers and frozen parameters have no master and are converted.
        tensor_parallel_rules: pairs of a regular expression that is searched for in the name, and the dimension to
            concatenate shards along, or `None` to take the first. The first rule that matches counts. Without a rule
            the shards must be identical, which is checked when they are read; `specs` then has the shape of a shard.

    Returns:
        The tensors. The caller owns the tensors that it reads.

    Raises:
        ValueError: the folder, tag or a file is missing, unreadable or not of this run (the message names all
            problems); a file names a class that is not on the allow-list; a rule is invalid; `weights` has another
            value; masters cannot be told apart. On reading: shards differ without a rule (the message names all of
            them).
    """
    if weights not in ("model", "master"):
        raise ValueError(f"weights ({weights!r}) must be 'model' or 'master'")
    rules = _compile_rules(tensor_parallel_rules)
    contents = read_contents(find_files(Path(checkpoint_dir), tag))
    check_contents(contents)
    masters = weights == "master"
    problems = [problem.text for problem in contents.problems if not (masters and problem.masters_help)]
    if problems:
        raise ValueError("\n  ".join([f"{contents.files.folder} cannot be read:", *problems]))
    merger = _Merger(contents, open_shards(contents, FilePool(), masters=masters), rules)
    return LazyTensors(merger.specs, read_into=merger.read_into, where=merger.where)


def _compile_rules(rules: Sequence[TensorParallelRule]) -> list[tuple[Pattern, int | None]]:
    checked = [check_shard_rule(rule, "tensor_parallel_rules") for rule in rules]
    return [(Pattern(pattern, "tensor_parallel_rules"), dim) for pattern, dim in checked]


class _Merger:
    """Puts the shards of tensors together.

    Args:
        contents: a checkpoint without problems.
        shards: the shards of all of its tensors.
        rules: as in `read_deepspeed_state_dict`, compiled.

    Raises:
        ValueError: shards of one tensor do not fit together.
    """

    def __init__(self, contents: Contents, shards: Shards, rules: list[tuple[Pattern, int | None]]):
        self._contents, self._shards, self._rules = contents, shards, rules
        self._stages: dict[str, list[list[int]]] = {}
        for name, by_rank in shards.specs.items():
            stages: dict[int, list[int]] = defaultdict(list)
            for mp_rank in sorted(by_rank):
                stages[contents.stage(mp_rank)].append(mp_rank)
            self._stages[name] = list(stages.values())
        different = [name for name in shards.specs if not self._rule(name) and not self._is_one_shape(name)]
        if different:
            raise _needs_rules(contents, different)
        self.specs = {name: self._merged_spec(name) for name in shards.specs}

    def read_into(self, name: str, out: Tensor) -> None:
        """Write one whole tensor into another of the same shape and dtype.

        Raises:
            ValueError: its shards differ without a rule, or pipeline stages disagree; see also `Shards.view`.
        """
        first, *others = self._stages[name]
        self._read_stage_into(name, first, out)
        for ranks in others:
            again = torch.empty_like(out)
            self._read_stage_into(name, ranks, again)
            if not is_equal(out, again):
                raise ValueError(
                    f"{name} is in several pipeline stages of {self._contents.files.folder} with different values "
                    f"(mp_rank {', '.join(str(ranks[0]) for ranks in self._stages[name])}); use a checkpoint in which "
                    "tied weights are equal"
                )

    def where(self, name: str) -> str:
        """The files of a tensor's weights."""
        by_rank = self._contents.experts.get(name) or self._contents.dense.get(name, {})
        paths = dict.fromkeys(shard.path for shard in by_rank.values())
        return list_names(list(paths) or [self._contents.files.folder])

    def _read_stage_into(self, name: str, ranks: list[int], out: Tensor) -> None:
        rule = self._rule(name)
        if len(ranks) > 1 and rule and rule[1] is not None:
            sizes = [self._shards.specs[name][mp_rank].shape[rule[1]] for mp_rank in ranks]
            for mp_rank, part in zip(ranks, out.split(sizes, rule[1]), strict=True):
                part.copy_(self._shards.view(name, mp_rank))
            return
        if not rule and not self._are_copies(name, ranks):
            differ = [n for n in self._stages if not self._rule(n) and not self._is_replicated(n)]
            raise _needs_rules(self._contents, differ)
        out.copy_(self._shards.view(name, ranks[0]))

    def _is_replicated(self, name: str) -> bool:
        return all(self._are_copies(name, ranks) for ranks in self._stages[name])

    def _are_copies(self, name: str, ranks: list[int]) -> bool:
        """Whether these ranks of one stage have the same numbers; for a single rank nothing is read."""
        if len(ranks) == 1:
            return True
        first = self._shards.view(name, ranks[0])
        return all(is_equal(first, self._shards.view(name, mp_rank)) for mp_rank in ranks[1:])

    def _rule(self, name: str) -> tuple[Pattern, int | None] | None:
        return next((rule for rule in self._rules if rule[0].search(name)), None)

    def _is_one_shape(self, name: str) -> bool:
        return len({spec.shape for spec in self._shards.specs[name].values()}) == 1

    def _merged_spec(self, name: str) -> Tensor:
        merged = []
        rule = self._rule(name)
        for ranks in self._stages[name]:
            parts = [self._shards.specs[name][mp_rank] for mp_rank in ranks]
            if len(parts) == 1 or not rule or rule[1] is None:
                merged.append(parts[0])
                continue
            shape = _concatenated_shape([part.shape for part in parts], rule[1])
            if shape is None:
                raise ValueError(
                    f"tensor_parallel_rules joins {name} along dimension {rule[1]} ({rule[0].text!r}), but its shards "
                    f"have the shapes {[tuple(part.shape) for part in parts]}; correct the dimension, or exclude it "
                    "from the regular expression"
                )
            merged.append(meta(shape, parts[0].dtype))
        if len({spec.shape for spec in merged}) > 1:
            raise ValueError(
                f"{name} is in several pipeline stages of {self._contents.files.folder} with the shapes "
                f"{[tuple(spec.shape) for spec in merged]}; the files are not from one run"
            )
        return merged[0]


def _concatenated_shape(shapes: Sequence[Sequence[int]], dim: int) -> list[int] | None:
    """The shape of concatenated shards; `None` if they cannot be concatenated.

    `torch.cat` of meta tensors would give it, too, but spends seconds on imports that nothing else here needs.
    """
    result = list(shapes[0])
    if not -len(result) <= dim < len(result):
        return None
    dim %= len(result)
    result[dim] = sum(shape[dim] for shape in shapes if len(shape) == len(result))
    fits = all(len(s) == len(result) and [*s[:dim], *s[dim + 1 :]] == result[:dim] + result[dim + 1 :] for s in shapes)
    return result if fits else None


def _needs_rules(contents: Contents, names: list[str]) -> ValueError:
    return ValueError(
        f"{contents.files.folder} has {contents.tensor_parallel_size} different tensor-parallel shards of "
        f"{', '.join(names)}; add tensor_parallel_rules that match them, such as (r'fc2\\.weight$', 1) to concatenate "
        "along dimension 1 or (r'layer_norm', None) to take the first shard"
    )


@dataclass(frozen=True)
class DeepSpeedLayout:
    """A description of a DeepSpeed checkpoint.

    Attributes:
        checkpoint_dir: the folder.
        tag: the folder inside it.
        zero_stage: 0 without ZeRO.
        tensor_parallel_size, pipeline_parallel_size: their product is the number of main files.
        data_parallel_size: replicas of the model outside of experts; `None` if the checkpoint does not say.
        expert_parallel_size: largest number of ranks that share the experts of a module; `None` if unknown.
        expert_data_parallel_size: replicas of an expert; `None` if unknown.
        num_experts: name of each MoE module -> number of experts.
        dtypes: dtypes of the weights, sorted by name.
        num_tensors: number of tensors after merging.
        num_bytes: bytes of the weights as stored, with the shards of all ranks.
        deepspeed_version: the version that wrote it; empty if it does not say.
        has_masters: whether it has files of an optimizer with fp32 copies of the weights.
        problems: what is missing or does not fit.
    """

    checkpoint_dir: Path
    tag: str = ""
    zero_stage: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int | None = None
    expert_parallel_size: int | None = None
    expert_data_parallel_size: int | None = None
    num_experts: dict[str, int] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = ()
    num_tensors: int = 0
    num_bytes: int = 0
    deepspeed_version: str = ""
    has_masters: bool = False
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes) or "no dtype"
        sizes = {
            "tensor": self.tensor_parallel_size,
            "pipeline": self.pipeline_parallel_size,
            "data": self.data_parallel_size,
            "expert": self.expert_parallel_size,
            "expert data": self.expert_data_parallel_size,
        }
        parallel = ", ".join(f"{name} {'unknown' if size is None else size}" for name, size in sizes.items())
        lines = [
            f"{self.checkpoint_dir}, tag {self.tag or 'unknown'}, DeepSpeed {self.deepspeed_version or 'unknown'}",
            f"{self.num_tensors:,} tensors of {dtypes}, {self.num_bytes / 1e6:,.1f} MB",
            f"ZeRO stage {self.zero_stage}, fp32 masters: {'yes' if self.has_masters else 'no'}",
            f"parallel sizes: {parallel}",
            f"MoE modules: {len(self.num_experts)}",
            *(f"  {module}: {num_experts} experts" for module, num_experts in self.num_experts.items()),
            *(f"problem: {problem}" for problem in self.problems),
        ]
        return "\n".join(map(printable, lines))


def inspect_deepspeed_checkpoint(checkpoint_dir: str | os.PathLike[str], *, tag: str | None = None) -> DeepSpeedLayout:
    """Describe a checkpoint without reading its tensors.

    Args:
        checkpoint_dir: as for `read_deepspeed_state_dict`.
        tag: as for `read_deepspeed_state_dict`.

    Returns:
        The layout; its `problems` list all errors.
    """
    try:
        contents = read_contents(find_files(Path(checkpoint_dir), tag))
    except ValueError as error:
        return DeepSpeedLayout(Path(checkpoint_dir), tag or "", problems=(str(error),))
    check_contents(contents)
    mains = list(contents.mains.values())
    shards = [shard for by_rank in contents.shards.values() for shard in by_rank.values()]
    data_parallel = max((main.data_parallel_size for main in mains), default=0) or None
    expert_parallel = _expert_parallel_size(contents)
    return DeepSpeedLayout(
        checkpoint_dir=Path(checkpoint_dir),
        tag=contents.files.tag,
        zero_stage=3 if contents.files.has_zero3 else max((main.zero_stage for main in mains), default=0),
        tensor_parallel_size=contents.tensor_parallel_size,
        pipeline_parallel_size=contents.pipeline_parallel_size,
        data_parallel_size=data_parallel,
        expert_parallel_size=expert_parallel,
        expert_data_parallel_size=_expert_data_parallel_size(contents, data_parallel, expert_parallel),
        num_experts=dict(contents.num_experts),
        dtypes=tuple(sorted({shard.spec.dtype for shard in shards}, key=str)),
        num_tensors=len(contents.shards),
        num_bytes=sum(shard.spec.nbytes for shard in shards),
        deepspeed_version=next((main.deepspeed_version for main in mains), ""),
        has_masters=bool(contents.files.zero) or _has_optimizer(contents),
        problems=tuple(problem.text for problem in contents.problems),
    )


def _has_optimizer(contents: Contents) -> bool:
    """Whether a file `expp_rank` holds an optimizer's state; old versions write empty files, exports write none."""
    for path in contents.files.expert_optimizers.values():
        try:
            content = load_file(path)
        except ValueError as error:
            contents.add(str(error))
            return False
        if isinstance(content, Mapping) and content.get("optimizer"):
            return True
    return False


def _expert_parallel_size(contents: Contents) -> int | None:
    """Computed from the number of experts that rank 0 trains, or else from the files of expert-parallel ranks."""
    local: dict[str, int] = defaultdict(int)
    for main in contents.mains.values():
        for name in main.param_shapes or ():
            if expert := parse_expert_name(name):
                local[expert.module] = max(local[expert.module], expert.expert + 1)
    sizes = [contents.num_experts[module] // count for module, count in local.items() if module in contents.num_experts]
    ranks = {expert_rank for _, expert_rank in contents.files.expert_optimizers}
    return max(sizes, default=len(ranks)) or None


def _expert_data_parallel_size(
    contents: Contents, data_parallel: int | None, expert_parallel: int | None
) -> int | None:
    if not data_parallel or not expert_parallel:
        return None
    is_sharded = any(len(by_rank) > 1 for by_rank in contents.experts.values())
    num_ranks = data_parallel * (1 if is_sharded else contents.tensor_parallel_size)
    return num_ranks // expert_parallel


__all__ = ["DeepSpeedLayout", "inspect_deepspeed_checkpoint", "read_deepspeed_state_dict"]
