"""The collectives of one rank in a training step, with their bytes and links.

Bytes are the input of a rank to a collective, with its own part, as docs/ted.md and tests count them. Experts are
assumed to be evenly loaded.

Letters: N tokens, D model width, E experts of a layer, K experts per token.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..distributed.layout import Layout
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.router import expert_capacity
from .parameters import (
    SIDES,
    HashableConfig,
    is_spread_expert,
    layer_groups,
    parameter_shapes,
    shard_shape,
)
from .workload import Workload

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Axis = Literal["tp", "etp", "fold", "ep", "dp", "edp", "dp_replicate", "edp_replicate"]
_REPLICAS: dict[Axis, Axis] = {"dp": "dp_replicate", "edp": "edp_replicate"}
Phase = Literal["forward", "recomputation", "backward"]
FLOAT32, INT64 = 4, 8


@dataclass(frozen=True)
class Collective:
    """
    Attributes:
        operation: kind of the collective.
        axis: axis of its group, as in `distributed/mesh.py`; dp and edp are the axes over which ZeRO shards, within a
            replica.
        phase: part of a forward and its backward.
        num_bytes: bytes of a rank's input.
        is_zero: whether it belongs to ZeRO and overlaps with computation.
        count: number of such collectives in the phase.
        is_last_of_layer: whether nothing of its layer runs after it.
    """

    operation: Operation
    axis: Axis
    phase: Phase
    num_bytes: int
    is_zero: bool = False
    count: int = 1
    is_last_of_layer: bool = False


def collectives_of_step(config: ZCodeM3Config, layout: Layout, workload: Workload) -> list[Collective]:
    """Collectives of one rank in a step of `workload.accumulation` forwards and backwards; none in groups of one."""
    once = _collectives_of_forward(config, layout, workload)
    found = [replace(c, count=c.count * workload.accumulation) for c in once if group_of(c.axis, layout)[0] > 1]
    for collective in _collectives_of_zero(config, layout, workload):
        repeats = workload.accumulation
        is_once = {"all_gather": layout.zero_stage < 3, "reduce_scatter": layout.zero_stage != 2, "all_reduce": True}
        if is_once[collective.operation]:
            repeats = 1  # at the beginning or the end of the accumulation
        found.append(replace(collective, count=collective.count * repeats))
    return [c for c in found if group_of(c.axis, layout)[0] > 1 and c.num_bytes]


def group_of(axis: Axis, layout: Layout) -> tuple[int, int]:
    """Number of ranks in a group, and the distance of neighbours in it."""
    tp, etp, ep = layout.tensor_parallel_size, layout.expert_tensor_parallel_size, layout.expert_parallel_size
    if axis in ("tp", "dp"):
        return (tp, 1) if axis == "tp" else (layout.zero_size, tp)
    if axis == "edp":
        return layout.expert_zero_size, ep * etp
    if axis in ("dp_replicate", "edp_replicate"):
        size = layout.dp_replicate_size if axis == "dp_replicate" else layout.expert_dp_replicate_size
        return size, layout.ranks_per_replica
    return {"etp": (etp, 1), "fold": (tp // etp, etp), "ep": (ep, etp)}[axis]


# ---- forward, recomputation and backward ----


def _collectives_of_forward(config: ZCodeM3Config, layout: Layout, workload: Workload) -> Iterator[Collective]:
    for side, num_experts, count in layer_groups(config):
        of_layer = _of_layer(config, layout, workload, side, num_experts)
        once = [replace(c, count=c.count * count) for c in of_layer if group_of(c.axis, layout)[0] > 1]
        yield from once
        if workload.checkpointing == "full":
            yield from _recomputed(once, config)
    yield from _outside_of_layers(config, layout, workload)


def _recomputed(once: list[Collective], config: ZCodeM3Config) -> Iterator[Collective]:
    """Recomputation stops when backward has everything: without dropout, before the last sum of a layer."""
    for collective in once:
        if collective.phase == "forward" and (config.dropout > 0 or not collective.is_last_of_layer):
            yield replace(collective, phase="recomputation")


def _of_layer(
    config: ZCodeM3Config, layout: Layout, workload: Workload, side: str, num_experts: int | None
) -> Iterator[Collective]:
    num_tokens = workload.num_tokens(side)
    states = num_tokens * config.d_model * workload.element_bytes
    is_dense = num_experts is None
    num_blocks = (1 if side == "encoder" else 2) + (config.use_residual and not is_dense)
    for phase in ("forward", "backward"):
        yield Collective("all_reduce", "tp", phase, states, count=num_blocks)
    if is_dense:
        yield Collective("all_reduce", "tp", "forward", states, is_last_of_layer=True)
        yield Collective("all_reduce", "tp", "backward", states)
    elif layout.expert_parallel_size == 1:
        yield from _split_experts(config, num_tokens, states, workload)
    else:
        yield from _exchange(config, layout, workload, num_tokens, num_experts or 0)


def _split_experts(config: ZCodeM3Config, num_tokens: int, states: int, workload: Workload) -> Iterator[Collective]:
    """Collectives if every rank has a slice of all experts: sums of outputs, and of gradients of tokens and weights."""
    weights = num_tokens * config.num_experts_per_tok * workload.element_bytes
    yield Collective("all_reduce", "etp", "forward", states, is_last_of_layer=not config.use_residual)
    yield Collective("all_reduce", "etp", "backward", states)
    yield Collective("all_reduce", "etp", "backward", weights)


@dataclass(frozen=True)
class Exchange:
    """The exchange of one rank in a sparse layer.

    Attributes:
        num_rows: rows that it sends; with evenly loaded experts it receives the same number.
        num_shares: number of ranks that hold the same tokens and divide them among themselves.
        drops_duplicates: whether the ranks that split an expert gather the rows of all of them.
        joined_rows: rows, or tokens, of one share that all ranks of the group get at the end.
    """

    num_rows: int
    num_shares: int
    drops_duplicates: bool
    joined_rows: int

    def computed_rows(self, layout: Layout) -> int:
        """Rows that the rank's experts compute."""
        return self.num_rows * (layout.expert_tensor_parallel_size if self.drops_duplicates else 1)


def exchange_of(config: ZCodeM3Config, layout: Layout, num_tokens: int, num_experts: int) -> Exchange:
    """The exchange of a rank for `num_tokens` tokens of its batch."""
    tp, etp = layout.tensor_parallel_size, layout.expert_tensor_parallel_size
    drops = layout.duplicate_token_dropping and layout.expert_parallel_size > 1 and etp > 1
    num_shares = tp if drops or etp == 1 else tp // etp
    num_slots, top_k = num_tokens * config.num_experts_per_tok, config.num_experts_per_tok
    capacity = num_slots
    if config.capacity_factor is not None:
        factor = config.capacity_factor * top_k
        capacity = min(_capacity(num_tokens, num_experts, factor, config.min_capacity), num_slots)
    if layout.pad_expert_input_to_capacity:
        num_rows = num_experts * -(-capacity // num_shares)
        return Exchange(num_rows, num_shares, drops, num_rows)
    kept = min(num_slots, capacity * num_experts)
    return Exchange(round(kept / num_shares), num_shares, drops, -(-num_tokens // num_shares))


@functools.lru_cache(maxsize=4096)
def _capacity(num_tokens: int, num_experts: int, factor: float, min_capacity: int) -> int:
    return int(expert_capacity(num_tokens, num_experts, factor, min_capacity))


def _exchange(
    config: ZCodeM3Config, layout: Layout, workload: Workload, num_tokens: int, num_experts: int
) -> Iterator[Collective]:
    exchange = exchange_of(config, layout, num_tokens, num_experts)
    row = config.d_model * workload.element_bytes
    rows = exchange.num_rows * row
    sizes = INT64 * num_experts * layout.overlap_chunks
    if layout.pad_expert_input_to_capacity:
        sizes += INT64 * layout.expert_parallel_size  # the capacity, which must be equal
    yield Collective("all_gather" if layout.moves_experts else "all_to_all", "ep", "forward", sizes)
    if exchange.drops_duplicates:  # of the rank's own experts, or of all between which experts move
        group_size = layout.expert_parallel_size if layout.moves_experts else 1
        yield Collective("all_gather", "etp", "forward", sizes * group_size)
    chunks = layout.overlap_chunks
    for phase in ("forward", "backward"):
        part = Collective("all_to_all", "ep", phase, rows // chunks, count=2 * chunks)
        yield part
        if exchange.drops_duplicates:
            yield replace(part, operation="all_gather", axis="etp", count=chunks)
            summed = layout.expert_tensor_parallel_size * part.num_bytes
            yield replace(part, operation="reduce_scatter", axis="etp", num_bytes=summed, count=chunks)
        else:
            yield replace(part, operation="all_reduce", axis="etp", count=chunks)
    if exchange.num_shares > 1:
        axis: Axis = "tp" if exchange.num_shares == layout.tensor_parallel_size else "fold"
        joined = Collective("all_gather", axis, "forward", exchange.joined_rows * row)
        is_last = not (config.use_residual or layout.pad_expert_input_to_capacity)
        yield replace(joined, is_last_of_layer=is_last)
        yield replace(joined, phase="backward")
        if not layout.pad_expert_input_to_capacity:
            weights = exchange.joined_rows * config.num_experts_per_tok * workload.element_bytes
            yield replace(joined, phase="backward", num_bytes=weights)


def _outside_of_layers(config: ZCodeM3Config, layout: Layout, workload: Workload) -> Iterator[Collective]:
    """Tensor parallelism outside of layers: embeddings, untied positions, the encoder's states, head and loss."""
    if layout.tensor_parallel_size == 1:
        return
    states = {side: workload.num_tokens(side) * config.d_model * workload.element_bytes for side in SIDES}
    for side in SIDES:
        yield Collective("all_reduce", "tp", "forward", states[side])
        if config.position_embedding_type == "tupe":
            yield Collective("all_reduce", "tp", "backward", states[side], count=2)
    yield Collective("all_reduce", "tp", "backward", states["encoder"])
    yield Collective("all_reduce", "tp", "backward", states["decoder"])
    labels = workload.num_tokens("decoder") * FLOAT32
    yield Collective("all_reduce", "tp", "forward", labels)
    yield Collective("all_reduce", "tp", "forward", 3 * labels)


# ---- ZeRO ----


def _collectives_of_zero(config: ZCodeM3Config, layout: Layout, workload: Workload) -> Iterator[Collective]:
    """The parameters of a unit are gathered and its gradients reduce-scattered; stage 3 gathers again for backward.

    Then gradients are summed over replicas.
    """
    if layout.data_parallel_size == 1:
        return
    for axis, numel in _units(HashableConfig.of(config), layout):
        size = group_of(axis, layout)[0]
        gather = Collective("all_gather", axis, "forward", numel // size * workload.element_bytes, is_zero=True)
        yield gather
        if layout.zero_stage == 3:
            yield replace(gather, phase="backward")
        scattered = numel * workload.element_bytes
        yield Collective("reduce_scatter", axis, "backward", scattered, is_zero=True)
        yield Collective("all_reduce", _REPLICAS[axis], "backward", scattered // size, is_zero=True)


@functools.lru_cache(maxsize=4096)
def _units(hashable: HashableConfig, layout: Layout) -> tuple[tuple[Axis, int], ...]:
    """Axis and padded number of elements of each unit that is gathered at once."""
    dense: dict[object, int] = {}
    experts: dict[object, int] = {}
    for parameter in parameter_shapes(hashable.config):
        if is_spread_expert(parameter, layout):
            if layout.wraps_experts_in_fsdp:
                numel = math.prod(shard_shape(parameter, layout)) * layout.expert_zero_size  # padded, too
                experts[parameter.layer] = experts.get(parameter.layer, 0) + numel
            continue
        unit = None if parameter.layer is None else (parameter.layer[0], parameter.layer[1] // layout.layers_per_unit)
        padded = math.prod(shard_shape(parameter, layout)) * layout.zero_size
        dense[unit] = dense.get(unit, 0) + padded
    return (*(("dp", numel) for numel in dense.values()), *(("edp", numel) for numel in experts.values()))


# ---- links ----


@dataclass(frozen=True)
class LinkBytes:
    """Bytes that a rank sends to ranks inside and outside of its machine."""

    fast: float
    slow: float


def bytes_over_links(collective: Collective, layout: Layout, gpus_per_node: int) -> LinkBytes:
    """Bytes that one collective sends, as a ring (all-to-all: directly); ranks of a machine share outside traffic."""
    size, stride = group_of(collective.axis, layout)
    local = max(1, min(size, gpus_per_node // stride))  # ranks of the group in one machine
    if collective.operation == "all_to_all":
        share = collective.num_bytes / size
        return LinkBytes(share * (local - 1), share * (size - local))
    sent = {
        "all_reduce": 2 * collective.num_bytes * (size - 1) / size,
        "all_gather": collective.num_bytes * (size - 1),
        "reduce_scatter": collective.num_bytes * (size - 1) / size,
    }[collective.operation]
    if local == size:
        return LinkBytes(sent, 0.0)
    return LinkBytes(sent * (local - 1) / local, sent / local)  # one of the ring's `local` hops leaves the machine


__all__ = [
    "Axis",
    "Collective",
    "Exchange",
    "LinkBytes",
    "Operation",
    "bytes_over_links",
    "collectives_of_step",
    "exchange_of",
    "group_of",
]
