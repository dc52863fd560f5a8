"""Parameters, and trainings of them by ClippedAdamW and by torch."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from hf_moe_ted.optim.clipped_adamw import ClippedAdamW

# less than a vector, less than a chunk, one, one of norms and a rest, nothing, and scalars
SHAPES = [(5,), (3, 37), (2048,), (8195,), (0, 4), (), (1,), (4, 513)]
DTYPES = [torch.float32, torch.bfloat16]
# float32 numbers, as torch's kernels for CPUs compute with float64's, and those for CUDA with float32's
BETAS = (1 - 2**-3, 1 - 2**-10)


class InInterpreter(ClippedAdamW):
    """The kernels on a CPU, too."""

    _device_types = ("cuda", "cpu")


def groups_of(dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    """Many tensors in groups with options of their own; some of the other dtype."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]
    params += [nn.Parameter(torch.randn(7, generator=generator).to(device)) for _ in range(6)]  # float32
    return [
        {"params": params[:3], "weight_decay": 0.2},
        {"params": params[3:7], "weight_decay": 0.0, "lr": 3e-2},
        {"params": params[7:], "betas": (0.75, 0.875), "eps": 1e-3},
    ]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_gradients(params: list[Tensor], step: int) -> None:
    """In every other step, some have none."""
    for number, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + number)
        has_none = step % 2 and number % 5 == 4
        param.grad = None if has_none else torch.randn(param.shape, generator=generator).to(param)


def train(
    kind: Callable[..., AdamW],
    dtype: torch.dtype,
    device: str,
    max_norms: list[float | None],
    betas: tuple[float, float] = BETAS,
) -> tuple[AdamW, list[Tensor]]:
    """Steps of an optimizer, one for each norm to clip to, and the norms before."""
    optimizer = kind(groups_of(dtype, device), lr=1e-2, betas=betas, fused=True)
    norms = []
    for step, max_norm in enumerate(max_norms):
        set_gradients(params_of(optimizer), step)
        if max_norm is not None:
            norms.append(clip(optimizer, max_norm))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, norms


def clip(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    if isinstance(optimizer, ClippedAdamW):
        before = [None if param.grad is None else param.grad.clone() for param in params_of(optimizer)]
        norm = optimizer.clip_grad_norm_(max_norm)
        for param, grad in zip(params_of(optimizer), before, strict=True):
            assert (grad is None) if param.grad is None else torch.equal(param.grad, grad)
        return norm
    grads = [param.grad for param in params_of(optimizer) if param.grad is not None]
    norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().float()
    if max_norm != math.inf:
        nn.utils.clip_grads_with_norm_(params_of(optimizer), max_norm, norm)
    return norm


def assert_close_to_torch(actual: AdamW, expected: AdamW, units: float) -> None:
    """All parameters and states, up to some units of the last place of their dtype."""
    assert actual.state_dict()["param_groups"] == expected.state_dict()["param_groups"]
    sizes = [group["lr"] for group in expected.param_groups for _ in group["params"]]  # of a step
    for number, (param, wanted) in enumerate(zip(params_of(actual), params_of(expected), strict=True)):
        size = sizes[number] * float(expected.state[wanted]["step"])
        close_to(param, wanted, units, f"parameter {number}", size)
        assert actual.state[param].keys() == expected.state[wanted].keys()
        for name, value in expected.state[wanted].items():
            found = actual.state[param][name]
            assert (found.dtype, found.shape, found.device) == (value.dtype, value.shape, value.device)
            close_to(found, value, 0 if name == "step" else units, f"{name} of parameter {number}")


def close_to(found: Tensor, wanted: Tensor, units: float, what: str, size: float = 0.0) -> None:
    """`size` is that of the terms of a sum, which may be nearly zero."""
    unit = torch.finfo(wanted.dtype).eps
    size = max(size, float(wanted.detach().abs().max()) if wanted.numel() else 0.0)
    torch.testing.assert_close(
        found, wanted, rtol=units * unit, atol=units * unit * size, msg=lambda text: f"{what}: {text}"
    )
