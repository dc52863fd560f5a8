"""The norm over parameters on different meshes is that of the whole gradients in one process."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from hf_moe_ted.distributed.gradient_norm import clip_grad_norm_
from hf_moe_ted.testing import run_distributed_test

SHAPES = [(8, 6), (3, 5), (7,), (), (4, 4), (5, 4), (6, 2), (0, 4)]
MAX_NORMS = (None, math.inf, 100.0, 0.5)


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def parameters_of(found: list[Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in found]
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def sharded() -> list[nn.Parameter]:
    """On two meshes or none, in sizes that divide or not, some replicated, some empty on a rank."""
    dense = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    experts = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("efsdp", "ep", "etp"))
    all_ranks = init_device_mesh("cpu", (4,))
    layouts: list[tuple[Any, list[Placement]] | None] = [
        (dense, [Shard(0), Shard(1)]),
        (all_ranks, [Shard(0)]),  # of 3 rows over 4 ranks, one has none
        (dense, [Shard(0), Replicate()]),
        (dense, [Replicate(), Replicate()]),
        (experts["ep", "etp"], [Shard(0), _StridedShard(1, split_factor=2)]),
        None,
        (experts["ep", "etp"], [Shard(0), Replicate()]),
        (all_ranks, [Shard(0)]),
    ]
    found = gradients()
    for index, layout in enumerate(layouts):
        if layout is not None:
            found[index] = distribute_tensor(found[index], layout[0], layout[1], src_data_rank=None)
    return parameters_of(found)


def clip_all() -> list[tuple[Tensor, list[Tensor]]]:
    results = []
    for max_norm in MAX_NORMS:
        parameters = [*sharded(), nn.Parameter(torch.ones(2))]  # the last has no gradient
        norm = clip_grad_norm_(parameters, max_norm)
        whole = [p.grad for p in parameters[:-1]]
        results.append((norm, [g.full_tensor() if hasattr(g, "full_tensor") else g for g in whole]))
        assert parameters[-1].grad is None
    assert clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0) == 0  # no gradients at all
    return results


@pytest.fixture(scope="module")
def by_rank() -> list[list[tuple[Tensor, list[Tensor]]]]:
    return run_distributed_test(clip_all, 4)


@pytest.mark.parametrize("max_norm", MAX_NORMS)
def test_sharded(by_rank: list, max_norm: float | None) -> None:
    parameters = parameters_of(gradients())
    expected = nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
    for results in by_rank:
        norm, whole = results[MAX_NORMS.index(max_norm)]
        assert norm.dtype == torch.float32
        assert torch.equal(norm, by_rank[0][MAX_NORMS.index(max_norm)][0])
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        for gradient, parameter in zip(whole, parameters, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_norm", MAX_NORMS)
def test_one_process(max_norm: float | None) -> None:
    ours, theirs = parameters_of(gradients()), parameters_of(gradients())
    norm = clip_grad_norm_(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, math.inf if max_norm is None else max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)


def test_low_precision_is_summed_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 0.01)
    norm = clip_grad_norm_([parameter], None)
    assert norm == pytest.approx(64 * float(parameter.grad[0]), rel=1e-5)
    assert norm.dtype == torch.float32
