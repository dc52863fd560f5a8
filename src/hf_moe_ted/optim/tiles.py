"""Tiles of parameters, gradients and moments, and the arithmetic of AdamW for them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Views of the same elements of all tensors of a parameter.

    Attributes:
        weight: what the step computes with: the master, or the parameter itself.
        grad: of the dtype that the parameter's gradient has.
        exp_avg, exp_avg_sq: the moments, of the dtype of `weight`.
        parameter: what `weight` is copied to, `None` if it is the parameter itself.
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
        """What must be the same for tiles that go to one kernel."""
        return self.weight.device, self.weight.dtype, self.grad.dtype, self.parameter is None, self.can_fuse


def split_into_tiles(tensors: list[Tensor], tile_numel: int, is_flat: bool) -> Iterator[list[Tensor]]:
    """Cut tensors of one shape alike into views of at most `tile_numel` elements.

    Args:
        is_flat: cut across rows; all tensors are contiguous then. Otherwise whatever their strides are.
    """
    numel = tensors[0].numel()
    if numel <= tile_numel:
        if numel:  # a rank may hold nothing of a parameter
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
    weights = [tile.weight for tile in batch]
    exp_avgs, exp_avg_sqs = [tile.exp_avg for tile in batch], [tile.exp_avg_sq for tile in batch]
    beta1, beta2 = group["betas"]
    grads = _grads_like_weights(batch)
    if batch[0].can_fuse and (weights[0].is_cuda if fused is None else fused):
        torch._fused_adamw_(
            weights,
            grads,
            exp_avgs,
            exp_avg_sqs,
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
    else:  # the arithmetic of torch.optim.adam._single_tensor_adam, in its order
        if group["weight_decay"] != 0:
            torch._foreach_mul_(weights, _number(1 - lr * group["weight_decay"]))
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        del grads  # what was copied makes room for the denominators
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        corrections: list[Any] = [(1 - beta2**tile.step) ** 0.5 for tile in batch]
        torch._foreach_div_(denominators, corrections)
        torch._foreach_add_(denominators, group["eps"])
        step_sizes: list[Any] = [_number(-lr / (1 - beta1**tile.step)) for tile in batch]
        if capturable:  # a kernel takes factors from the CPU only
            torch._foreach_div_(denominators, step_sizes)
            torch._foreach_addcdiv_(weights, exp_avgs, denominators)
        else:
            torch._foreach_addcdiv_(weights, exp_avgs, denominators, step_sizes)
    parameters = [tile.parameter for tile in batch if tile.parameter is not None]
    if parameters:
        torch._foreach_copy_(parameters, weights)


def _number(value: float | Tensor) -> float | Tensor:
    """What can be read without waiting, as a Python number."""
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def _steps_on_device(batch: list[Tile]) -> list[Tensor]:
    """float32 scalars where the weights are, which the fused kernels ask for."""
    device, steps = batch[0].weight.device, [tile.step for tile in batch]
    scalars = {
        step: torch.full((), step, dtype=torch.float32, device=device)
        for step in {step for step in steps if not isinstance(step, Tensor)}
    }
    return [step if isinstance(step, Tensor) else scalars[step] for step in steps]


def _grads_like_weights(batch: list[Tile]) -> list[Tensor]:
    """The gradients of a batch, copied to the dtype of the weights if they have another one."""
    grads = [tile.grad for tile in batch]
    weight = batch[0].weight
    if grads[0].dtype == weight.dtype:
        return grads
    copies = weight.new_empty(sum(grad.numel() for grad in grads)).split([grad.numel() for grad in grads])
    shaped = [copy.view(grad.shape) for copy, grad in zip(copies, grads, strict=True)]
    torch._foreach_copy_(shaped, grads)
    return shaped


__all__ = ["Tile", "split_into_tiles", "update_tiles"]
