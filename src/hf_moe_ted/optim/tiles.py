"""Tiles of parameters, gradients and moments, and the arithmetic of AdamW for them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import private_torch


class Tile(NamedTuple):
    """Views of the same elements of all tensors of a parameter.

    Attributes:
        weight: the tensor that the step updates: the master, or the parameter itself.
        grad: the gradient, in its own dtype.
        exp_avg, exp_avg_sq: the moments, in the dtype of `weight`.
        parameter: the tensor to which `weight` is copied; `None` if it is the parameter itself.
        step: number of the parameter's update, 1 for the first; with `capturable` a float32 scalar on its device.
        can_fuse: whether the parameter's tensors are contiguous and of equal strides, as the fused kernels require.
    """

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    parameter: Tensor | None
    step: float | Tensor
    can_fuse: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """Properties that must be equal for tiles of one kernel."""
        return self.weight.device, self.weight.dtype, self.grad.dtype, self.parameter is None, self.can_fuse


def split_into_tiles(tensors: list[Tensor], tile_numel: int, is_flat: bool) -> Iterator[list[Tensor]]:
    """Cut tensors of one shape alike into views of at most `tile_numel` elements.

    Args:
        is_flat: whether to cut across rows; then all tensors must be contiguous. Otherwise strides may be any.
    """
    numel = tensors[0].numel()
    if numel <= tile_numel:
        if numel:  # a rank may hold no part of a parameter
            yield tensors
        return
    if is_flat:
        tensors = [tensor.view(-1) for tensor in tensors]
    row_numel = numel // len(tensors[0])
    if row_numel > tile_numel:
        for rows in zip(*(tensor.unbind() for tensor in tensors), strict=True):
            yield from split_into_tiles(list(rows), tile_numel, False)
    else:
        for tiles in zip(*(tensor.split(tile_numel // row_numel) for tensor in tensors), strict=True):
            yield list(tiles)


def update_tiles(
    batch: list[Tile], group: Mapping[str, Any], lr: float | Tensor, *, fused: bool | None, capturable: bool
) -> None:
    """One step of AdamW for tiles of one `kind`.

    Args:
        group: betas, eps and weight decay.
        lr: a number or a scalar, on the CPU unless `capturable`: torch computes with a tensor's float32, not with
            Python's float64.
        fused, capturable: see [`TiledAdamW`].
    """
    if batch[0].can_fuse and (batch[0].weight.is_cuda if fused is None else fused):
        _fused_step(batch, group, lr)
    else:
        _foreach_step(batch, group, lr, capturable)
    parameters = [tile.parameter for tile in batch if tile.parameter is not None]
    if parameters:
        private_torch.foreach_copy_(parameters, [tile.weight for tile in batch])


def _fused_step(batch: list[Tile], group: Mapping[str, Any], lr: float | Tensor) -> None:
    beta1, beta2 = group["betas"]
    private_torch.fused_adamw_(
        [tile.weight for tile in batch],
        _grads_like_weights(batch),
        [tile.exp_avg for tile in batch],
        [tile.exp_avg_sq for tile in batch],
        [],
        _steps_on_device(batch),
        lr=_number(lr),
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def _foreach_step(batch: list[Tile], group: Mapping[str, Any], lr: float | Tensor, capturable: bool) -> None:
    """The arithmetic of torch.optim.adam._single_tensor_adam, in its order."""
    grads = _grads_like_weights(batch)
    weights = [tile.weight for tile in batch]
    exp_avgs, exp_avg_sqs = [tile.exp_avg for tile in batch], [tile.exp_avg_sq for tile in batch]
    beta1, beta2 = group["betas"]
    if group["weight_decay"] != 0:
        private_torch.foreach_mul_(weights, _number(1 - lr * group["weight_decay"]))
    private_torch.foreach_lerp_(exp_avgs, grads, 1 - beta1)
    private_torch.foreach_mul_(exp_avg_sqs, beta2)
    private_torch.foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    del grads  # free the copies before the denominators are made
    denominators = private_torch.foreach_sqrt(exp_avg_sqs)
    corrections: list[Any] = [(1 - beta2**tile.step) ** 0.5 for tile in batch]
    private_torch.foreach_div_(denominators, corrections)
    private_torch.foreach_add_(denominators, group["eps"])
    step_sizes: list[Any] = [_number(-lr / (1 - beta1**tile.step)) for tile in batch]
    if capturable:  # a kernel accepts factors only from the CPU
        private_torch.foreach_div_(denominators, step_sizes)
        private_torch.foreach_addcdiv_(weights, exp_avgs, denominators)
    else:
        private_torch.foreach_addcdiv_(weights, exp_avgs, denominators, step_sizes)


def _number(value: float | Tensor) -> float | Tensor:
    """A Python number if the value can be read without waiting; else the tensor."""
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def _steps_on_device(batch: list[Tile]) -> list[Tensor]:
    """Step counts as float32 scalars on the weights' device, as the fused kernels require."""
    device, steps = batch[0].weight.device, [tile.step for tile in batch]
    scalars = {
        step: torch.full((), step, dtype=torch.float32, device=device)
        for step in {step for step in steps if not isinstance(step, Tensor)}
    }
    return [step if isinstance(step, Tensor) else scalars[step] for step in steps]


def _grads_like_weights(batch: list[Tile]) -> list[Tensor]:
    """The gradients of a batch, converted to the dtype of the weights if it differs."""
    grads = [tile.grad for tile in batch]
    weight = batch[0].weight
    if grads[0].dtype == weight.dtype:
        return grads
    copies = weight.new_empty(sum(grad.numel() for grad in grads)).split([grad.numel() for grad in grads])
    shaped = [copy.view(grad.shape) for copy, grad in zip(copies, grads, strict=True)]
    private_torch.foreach_copy_(shaped, grads)
    return shaped


__all__ = ["Tile", "split_into_tiles", "update_tiles"]
