"""Move tokens to rows ordered by expert, and back; gradients need no atomic additions.

On GPUs with Triton each direction is one kernel.

Shape letters: T tokens, K slots per token, R rows, E experts, D width.
"""

from typing import Any

import torch
from torch import Tensor

try:
    from . import triton_permutation
    from .row_plan import RowPlan, plan_rows
except ImportError:  # Triton comes with PyTorch for GPUs
    _HAS_TRITON = False
else:
    _HAS_TRITON = True


def sort_slots(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort slots, `token * K + k`, by expert; slots of one expert keep their order.

    Args:
        expert_ids_TK: int64[T, K]; `num_experts` for a slot that no expert computes.

    Returns:
        The slot of each row, integer[T * K], slots without an expert last; the row of each slot, integer[T, K], -1
        without an expert; and the number of rows of each expert, integer[E].
    """
    num_slots = expert_ids_TK.numel()
    if _HAS_TRITON and expert_ids_TK.is_cuda and num_slots:
        plan = RowPlan.of(plan_rows(expert_ids_TK, num_experts, 128), num_slots, num_experts, 128)
        row_TK = plan.row_of_slot[:num_slots].view_as(expert_ids_TK)
        return plan.order[:num_slots], row_TK, plan.offsets[1 : num_experts + 1] - plan.offsets[:num_experts]
    ids = expert_ids_TK.flatten()
    order = ids.argsort(stable=True)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(num_slots, device=ids.device))
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(
        0, ids, torch.ones_like(ids)
    )
    return order, row.masked_fill_(ids >= num_experts, -1).view_as(expert_ids_TK), counts[:num_experts]


class SpreadTokens(torch.autograd.Function):
    """Tokens to rows, float[T, D] -> float[R, D]; backward sums the rows of a token in a fixed order.

    Args of `apply`: tokens_TD: float[T, D]. slot_R: integer[R], the slot, `token * K + k`, of each row; -1 for a row of
        zeros. row_TK: integer[T, K], the row of each slot; -1 for a slot without a row.
    """

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, slot_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        if _HAS_TRITON and tokens_TD.is_cuda:
            return triton_permutation.spread(tokens_TD.contiguous(), slot_R, row_TK.shape[1])
        return _tokens_of_rows(tokens_TD, slot_R, row_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        if _HAS_TRITON and grad_RD.is_cuda:
            return triton_permutation.combine(grad_RD.contiguous(), row_TK), None, None
        return rows_of_tokens(grad_RD, row_TK).sum(dim=1), None, None


class CombineRows(torch.autograd.Function):
    """Weighted sum of the rows of each token, float[R, D] and float[T, K] -> float[T, D].

    It is the transpose of [`SpreadTokens`] with weights, and has the same arguments.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK, slot_R, row_TK)
        if _HAS_TRITON and rows_RD.is_cuda:
            return triton_permutation.combine(rows_RD.contiguous(), row_TK, weights_TK.contiguous())
        return (rows_of_tokens(rows_RD, row_TK) * weights_TK.unsqueeze(-1)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_RD, weights_TK, slot_R, row_TK = ctx.saved_tensors
        if _HAS_TRITON and grad_TD.is_cuda:
            grads = triton_permutation.spread_weighted(
                grad_TD.contiguous(), slot_R, row_TK, weights_TK.contiguous(), rows_RD.contiguous()
            )
            return *grads, None, None
        grad_RD = _tokens_of_rows(grad_TD, slot_R, row_TK.shape[1])
        weight_R1 = _tokens_of_rows(weights_TK.reshape(-1, 1), slot_R, top_k=1)  # each slot as its own token
        products_R1 = (grad_RD * rows_RD).sum(dim=-1, keepdim=True)
        return grad_RD * weight_R1, rows_of_tokens(products_R1, row_TK).squeeze(-1), None, None


def _tokens_of_rows(tokens_TD: Tensor, slot_R: Tensor, top_k: int) -> Tensor:
    """float[R, D], zeros for rows without a slot."""
    if tokens_TD.shape[0] == 0:
        return tokens_TD.new_zeros(len(slot_R), tokens_TD.shape[1])
    gathered = tokens_TD.index_select(0, slot_R.clamp(min=0) // top_k)
    # not in place: torch.compile of torch 2.11 loses the gradient of a Function that returns a changed input,
    # docs/upstream/torch_compiled_inplace_function.md
    return gathered.masked_fill((slot_R < 0).unsqueeze(-1), 0.0)


def rows_of_tokens(rows_RD: Tensor, row_TK: Tensor) -> Tensor:
    """float[T, K, D], zeros for slots without a row."""
    if rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(*row_TK.shape, rows_RD.shape[1])
    gathered = rows_RD.index_select(0, row_TK.flatten().clamp(min=0)).view(*row_TK.shape, rows_RD.shape[1])
    return gathered.masked_fill((row_TK < 0).unsqueeze(-1), 0.0)


__all__ = ["CombineRows", "SpreadTokens", "rows_of_tokens", "sort_slots"]
