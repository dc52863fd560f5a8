"""ClippedAdamW on a CUDA device: the numbers of torch's fused AdamW, no waiting, and no memory of others."""

import math
from collections.abc import Iterator

import pytest
import torch
from clipped_adamw_cases import DTYPES, assert_close_to_torch, params_of, set_gradients, train
from torch import nn
from torch.optim import AdamW

from hf_moe_ted import ClippedAdamW

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """New tensors are full of NaN, so that an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norms", [[None] * 6, [1.0] * 6, [1e9, 0.3, math.inf, None, 0.01, 1.0]])
def test_steps_are_those_of_torch(dtype: torch.dtype, max_norms: list[float | None]) -> None:
    """But for the bias corrections, of which torch computes the powers in float32, and roundings to the other side."""
    betas = (0.9, 0.999)
    actual, norms = train(ClippedAdamW, dtype, "cuda", max_norms, betas)
    expected, expected_norms = train(AdamW, dtype, "cuda", max_norms, betas)
    assert_close_to_torch(actual, expected, 2 if dtype == torch.bfloat16 else 16)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
    assert all(table is not None for table in actual._step_tables.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tensors(dtype: torch.dtype) -> None:
    """More bytes than 32 bits count, and elements that a norm must not miss."""
    param = nn.Parameter(torch.zeros(2**31 // dtype.itemsize + 24_577, dtype=dtype, device="cuda"))
    param.grad = torch.zeros_like(param)
    param.grad[-1] = 3.0
    param.grad[2**31 // dtype.itemsize + 1] = 4.0
    optimizer = ClippedAdamW([param], lr=1.0, weight_decay=0.0)
    assert optimizer.clip_grad_norm_(1.0) == 5.0
    optimizer.step()
    assert param.count_nonzero() == 2
    torch.testing.assert_close(param[-1].float(), torch.tensor(-1.0, device="cuda"), rtol=1e-2, atol=0)
    assert optimizer.state[param]["exp_avg"][-1].item() == pytest.approx(0.06, rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_the_same_in_every_run(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(3_000_001, dtype=dtype, device="cuda"))
    param.grad = torch.randn_like(param)
    norms = {ClippedAdamW([param]).clip_grad_norm_(1.0).item() for _ in range(20)}
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(param.grad.double().norm().item(), rel=1e-6)


def test_neither_clipping_nor_a_step_waits_for_the_device() -> None:
    optimizer, _ = train(ClippedAdamW, torch.bfloat16, "cuda", [1.0])
    params = params_of(optimizer)
    torch.cuda.synchronize()
    for step in (2, 4):  # gradients in other memory: new tables
        set_gradients(params, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_unaligned_tensors() -> None:
    """Views that begin in the middle of 16 bytes, on both sides of a whole chunk."""

    def params() -> list[nn.Parameter]:
        memory = torch.linspace(-2, 2, 4 * 20_000, device="cuda").bfloat16().view(4, 20_000)
        return [nn.Parameter(row[start:]) for row, start in zip(memory, (0, 1, 3, 5), strict=True)]

    def trained(kind: type[AdamW]) -> AdamW:
        optimizer = kind(params(), lr=1e-2, fused=True)
        for step in range(0, 6, 2):
            set_gradients(params_of(optimizer), step)
            optimizer.step()
        return optimizer

    assert_close_to_torch(trained(ClippedAdamW), trained(AdamW), 2)


def test_step_in_a_graph_is_that_of_torch() -> None:
    """Capture needs `capturable` and fixed tables: torch does it."""
    optimizers = []
    for kind in (ClippedAdamW, AdamW):
        param = nn.Parameter(torch.linspace(-1, 1, 1000, device="cuda"))
        optimizer = kind([param], lr=torch.tensor(1e-2, device="cuda"), fused=True)
        optimizer.param_groups[0]["capturable"] = True
        param.grad = torch.ones_like(param)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(3):
            graph.replay()
        optimizers.append(optimizer)
    assert_close_to_torch(*optimizers, 16)
    assert optimizers[0].state[params_of(optimizers[0])[0]]["step"] == 4
