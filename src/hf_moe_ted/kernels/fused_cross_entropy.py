"""Cross-entropy over a large vocabulary, with one pass over the logits and one for their gradient (Triton).

Shape letters: N positions, V words.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_guard import on_device_of_first

_BLOCK = 4096
_IGNORED = -100


@triton.jit
def _cross_entropy_kernel(
    logits, labels, losses, log_partitions, V, smoothing, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: the partition function as a running sum, relative to a running maximum."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    start = logits + row.to(tl.int64) * V
    maximum = float("-inf")
    partition = 0.0
    total = 0.0
    for first in range(0, V, BLOCK):
        words = first + tl.arange(0, BLOCK)
        values = tl.load(start + words, mask=words < V, other=float("-inf")).to(tl.float32)
        new_maximum = tl.maximum(maximum, tl.max(values, axis=0))
        partition = partition * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(values - new_maximum), axis=0)
        maximum = new_maximum
        total += tl.sum(tl.where(words < V, values, 0.0), axis=0)
    log_partition = maximum + tl.log(partition)
    is_counted = label != IGNORED
    # a label outside of the vocabulary shows in the loss
    target = tl.load(start + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    loss = log_partition - (1.0 - smoothing) * target - smoothing * total / V
    tl.store(losses + row, tl.where(is_counted, loss, 0.0))
    tl.store(log_partitions + row, log_partition)


@triton.jit
def _cross_entropy_backward_kernel(
    grad_losses, logits, labels, log_partitions, grads, V, smoothing, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    scale = tl.load(grad_losses + row)
    log_partition = tl.load(log_partitions + row)
    offset = row.to(tl.int64) * V
    for first in range(0, V, BLOCK):
        words = first + tl.arange(0, BLOCK)
        values = tl.load(logits + offset + words, mask=words < V, other=0.0).to(tl.float32)
        target = tl.where(words == label, 1.0 - smoothing, 0.0) + smoothing / V
        grad = tl.where(label != IGNORED, (tl.exp(values - log_partition) - target) * scale, 0.0)
        tl.store(grads + offset + words, grad.to(grads.dtype.element_ty), mask=words < V)


@torch.library.custom_op("hf_moe_ted::cross_entropy", mutates_args=())
@on_device_of_first
def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each position.

    Args:
        logits: float[N, V], contiguous.
        labels: int64[N], -100 for positions without loss.
        label_smoothing: share of the target that is spread over all words.

    Returns:
        float32[N], 0 for positions without loss; and the log-partitions float32[N], which backward needs.
    """
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    log_partitions = torch.empty_like(losses)
    if logits.shape[0]:
        _cross_entropy_kernel[(logits.shape[0],)](
            logits,
            labels,
            losses,
            log_partitions,
            logits.shape[1],
            label_smoothing,
            IGNORED=_IGNORED,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return losses, log_partitions


@cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses)


@torch.library.custom_op("hf_moe_ted::cross_entropy_backward", mutates_args=())
@on_device_of_first
def cross_entropy_backward(
    grad_losses: Tensor, logits: Tensor, labels: Tensor, log_partitions: Tensor, label_smoothing: float
) -> Tensor:
    """Gradient of `cross_entropy` for the logits, in their dtype."""
    grads = torch.empty_like(logits)
    if logits.shape[0]:
        _cross_entropy_backward_kernel[(logits.shape[0],)](
            grad_losses.contiguous(),
            logits,
            labels,
            log_partitions,
            grads,
            logits.shape[1],
            label_smoothing,
            IGNORED=_IGNORED,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return grads


@cross_entropy_backward.register_fake
def _(grad_losses: Tensor, logits: Tensor, labels: Tensor, log_partitions: Tensor, label_smoothing: float) -> Tensor:
    return torch.empty_like(logits)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, ctx.label_smoothing = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, output[1])


def _backward(ctx: Any, grad_losses: Tensor, _: Any) -> tuple[Tensor, None, None]:
    return cross_entropy_backward(grad_losses, *ctx.saved_tensors, ctx.label_smoothing), None, None


cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)

__all__ = ["cross_entropy", "cross_entropy_backward"]
