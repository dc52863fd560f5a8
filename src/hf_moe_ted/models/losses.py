"""Losses: pure functions of logits and of the router's outputs.

Shape letters: T tokens, K experts per token, E experts.
"""

from typing import Any

import torch
from torch import Tensor

try:
    from hf_moe_ted.kernels import fused_cross_entropy
except ImportError:  # without Triton, which comes with PyTorch for GPUs, or remote code without the package
    fused_cross_entropy = None  # type: ignore[assignment]


def load_balancing_loss(logits_TE: Tensor, choices_TK: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """Load-balancing loss of one sparse layer: 1 if tokens spread evenly, up to `num_experts` if not.

    `E * sum_e(mean router probability of e * share of tokens that chose e)`, as in Switch Transformers
    (https://huggingface.co/papers/2101.03961, section 2.2) and DeepSpeed's gates. With two experts per token only first
    choices count (GShard, https://huggingface.co/papers/2006.16668); with three or more all choices do, divided by K.
    The share is a constant for the gradient.

    Args:
        logits_TE: float[..., T, E], router logits, of one or several layers.
        choices_TK: int[..., T, K], chosen experts in order of preference, before any is dropped for lack of capacity.
        token_mask_T: bool[T], *optional*, False for tokens that do not count (padding).

    Returns:
        float32[...]; 0 when no token counts.
    """
    num_experts = logits_TE.shape[-1]
    counted_TK = choices_TK if choices_TK.shape[-1] > 2 else choices_TK[..., :1]
    probs_TE = logits_TE.float().softmax(dim=-1)
    chosen_TE = torch.zeros_like(probs_TE).scatter_(-1, counted_TK, 1.0)
    mean_prob_E = _masked_mean(probs_TE, token_mask_T)
    share_E = _masked_mean(chosen_TE, token_mask_T) / counted_TK.shape[-1]
    return num_experts * (mean_prob_E * share_E).sum(dim=-1)


def summed_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross-entropies of all labels except -100, float32 scalar.

    It equals `cross_entropy(logits.float(), labels, reduction="sum")`, but float32 numbers exist only for some rows at
    a time, and only the logits are kept for backward. With a large vocabulary the plain function needs more memory than
    the rest of the model. On GPUs it is a Triton kernel.

    Args:
        logits: float[..., vocab_size].
        labels: int64[...], -100 for positions without loss.
        label_smoothing: share of the target that is spread over all words.
    """
    logits_NV, labels_N = logits.flatten(0, -2), labels.flatten()
    if fused_cross_entropy is not None and logits.is_cuda:
        return fused_cross_entropy.cross_entropy(logits_NV.contiguous(), labels_N, label_smoothing)[0].sum()
    return SummedCrossEntropy.apply(logits_NV, labels_N, label_smoothing)


class SummedCrossEntropy(torch.autograd.Function):
    """Its backward also works for logits of a part of the words, and for other forwards that save the same tensors.

    Shape letters: N positions, V words, C positions of one chunk."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, smoothing: float) -> Tensor:
        is_counted_N = labels_N != -100
        target_N = labels_N.masked_fill(~is_counted_N, 0)
        loss_N, log_partition_N = [], []
        for rows in row_chunks(logits_NV):
            logits_CV = logits_NV[rows].float()
            log_partition_C = logits_CV.logsumexp(dim=-1)
            target_C = logits_CV.gather(1, target_N[rows, None]).squeeze(1)
            loss_C = log_partition_C - (1.0 - smoothing) * target_C
            if smoothing:
                loss_C = loss_C - smoothing * logits_CV.mean(dim=-1)
            loss_N.append(loss_C)
            log_partition_N.append(log_partition_C)
        hit_N = torch.full_like(is_counted_N, smoothing - 1.0, dtype=torch.float32)
        ctx.save_for_backward(logits_NV, torch.cat(log_partition_N), target_N, hit_N, is_counted_N)
        ctx.share = smoothing / logits_NV.shape[-1]  # share of each word in the target
        return torch.cat(loss_N).masked_fill(~is_counted_N, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, log_partition_N, target_N, hit_N, is_counted_N = ctx.saved_tensors
        scale_N = is_counted_N * grad
        grad_NV = torch.empty_like(logits_NV)
        for rows in row_chunks(logits_NV):
            probs_CV = (logits_NV[rows].float() - log_partition_N[rows, None]).exp_()
            if ctx.share:
                probs_CV -= ctx.share
            probs_CV.scatter_add_(1, target_N[rows, None], hit_N[rows, None])
            grad_NV[rows] = probs_CV.mul_(scale_N[rows, None])
        return grad_NV, *[None] * (len(ctx.needs_input_grad) - 1)


def row_chunks(logits_NV: Tensor, numel: int = 2**26) -> list[slice]:
    """Slices of rows with about `numel` logits each (256 MiB in float32)."""
    num_rows = max(1, numel // max(1, logits_NV.shape[-1]))
    return [slice(start, start + num_rows) for start in range(0, logits_NV.shape[0], num_rows)]


def router_z_loss(logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the router logits, which keeps the logits small (ST-MoE, paper 2202.08906, eq. 5).

    Args and result as in [`load_balancing_loss`].
    """
    return _masked_mean(logits_TE.float().logsumexp(dim=-1, keepdim=True) ** 2, token_mask_T).squeeze(-1)


def _masked_mean(values: Tensor, mask_T: Tensor | None) -> Tensor:
    """Masked mean over the second last dimension."""
    if mask_T is None:
        return values.mean(dim=-2)
    weight = mask_T.to(values.dtype).unsqueeze(-1)
    return (values * weight).sum(dim=-2) / weight.sum().clamp(min=1.0)
