"""The local tensor of a DTensor parameter, for computations."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .private_torch import local_of


class LocalShard(torch.autograd.Function):
    """The local tensor of a parameter, whose gradient has the parameter's layout: `to_local` in a third of its time.

    Args of `apply`: param: a DTensor, or a plain tensor, which is its own local tensor. factor: number with which the
    local tensor is multiplied. gradient_factor: number with which its gradient is multiplied, independent of `factor`.
    """

    @staticmethod
    def forward(ctx: Any, param: Tensor, factor: float = 1.0, gradient_factor: float = 1.0) -> Tensor:
        local, ctx.spec = local_of(param)
        ctx.gradient_factor = gradient_factor
        return local.view_as(local) if factor == 1.0 else local * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.gradient_factor != 1.0:
            grad = grad * ctx.gradient_factor
        if ctx.spec is not None:
            grad = DTensor(grad.contiguous(), ctx.spec, requires_grad=False)
        return grad, None, None


__all__ = ["LocalShard"]
