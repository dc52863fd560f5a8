"""The norm over parameters on different meshes is that of the whole gradients in one process."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from hf_moe_ted import ClippedAdamW
from hf_moe_ted.distributed.gradient_norm import clip_grad_norm_, clip_in_step
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


class InInterpreter(ClippedAdamW):
    """Triton's kernels on a CPU."""

    _device_types = ("cuda", "cpu")


def clip_in_steps() -> list[tuple[Tensor, list[Tensor]]]:
    results = []
    for max_norm in MAX_NORMS[1:]:
        optimizer = InInterpreter([*sharded(), nn.Parameter(torch.ones(2))], lr=0.1)
        norm = clip_in_step(optimizer, max_norm)
        assert norm is not None
        optimizer.step()
        assert None not in optimizer._step_tables.values()
        whole = optimizer.param_groups[0]["params"][:-1]
        results.append((norm, [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in whole]))
    return results


def clip_on_one_rank() -> Tensor:
    """The others clip in the step."""
    optimizer = InInterpreter(sharded(), lr=0.1)
    if dist.get_rank() == 1:
        return clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
    norm = clip_in_step(optimizer, 0.5)
    assert norm is not None
    return norm


def test_sharded_and_clipped_in_the_step() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    by_rank = run_distributed_test(clip_in_steps, 4)
    for index, max_norm in enumerate(MAX_NORMS[1:]):
        parameters = parameters_of(gradients())
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        expected = nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        for results in by_rank:
            norm, whole = results[index]
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
            assert torch.equal(norm, by_rank[0][index][0])
            for found, parameter in zip(whole, parameters, strict=True):
                torch.testing.assert_close(found, parameter.detach(), rtol=1e-6, atol=1e-7)


def test_ranks_may_clip_in_either_way() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    norms = run_distributed_test(clip_on_one_rank, 4)
    assert norms == [pytest.approx(float(norms[0]), rel=1e-6)] * 4


def test_sharded_gradients_without_their_weights_are_left_to_others() -> None:
    (result,) = run_distributed_test(clip_dtensor_alone, 1)
    assert result is None


def clip_dtensor_alone() -> Tensor | None:
    mesh = init_device_mesh("cpu", (1,))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    parameter.grad = torch.ones_like(parameter)
    return InInterpreter([parameter]).clip_in_step(1.0)
