"""Regions against what torch puts on each rank, for whole tensors whose elements are their own positions."""

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from hf_moe_ted.distributed import sharding
from hf_moe_ted.distributed.sharding import local_shape, regions, regions_at, sources
from hf_moe_ted.testing import run_distributed_test


def positions(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) + 1


def check_local(tensor: Tensor, whole: Tensor) -> int:
    """Regions show the right part of the whole, as views that cover the local tensor; how many there are."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    found = regions(tensor)
    for region in found:
        assert torch.equal(region.local, whole[region.slices])
        assert region.local.shape == region.sizes
        assert region.local.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
    assert sum(region.local.numel() for region in found) == local.numel()
    return len(found)


def check_sources(tensor: Tensor, whole: Tensor) -> None:
    """The sources of each rank make up the whole, from what they have and from where rank 0 takes it to be."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    locals_: list[Tensor] = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(locals_, local.detach().clone())
    result = torch.zeros_like(whole)
    for source, coordinate in sources(tensor, dist.get_rank()).items():
        assert locals_[source].numel() == local_shape(tensor, coordinate).numel()
        for region in regions_at(tensor, coordinate, locals_[source]):
            assert not result[region.slices].any()
            result[region.slices] = region.local
    assert torch.equal(result, whole)


def random_case(generator: random.Random, mesh: DeviceMesh) -> tuple[tuple[int, ...], list[Placement]]:
    """A shape of sizes that divide or not and placements whose order is that of the mesh."""
    shape = tuple(generator.choice([1, 2, 3, 4, 5, 7, 8, 12]) for _ in range(generator.randint(1, 3)))
    free = set(range(len(shape)))  # dims that a strided shard may have for itself
    placements: list[Placement] = []
    for _ in range(mesh.ndim):
        kind = generator.choice(["shard", "strided", "replicate"])
        dims = sorted(free) if kind == "strided" else list(range(len(shape)))
        strided = {p.dim for p in placements if isinstance(p, _StridedShard)}
        dims = [dim for dim in dims if dim not in strided]
        if kind == "replicate" or not dims:
            placements.append(Replicate())
            continue
        dim = generator.choice(dims)
        free.discard(dim)
        placements.append(_StridedShard(dim, split_factor=3) if kind == "strided" else Shard(dim - len(shape)))
    return shape, placements


def meshes_and_placements() -> int:
    generator = random.Random(0)
    most = 0
    for mesh_shape in ((8,), (2, 4), (4, 2), (2, 2, 2), (8, 1), (1, 2, 4)):
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=tuple("abc"[: len(mesh_shape)]))
        for _ in range(12):
            shape, placements = random_case(generator, mesh)
            whole = positions(shape)
            tensor = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            most = max(most, check_local(tensor, whole))
            check_sources(tensor, whole)
    return most


class Experts(nn.Module):
    """Integers are no parameters of FSDP2, so positions are floats, exact up to 2^24."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def fsdp_over_others() -> list[int]:
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("efsdp", "ted_ep", "etp"))
    inner = mesh["ted_ep", "etp"]
    strided = _StridedShard(1, split_factor=2)
    counts = []
    for num_experts in (1, 3, 4, 5, 9):
        wholes = {
            "up_proj": positions((num_experts, 6, 3)).float(),
            "gate_up_proj": positions((num_experts, 12, 3)).float(),
            "down_proj": positions((num_experts, 3, 5)).float(),
            "down_proj_bias": positions((num_experts, 3)).float(),
            "twice": positions((num_experts, 3)).float(),
        }
        placements: dict[str, list[Placement]] = {
            "up_proj": [Shard(0), Shard(1)],
            "gate_up_proj": [Shard(0), strided],
            "down_proj": [Shard(0), Shard(2)],
            "down_proj_bias": [Shard(0), Replicate()],
            "twice": [Shard(0), Shard(0)],
        }
        distributed = {
            name: distribute_tensor(whole, inner, placements[name], src_data_rank=None)
            for name, whole in wholes.items()
        }
        module = Experts(distributed)
        fully_shard(module, mesh=mesh["efsdp"])
        for name, whole in wholes.items():
            tensor = module.get_parameter(name)
            assert isinstance(tensor.placements[0], _StridedShard)
            counts.append(check_local(tensor, whole))
            check_sources(tensor, whole)
            like = torch.empty_like(tensor.detach())  # what is made in its layout has it
            assert [(r.offsets, r.sizes) for r in regions(like)] == [(r.offsets, r.sizes) for r in regions(tensor)]
    return counts


def odd_vocabulary() -> None:
    """Where sizes do not divide, FSDP2's order of shards differs from that of the mesh."""
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("fsdp", "tp"))
    for size in (1, 2, 3, 5, 9, 16, 17, 33):
        whole = positions((size, 2)).float()
        module = Experts({"weight": distribute_tensor(whole, mesh["tp"], [Shard(0)], src_data_rank=None)})
        fully_shard(module, mesh=mesh["fsdp"])
        check_local(module.weight, whole)
        check_sources(module.weight, whole)


def replicas_and_plain() -> None:
    rank = dist.get_rank()
    whole = positions((5, 4))
    assert check_local(whole.clone(), whole) == 1
    assert sources(whole, 3) == {3: ()}
    assert regions(torch.empty(0, 3)) == []
    scalar = torch.tensor(2.5)
    assert [(r.offsets, r.sizes, r.local.item()) for r in regions(scalar)] == [((), (), 2.5)]

    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("fsdp", "tp"))
    part = distribute_tensor(whole, mesh["fsdp"], [Shard(0)], src_data_rank=None)  # tensor-parallel ranks repeat it
    check_local(part, whole)
    assert list(sources(part, rank)) == list(range(rank % 2, 8, 2))
    assert sources(part, (rank + 1) % 2) == {}  # of the other replica
    hybrid = distribute_tensor(whole, mesh, [Replicate(), Shard(1)], src_data_rank=None)
    assert list(sources(hybrid, rank)) == [rank // 2 * 2, rank // 2 * 2 + 1]

    if rank < 2:
        sub = DeviceMesh("cpu", [0, 1], _init_backend=False)
        assert len(regions(DTensor.from_local(torch.ones(2), sub, [Shard(0)], run_check=False))) == 1
    with pytest.raises(ValueError, match="partial sum"):
        regions(DTensor.from_local(torch.ones(2), mesh, [Replicate(), Partial()], run_check=False))
    with pytest.raises(ValueError, match="no defined order"):
        placements = [_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=3)]
        regions(distribute_tensor(positions((24,)), mesh, placements, src_data_rank=None))
    with pytest.raises(ValueError, match=r"the local tensor has the shape \(3, 4\), but"):
        local = torch.ones(3, 4)
        regions(DTensor.from_local(local, mesh["fsdp"], [Shard(0)], run_check=False, shape=(5, 4), stride=(4, 1)))


def all_of_eight() -> tuple[int, list[int]]:
    most, counts = meshes_and_placements(), fsdp_over_others()
    odd_vocabulary()
    replicas_and_plain()
    return most, counts


def test_regions_are_what_torch_puts_on_ranks() -> None:
    results = run_distributed_test(all_of_eight, 8)
    assert {most for most, _ in results} & {6, 9}  # strided shards of two dims were among the random ones
    counts = list(itertools.chain.from_iterable(counts for _, counts in results))
    assert {0, 1, 2} <= {*counts}  # empty shards, rectangles, and gate and up


@pytest.mark.parametrize("intervals", [[(0, 7)], [(2, 5), (9, 10), (12, 20)], [(0, 1), (3, 4)], []])
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5])
def test_chunks_of_intervals_are_those_of_their_elements(intervals: list[tuple[int, int]], num_chunks: int) -> None:
    elements = [index for start, stop in intervals for index in range(start, stop)]
    size = -(-len(elements) // num_chunks)
    for chunk in range(num_chunks):
        found = sharding._chunk(intervals, num_chunks, chunk)
        assert all(start < stop for start, stop in found)
        expected = elements[chunk * size : (chunk + 1) * size]
        assert [index for start, stop in found for index in range(start, stop)] == expected
