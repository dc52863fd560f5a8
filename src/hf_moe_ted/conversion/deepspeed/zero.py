"""The fp32 masters of DeepSpeed's optimizers, found by name in flat partitions.

`*zero_pp_rank_*` files of ZeRO-1 and 2 hold one partition of each parameter group, and the place of each name in it.
`expp_rank_*` files of fp16 and bf16 without ZeRO hold no names. There masters are found by their values: each must
round to its weight.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.messages import UnreadableFileError, shorten
from .contents import Contents, Shard, parse_expert_name, replace_expert
from .files import MAX_RANKS, FilePool, content_errors, list_names, load_file

HALF_DTYPES = (torch.float16, torch.bfloat16)

_EXPERT_GROUP = re.compile(r"ep_size_(\d+)")


@dataclass(frozen=True)
class Fragment:
    """A part of a master: numbers `start` to `start + numel` of group `group` in a file.

    Attributes:
        keys: the keys that lead to the groups through nested dicts and lists.
        item: the number of the tensor inside the group, or `None` if the group is one flat tensor.
    """

    path: Path
    keys: tuple[str, ...]
    group: int
    item: int | None
    start: int
    numel: int

    def view(self, pool: FilePool) -> Tensor:
        """The numbers in mapped memory, flat."""
        return pool.view(self.path, self._select)

    def _select(self, content: Any) -> Tensor:
        for key in self.keys:
            content = content[key]
        tensor = content[self.group] if self.item is None else content[self.group][self.item]
        return tensor.reshape(-1)[self.start : self.start + self.numel]


Masters = dict[str, dict[int, list[Fragment]]]
"""Fragments in order, by the name of the parameter and the model-parallel rank of the shard."""


def rounds_to(master: Tensor, weight: Tensor) -> bool:
    """Whether a master, rounded to the dtype of a weight, is that weight.

    Args:
        master: float[...].
        weight: as many numbers, of any floating-point dtype.
    """
    return is_equal(master.reshape(-1).to(weight.dtype), weight.reshape(-1))


def is_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape and numbers; NaN equals itself."""
    if torch.equal(first, second):
        return True
    if first.shape != second.shape or not first.is_floating_point():
        return False
    return torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(), second.nan_to_num())


@dataclass(frozen=True)
class _Partition:
    """One `zero_pp_rank` file without its numbers.

    Attributes:
        expert_parallel_sizes: size for each group; 0 for a group without experts.
        partition_counts: number of ranks over which each group is divided.
        slices: for each group, name -> (start, numel).
    """

    path: Path
    expert_parallel_sizes: list[int]
    partition_counts: list[int]
    slices: list[dict[str, tuple[int, int]]]


def _read_partition(path: Path) -> _Partition:
    content = load_file(path)
    with content_errors(path, "an optimizer file of ZeRO-1 or 2"):
        state = content["optimizer_state_dict"]
        slices = state.get("param_slice_mappings")
        if slices is None:
            version = shorten(str(state.get("ds_version", "of an old version")), 80)
            raise UnreadableFileError(
                f"{path} has no param_slice_mappings (DeepSpeed {version}), so its numbers cannot be assigned to "
                "parameters; use weights='model'"
            )
        groups = state["base_optimizer_state"]["param_groups"]
        counts, masters = state["partition_count"], state["single_partition_of_fp32_groups"]
        partition = _Partition(
            path=path,
            expert_parallel_sizes=[_expert_parallel_size(path, group) for group in groups],
            partition_counts=[counts] * len(groups) if isinstance(counts, int) else [int(count) for count in counts],
            slices=[{str(name): (int(s.start), int(s.numel)) for name, s in group.items()} for group in slices],
        )
        numels = [_num_masters(tensor) for tensor in masters]
        lengths = {len(groups), len(partition.partition_counts), len(slices), len(numels)}
        if len(lengths) > 1 or any(map(_overlap_or_end, partition.slices, numels)):
            raise UnreadableFileError(
                f"{path} has masters of other sizes than its param_slice_mappings says; the file is damaged"
            )
    return partition


def _num_masters(tensor: Tensor) -> int:
    if not tensor.is_floating_point():
        raise ValueError(f"its masters are {tensor.dtype}")
    return tensor.numel()


def _overlap_or_end(slices: Mapping[str, tuple[int, int]], numel: int) -> bool:
    """Whether slices of a flat tensor overlap, or reach beyond its end."""
    end = 0
    for start, length in sorted(slices.values()):
        if start < end or length < 0:
            return True
        end = start + length
    return end > numel


def _expert_parallel_size(path: Path, group: Mapping[str, Any]) -> int:
    if not group.get("moe"):
        return 0
    match = _EXPERT_GROUP.search(str(group.get("name")))
    if match is None:
        raise UnreadableFileError(
            f"{path} has a group of experts called {group.get('name')!r}, not ep_size_N, so their expert-parallel "
            "size is unknown; use weights='model'"
        )
    return int(match[1])


def find_zero_masters(contents: Contents) -> Masters:
    """Find the masters that ZeRO-1 and 2 divide over data-parallel ranks.

    Raises:
        ValueError: a rank's file is missing or unreadable, or the groups do not fit the number of ranks.
    """
    _check_partitions(contents)
    partitions = {rank: _read_partition(path) for rank, path in contents.files.zero.items()}
    found: dict[tuple[str, int], list[tuple[int, Fragment]]] = defaultdict(list)
    for (mp_rank, dp_rank), partition in partitions.items():
        for group, slices in enumerate(partition.slices):
            place = _place_in_group(contents, partition, group, mp_rank, dp_rank)
            for name, (start, numel) in slices.items():
                keys = ("optimizer_state_dict", "single_partition_of_fp32_groups")
                fragment = Fragment(partition.path, keys, group, None, start, numel)
                global_name = _global_name(contents, name, place.expert_rank, partition.expert_parallel_sizes[group])
                shard_rank = mp_rank if place.is_own_shard else next(iter(contents.experts.get(global_name, [mp_rank])))
                found[global_name, shard_rank].append((place.order, fragment))
    masters: Masters = defaultdict(dict)
    for (name, mp_rank), fragments in found.items():
        orders = [order for order, _ in fragments]
        if len({*orders}) != len(orders):
            raise ValueError(
                f"{contents.files.folder} has the master of {name} twice, in "
                f"{list_names([fragment.path.name for _, fragment in fragments])}; the files are not from one run"
            )
        masters[name][mp_rank] = [fragment for _, fragment in sorted(fragments, key=lambda pair: pair[0])]
    return masters


def _check_partitions(contents: Contents) -> None:
    files = contents.files
    num_replicas = max([main.data_parallel_size for main in contents.mains.values()], default=0)
    num_replicas = num_replicas or 1 + max(dp_rank for _, dp_rank in files.zero)
    mp_ranks = contents.tensor_parallel_size * contents.pipeline_parallel_size
    if mp_ranks * num_replicas > MAX_RANKS:
        raise ValueError(
            f"{files.folder} says that {num_replicas} data-parallel and {mp_ranks} model-parallel ranks wrote it, more "
            "than any cluster has; the main files are damaged"
        )
    expected = {(mp_rank, dp_rank) for mp_rank in range(mp_ranks) for dp_rank in range(num_replicas)}
    missing = [f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt" for mp, dp in sorted(expected - files.zero.keys())]
    if missing:
        raise ValueError(
            f"{files.folder} lacks {list_names(missing)} (with or without bf16_ in front), which weights='master' "
            "needs; use weights='model'"
        )
    if unknown := [files.zero[rank].name for rank in sorted(files.zero.keys() - expected)]:
        raise ValueError(
            f"{files.folder} has {list_names(unknown)}, but was written by {num_replicas} data-parallel and {mp_ranks} "
            "model-parallel ranks; remove the files that are not from this run"
        )


@dataclass(frozen=True)
class _Place:
    """The experts of a rank, its order among ranks with the same experts, and whether the shards are its own."""

    expert_rank: int
    order: int
    is_own_shard: bool


def _place_in_group(contents: Contents, partition: _Partition, group: int, mp_rank: int, dp_rank: int) -> _Place:
    """The place of a rank in the groups of DeepSpeed's `utils/groups.py`."""
    tp = contents.tensor_parallel_size
    num_replicas = 1 + max(dp for _, dp in contents.files.zero)
    ep, count = partition.expert_parallel_sizes[group], partition.partition_counts[group]
    if ep == 0:
        if count != num_replicas:
            raise ValueError(
                f"{partition.path} divides a group without experts over {count} ranks, but there are {num_replicas} "
                "data-parallel ranks; the files are not from one run"
            )
        return _Place(0, dp_rank, True)
    if ep * count == num_replicas:  # one tensor-parallel rank, or experts that are themselves tensor parallel
        rank, is_own_shard = dp_rank, True
    elif ep * count == num_replicas * tp:  # groups hold neighbouring ranks, tensor-parallel ones first
        rank, is_own_shard = dp_rank * tp + mp_rank % tp, False
    else:
        raise ValueError(
            f"{partition.path} divides experts over {ep} expert-parallel and {count} data-parallel ranks, which does "
            f"not fit {num_replicas} data-parallel and {tp} tensor-parallel ranks"
        )
    if any(main.is_data_before_expert for main in contents.mains.values()):
        return _Place(rank // count, rank % count, is_own_shard)
    return _Place(rank % ep, rank // ep, is_own_shard)


def _global_name(contents: Contents, name: str, expert_rank: int, expert_parallel_size: int) -> str:
    """The name of a parameter with the global id of its expert instead of the id on one rank."""
    expert = parse_expert_name(name)
    if expert is None:
        if expert_parallel_size:
            raise ValueError(f"{name} is trained in a group of experts; only weights='model' reads AutoEP checkpoints")
        return name
    num_experts = contents.num_experts.get(expert.module, 0)
    if not expert_parallel_size or num_experts % expert_parallel_size:
        raise ValueError(
            f"{name} is trained on {expert_parallel_size} expert-parallel ranks, but {expert.module} has {num_experts} "
            "experts; the optimizer files are not from this run"
        )
    return replace_expert(name, expert_rank * (num_experts // expert_parallel_size) + expert.expert)


def find_masters_by_value(contents: Contents, pool: FilePool) -> Masters:
    """Find the masters that fp16 and bf16 keep without ZeRO; they have an order but no names.

    Every weight is read once. A master belongs to the next weight in the order that it rounds to; every master must
    have one.

    Raises:
        ValueError: files are missing, or masters and weights have different orders.
    """
    masters: Masters = {}
    ranks_with_dense: set[int] = set()
    for (mp_rank, expert_rank), path in sorted(contents.files.expert_optimizers.items()):
        keys, groups, is_flat, sizes = _read_unnamed_groups(path)
        for number, ep in enumerate(sizes):
            if not ep and mp_rank in ranks_with_dense:  # every expert-parallel rank has the same masters
                continue
            weights = _candidates(contents, mp_rank, expert_rank % ep, ep) if ep else contents.dense
            shards = {name: by_rank[mp_rank] for name, by_rank in weights.items() if mp_rank in by_rank}
            shards = {name: shard for name, shard in shards.items() if mp_rank not in masters.get(name, {})}
            for name, fragment in _align(path, groups[number], is_flat, keys, number, shards, pool):
                masters.setdefault(name, {})[mp_rank] = [fragment]
        ranks_with_dense.add(mp_rank)
    missing = [name for name, by_rank in contents.shards.items() if not masters.get(name) and parse_expert_name(name)]
    missing += [f"mp_rank {mp_rank}" for mp_rank in contents.mains if mp_rank not in ranks_with_dense]
    if missing:
        raise ValueError(
            f"{contents.files.folder} lacks expp_rank_*_optim_states.pt with the masters of {list_names(missing)}; "
            "use weights='model'"
        )
    _add_tied(contents, masters, pool)
    return masters


def _read_unnamed_groups(path: Path) -> tuple[tuple[str, ...], list[list[int]], bool, list[int]]:
    """For the groups of an `expp_rank` file: the keys to them, tensor sizes, whether flat, expert ranks."""
    content = load_file(path)
    state = content.get("optimizer") if isinstance(content, Mapping) else None
    state = state if isinstance(state, Mapping) else {}
    key = next((key for key in ("fp32_groups", "fp32_groups_flat") if state.get(key)), None)
    if key is None:
        raise UnreadableFileError(f"{path} has no fp32 masters (fp32_groups or fp32_groups_flat); use weights='model'")
    with content_errors(path, "an optimizer file"):
        is_flat = key == "fp32_groups_flat"
        groups = [[group] if is_flat else list(group) for group in state[key]]
        numels = [[_num_masters(tensor) for tensor in group] for group in groups]
        sizes = [_expert_parallel_size(path, group) for group in state["optimizer_state_dict"]["param_groups"]]
    if len(sizes) != len(numels):
        raise ValueError(
            f"{path} has {len(numels)} groups of masters for {len(sizes)} groups of parameters; the file is damaged"
        )
    return ("optimizer", key), numels, is_flat, sizes


def _add_tied(contents: Contents, masters: Masters, pool: FilePool) -> None:
    """Give a name without a master the master of an equal weight: the optimizer holds tied weights once."""
    owners: dict[tuple[int, torch.Size], list[str]] = defaultdict(list)
    for owner in [name for name in masters if name in contents.dense]:
        for mp_rank in masters[owner]:
            owners[mp_rank, contents.dense[owner][mp_rank].spec.shape].append(owner)
    for name, shards in contents.dense.items():
        for mp_rank, shard in shards.items():
            if mp_rank in masters.get(name, {}) or name in contents.mains[mp_rank].buffer_names:
                continue
            same_shape = [masters[owner][mp_rank] for owner in owners[mp_rank, shard.spec.shape]]
            if equal := next((fragments for fragments in same_shape if _match(fragments[0], shard, pool)), None):
                masters.setdefault(name, {})[mp_rank] = equal


def _candidates(contents: Contents, mp_rank: int, rank: int, size: int) -> dict[str, dict[int, Shard]]:
    """The experts of an expert-parallel rank."""
    chosen = {}
    for name, by_rank in contents.experts.items():
        expert = parse_expert_name(name)
        if expert is not None and expert.expert // max(1, contents.num_experts[expert.module] // size) == rank:
            chosen[name] = by_rank
    return chosen


def _align(
    path: Path,
    numels: list[int],
    is_flat: bool,
    keys: tuple[str, ...],
    group: int,
    weights: Mapping[str, Shard],
    pool: FilePool,
) -> Iterator[tuple[str, Fragment]]:
    """Pair the masters of a group, which are one flat tensor or one for each parameter, with weights in their order."""
    item, start = 0, 0
    for name, shard in weights.items():
        numel = shard.spec.numel()
        if is_flat:
            fragment = Fragment(path, keys, group, None, start, numel)
            is_next = start + numel <= numels[0]
        else:
            fragment = Fragment(path, keys, group, item, 0, numel)
            is_next = item < len(numels) and numels[item] == numel
        if is_next and _match(fragment, shard, pool):
            yield name, fragment
            item, start = item + 1, start + numel
    if start != sum(numels):
        raise ValueError(
            f"{path} has fp32 masters without names, and they do not match the weights in their order (group {group}, "
            f"number {start} of {sum(numels)}), so they cannot be assigned to weights; use weights='model'"
        )


def _match(fragment: Fragment, shard: Shard, pool: FilePool, num_first: int = 64) -> bool:
    """Whether the numbers round to the weight; the first ones are compared first, where most mismatches show."""
    master, weight = fragment.view(pool), shard.view(pool).reshape(-1)
    return rounds_to(master[:num_first], weight[:num_first]) and rounds_to(master, weight)


__all__ = [
    "HALF_DTYPES",
    "Fragment",
    "Masters",
    "find_masters_by_value",
    "find_zero_masters",
    "is_equal",
    "rounds_to",
]
