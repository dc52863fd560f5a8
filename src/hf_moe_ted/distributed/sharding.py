"""The part of a tensor that a rank holds: rectangles of the whole tensor, as views of the local one.

DTensor describes a shard as one rectangle. That is wrong for nested and strided shards: there the local tensor consists
of several rectangles of the whole one, side by side, and DTensor cannot always gather them
(docs/upstream/torch_strided_shards.md). Code that reads or writes whole tensors works on these rectangles instead.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .private_torch import StridedShard

Interval = tuple[int, int]


@dataclass(frozen=True)
class Region:
    """A rectangle of a tensor that one rank holds.

    Attributes:
        offsets: first index in the whole tensor, one per dim.
        sizes: one per dim, none of them 0.
        local: the view of the rank's local tensor, of shape `sizes`.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local: Tensor

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the region in the whole tensor."""
        return tuple(slice(offset, offset + size) for offset, size in zip(self.offsets, self.sizes, strict=True))


def regions(tensor: Tensor) -> list[Region]:
    """The rectangles that this rank's local tensor consists of.

    Args:
        tensor: a DTensor with any mix of shards, strided shards and replicas, of any size; or a tensor that is not
            distributed, which is one region.

    Returns:
        Disjoint regions that cover the local tensor; none if it is empty or this rank is not in the mesh. The regions
        of all ranks cover the whole tensor.

    Raises:
        ValueError: a placement is a partial sum, or shards are nested in an unknown order.
    """
    if not isinstance(tensor, DTensor):
        return [_whole(local_tensor(tensor))] if tensor.numel() else []
    coordinate = tensor.device_mesh.get_coordinate()
    return [] if coordinate is None else regions_at(tensor, coordinate, local_tensor(tensor))


def regions_at(tensor: Tensor, coordinate: Sequence[int], local: Tensor) -> list[Region]:
    """`regions` of the rank at a coordinate of the tensor's mesh, as views of `local`, its local tensor."""
    if not isinstance(tensor, DTensor):
        return [_whole(local)]
    intervals_by_dim = _intervals_by_dim(tensor, coordinate)
    shape = _shape(intervals_by_dim)
    if local.numel() != shape.numel() or (local.numel() and local.shape != shape):
        raise ValueError(
            f"the local tensor has the shape {tuple(local.shape)}, but {tuple(shape)} is expected for placements "
            f"{tensor.placements} of a tensor of shape {tuple(tensor.shape)} on the mesh {tensor.device_mesh}"
        )
    found = []
    for intervals in itertools.product(*intervals_by_dim):
        view = local
        for dim, (start, stop) in enumerate(intervals):
            before = intervals_by_dim[dim][: intervals_by_dim[dim].index((start, stop))]
            view = view.narrow(dim, sum(b - a for a, b in before), stop - start)
        offsets = tuple(start for start, _ in intervals)
        found.append(Region(offsets, tuple(stop - start for start, stop in intervals), view))
    return found


def local_tensor(tensor: Tensor) -> Tensor:
    """The detached tensor that this rank holds: the local tensor of a DTensor, or any other tensor itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def local_shape(tensor: Tensor, coordinate: Sequence[int]) -> torch.Size:
    """Shape of the local tensor at a coordinate of the tensor's mesh."""
    if not isinstance(tensor, DTensor):
        return tensor.shape
    return _shape(_intervals_by_dim(tensor, coordinate))


def sources(tensor: Tensor, rank: int) -> dict[int, tuple[int, ...]]:
    """Ranks that together hold each element of a tensor once, with their coordinates in its mesh.

    Of ranks that hold the same elements, it returns those in the replica of `rank`: ranks with its coordinates on the
    mesh dims that replicate. A tensor that is not distributed is whole on every rank, and `rank` is its own source. If
    `rank` is not in the mesh of this rank's tensor, it belongs to another replica and has no sources.
    """
    if not isinstance(tensor, DTensor):
        return {rank: ()}
    ranks = tensor.device_mesh.mesh
    found = (ranks == rank).nonzero().tolist()
    if not found:
        return {}
    choices = [
        range(size) if _is_sharded(placement) else [here]
        for size, placement, here in zip(ranks.shape, tensor.placements, found[0], strict=True)
    ]
    return {int(ranks[coordinate]): coordinate for coordinate in itertools.product(*choices)}


def _whole(tensor: Tensor) -> Region:
    return Region((0,) * tensor.ndim, tuple(tensor.shape), tensor)


def _shape(intervals_by_dim: Sequence[Sequence[Interval]]) -> torch.Size:
    return torch.Size(sum(stop - start for start, stop in intervals) for intervals in intervals_by_dim)


def _is_sharded(placement: object) -> bool:
    return isinstance(placement, (Shard, StridedShard))


def _intervals_by_dim(tensor: DTensor, coordinate: Sequence[int]) -> list[list[Interval]]:
    """For each dim, the intervals that the rank at `coordinate` holds, in the order of its local tensor."""
    mesh_dims: list[list[int]] = [[] for _ in tensor.shape]
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise ValueError(f"placements {tensor.placements}: a partial sum has no regions, reduce the tensor first")
        if isinstance(placement, (Shard, StridedShard)) and tensor.device_mesh.size(mesh_dim) > 1:
            mesh_dims[placement.dim % tensor.ndim].append(mesh_dim)
    result = []
    for size, dims in zip(tensor.shape, mesh_dims, strict=True):
        intervals = [(0, size)] if size else []
        for mesh_dim, split_factor in _in_order_of_sharding(tensor, dims):
            num_chunks, index = tensor.device_mesh.size(mesh_dim), coordinate[mesh_dim]
            groups = [_chunk(intervals, split_factor, group) for group in range(split_factor)]
            intervals = [part for group in groups for part in _chunk(group, num_chunks, index)]
        result.append(_merge(intervals))
    return result


def _in_order_of_sharding(tensor: DTensor, mesh_dims: list[int]) -> list[tuple[int, int]]:
    """Mesh dims that shard one dim, each with its number of groups, in the order in which the dim was sharded.

    FSDP2 shards again what tensor parallelism has sharded. It calls this `_StridedShard` on its mesh dim, which comes
    first, with the earlier number of shards as split factor. Such a shard is applied after those shards, in one group;
    to apply it in the order of the mesh is the same only if sizes divide. Any other split factor means a tensor that is
    sharded in groups, such as gate and up projections in one.
    """
    order: list[tuple[int, int]] = []
    for mesh_dim in reversed(mesh_dims):
        placement = tensor.placements[mesh_dim]
        split_factor = int(placement.split_factor) if isinstance(placement, StridedShard) else 1
        sizes = [tensor.device_mesh.size(other) for other, _ in order]
        num_shards_before = [math.prod(sizes[:count]) for count in range(len(sizes) + 1)]
        if split_factor in num_shards_before:
            order.insert(num_shards_before.index(split_factor), (mesh_dim, 1))
        else:
            order.insert(0, (mesh_dim, split_factor))
    if len(order) > 1 and any(split_factor > 1 for _, split_factor in order):
        raise ValueError(
            f"placements {tensor.placements} on a mesh {tuple(tensor.device_mesh.shape)}: a dim that is sharded in "
            "groups (split_factor) and once more has no defined order; shard another dim"
        )
    return order


def _chunk(intervals: Sequence[Interval], num_chunks: int, index: int) -> list[Interval]:
    """One chunk, as in `torch.chunk`, of the intervals in sequence; empty if there is not enough."""
    total = sum(stop - start for start, stop in intervals)
    size, first = Shard.local_shard_size_and_offset(total, num_chunks, index)
    found, position = [], 0
    for start, stop in intervals:
        begin, end = max(first - position, 0), min(first + size - position, stop - start)
        if begin < end:
            found.append((start + begin, start + end))
        position += stop - start
    return found


def _merge(intervals: Sequence[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, stop in intervals:
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], stop
        else:
            merged.append((start, stop))
    return merged


__all__ = ["Region", "local_shape", "local_tensor", "regions", "regions_at", "sources"]
