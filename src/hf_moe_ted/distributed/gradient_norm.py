"""The norm of all gradients of a sharded model, with one collective."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ..optim.clipped_adamw import ClippedAdamW
from .private_torch import foreach_mul_, foreach_norm


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Like `torch.nn.utils.clip_grad_norm_` with the 2-norm, for parameters on different meshes or on none.

    torch's function refuses parameters of different meshes (docs/upstream/torch_clip_grad_norm_meshes.md). One norm per
    mesh would cost a chain of collectives per mesh.

    Args:
        parameters: those without gradients are ignored; plain tensors are the same on all ranks.
        max_norm: gradients are scaled down to this norm in place; `None` or infinity only computes the norm.

    Returns:
        The norm before clipping, float32 scalar on the device of the process group.
    """
    gradients = [param.grad for param in parameters if param.grad is not None]
    by_share: dict[float, list[Tensor]] = {}
    for grad in gradients:
        by_share.setdefault(_share_of_world(grad), []).append(_local(grad))

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    squared = torch.zeros((), dtype=torch.float32, device=device)
    for share, tensors in by_share.items():
        norms = foreach_norm([tensor for tensor in tensors if tensor.numel()], 2, dtype=torch.float32)
        if norms:
            squared += torch.stack(norms).square().sum().to(device) * share
    _add_up(squared)
    norm = squared.sqrt()
    if max_norm is not None and max_norm != float("inf"):
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for tensors in by_share.values():
            foreach_mul_(tensors, factor.to(tensors[0].device))
    return norm


def clip_in_step(optimizer: ClippedAdamW, max_norm: float) -> Tensor | None:
    """Like [`clip_grad_norm_`] for all parameters of an optimizer; the optimizer clips in its next step.

    Returns:
        The norm before clipping. `None` if this rank must clip its gradients now; then nothing was done. Ranks may
        differ in this: both ways take the same collective.
    """
    return optimizer.clip_in_step(max_norm, weight=_share_of_world, reduce=_add_up)


def _add_up(squared: Tensor) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(squared)


def _share_of_world(grad: Tensor) -> float:
    """One over the number of ranks that hold the same part of a gradient."""
    if not dist.is_initialized():
        return 1.0
    num_parts = 1
    if isinstance(grad, DTensor):
        for size, placement in zip(grad.device_mesh.shape, grad.placements, strict=True):
            num_parts *= 1 if isinstance(placement, Replicate) else size
    return num_parts / dist.get_world_size()


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


__all__ = ["clip_grad_norm_", "clip_in_step"]
