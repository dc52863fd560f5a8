"""Tokens to rows that stand by expert, and back, with gradients that need no atomic additions.

Shape letters: T tokens, K slots per token, R rows, D width.
"""

from typing import Any

import torch
from torch import Tensor


class SpreadTokens(torch.autograd.Function):
    """Tokens to rows, float[T, D] -> float[R, D]; backward sums the rows of a token in a fixed order.

    Args of `apply`:
        tokens_TD: float[T, D].
        slot_R: int64[R], the slot, `token * K + k`, of each row.
        row_TK: int64[T, K], the row of each slot; -1 for a slot without one.
    """

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, slot_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return tokens_TD.index_select(0, slot_R // row_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return rows_of_tokens(grad_RD, row_TK).sum(dim=1), None, None


class CombineRows(torch.autograd.Function):
    """Weighted sum of the rows of each token, float[R, D] and float[T, K] -> float[T, D].

    The transpose of [`SpreadTokens`] with weights, and takes what it takes.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK, slot_R, row_TK)
        return (rows_of_tokens(rows_RD, row_TK) * weights_TK.unsqueeze(-1)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_RD, weights_TK, slot_R, row_TK = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, slot_R // row_TK.shape[1])
        weight_R1 = weights_TK.flatten().index_select(0, slot_R).unsqueeze(-1)
        products_R1 = (grad_RD * rows_RD).sum(dim=-1, keepdim=True)
        return grad_RD * weight_R1, rows_of_tokens(products_R1, row_TK).squeeze(-1), None, None


def rows_of_tokens(rows_RD: Tensor, row_TK: Tensor) -> Tensor:
    """float[T, K, D], zeros for slots without a row."""
    if rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(*row_TK.shape, rows_RD.shape[1])
    gathered = rows_RD.index_select(0, row_TK.flatten().clamp(min=0)).view(*row_TK.shape, -1)
    return gathered.masked_fill_((row_TK < 0).unsqueeze(-1), 0.0)


__all__ = ["CombineRows", "SpreadTokens", "rows_of_tokens"]
