"""A step is put back: random numbers, seeds of forwards and gradients. Of sharded models: test_bounded_exchange.py."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hf_moe_ted import StepSnapshot
from hf_moe_ted.distributed.random_state import synchronize_random_state
from hf_moe_ted.testing import run_distributed_test


def draw() -> list[Any]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def test_random_numbers_come_again() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    synchronize_random_state(model, 0, None).base_seed = 3  # type: ignore[arg-type]
    model(torch.ones(2, 8))
    snapshot = StepSnapshot.take(model)
    expected = [model(torch.ones(2, 8)).tolist(), model(torch.ones(2, 8)).tolist(), draw()]
    snapshot.restore()
    assert model.ted_random_state.num_forwards == 1
    assert [model(torch.ones(2, 8)).tolist(), model(torch.ones(2, 8)).tolist(), draw()] == expected
    assert draw() != expected[-1]


@pytest.mark.parametrize("keep_gradients", [False, True])
def test_gradients(keep_gradients: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].requires_grad_(False)
    model[0].weight.grad = gradient = torch.ones(3, 3)
    model[0].bias.grad = torch.full((3,), 2.0)
    snapshot = StepSnapshot.take(model, keep_gradients=keep_gradients)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        model[0].bias.grad = None
        assert not torch.equal(gradient, torch.ones(3, 3))
        snapshot.restore()
        if not keep_gradients:
            assert all(parameter.grad is None for parameter in model.parameters())
            return
        assert model[0].weight.grad is gradient and torch.equal(gradient, torch.ones(3, 3))
        assert torch.equal(model[0].bias.grad, torch.full((3,), 2.0))
        assert model[1].weight.grad is None


def accumulate_in_another_dtype() -> list[tuple[Tensor, Tensor]]:
    """Gradients of two micro-batches that FSDP2 reduces at the end, run once, and with a second one put back."""
    torch.manual_seed(0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model: Any = nn.Sequential(fully_shard(nn.Linear(4, 4), mp_policy=policy), nn.Linear(4, 4))
    fully_shard(model, mp_policy=policy)
    found = []
    for is_put_back in (False, True):
        model.zero_grad()
        for batch in range(3):
            model.set_requires_gradient_sync(batch == 2)
            snapshot = StepSnapshot.take(model, keep_gradients=True)
            if is_put_back:
                (model(torch.full((2, 4), 9.0)).sum() * 7).backward()
                snapshot.restore()
            model(torch.full((2, 4), 1.0 + batch)).square().sum().backward()
        found.append([parameter.grad.to_local().clone() for parameter in model.parameters()])
    return list(zip(*found, strict=True))


def test_whole_gradients_of_an_accumulation() -> None:
    for gradients in run_distributed_test(accumulate_in_another_dtype, 2):
        for once, put_back in gradients:
            assert once.numel() and torch.equal(once, put_back)
