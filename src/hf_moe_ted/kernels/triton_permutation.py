"""Triton kernels that move tokens to rows and back.

Shape letters: T tokens, K slots per token, R rows, D width.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from .device_guard import on_device_of_first


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots", "row_of_slot", "weights", "dots"])
def _spread_kernel(
    tokens,
    slots,
    row_of_slot,
    weights,
    rows,
    out,
    dots,
    num_rows,
    width,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[r] = tokens[slot // K]. With `WEIGHTED`, times its weight, and dots[slot] = tokens[slot // K] @ rows[r].

    A row with slot -1 is zeros. With `WEIGHTED`, both are 0 for slots without a row, because `rows` may never have been
    written there.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = row < num_rows
    slot = tl.load(slots + row, mask=is_row, other=-1)
    has_slot = slot >= 0
    token_offset = (slot // TOP_K).to(tl.int64) * width
    row_offset = row.to(tl.int64) * width
    weight = tl.full((BLOCK_R,), 1.0, tl.float32)
    has_expert = has_slot
    if WEIGHTED:
        has_expert = tl.load(row_of_slot + slot, mask=has_slot, other=-1) >= 0
        weight = tl.load(weights + slot, mask=has_expert, other=0.0).to(tl.float32)
    dot = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, width, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        mask = is_row[:, None] & (columns < width)[None, :]
        mask_of_tokens = mask & has_slot[:, None]
        values = tl.load(tokens + token_offset[:, None] + columns[None, :], mask=mask_of_tokens, other=0.0)
        if WEIGHTED:
            mask_of_rows = mask & has_expert[:, None]
            others = tl.load(rows + row_offset[:, None] + columns[None, :], mask=mask_of_rows, other=0.0).to(tl.float32)
            dot += tl.sum(values.to(tl.float32) * others, axis=1)
            values = (values.to(tl.float32) * weight[:, None]).to(out.dtype.element_ty)
        tl.store(out + row_offset[:, None] + columns[None, :], values, mask=mask)
    if WEIGHTED:
        tl.store(dots + slot, dot, mask=has_slot)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["row_of_slot", "weights"])
def _combine_kernel(
    rows,
    row_of_slot,
    weights,
    out,
    num_tokens,
    width,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = sum over k of rows[row of (t, k)], with `WEIGHTED` times the slot's weight; no row adds 0."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = token < num_tokens
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_slot + token * TOP_K + k, mask=is_token, other=-1)
        mask = (row >= 0)[:, None] & (columns < width)[None, :]
        values = tl.load(rows + row.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)
        values = values.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + token * TOP_K + k, mask=is_token, other=0.0).to(tl.float32)
            values *= weight[:, None]
        total += values
    mask = is_token[:, None] & (columns < width)[None, :]
    out_offset = token.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out + out_offset, total.to(out.dtype.element_ty), mask=mask)


@on_device_of_first
def spread(tokens_TD: Tensor, slot_R: Tensor, top_k: int) -> Tensor:
    """float[R, D], the token of each row."""
    out = tokens_TD.new_empty(len(slot_R), tokens_TD.shape[1])
    _launch_spread(tokens_TD, slot_R, top_k, out)
    return out


@on_device_of_first
def spread_weighted(
    grad_TD: Tensor, slot_R: Tensor, row_TK: Tensor, weights_TK: Tensor, rows_RD: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `combine` with weights, for its rows and for the weights; 0 if a slot has no row."""
    grad_RD = rows_RD.new_empty(rows_RD.shape)
    grad_TK = weights_TK.new_zeros(weights_TK.shape)
    _launch_spread(grad_TD, slot_R, weights_TK.shape[1], grad_RD, row_TK, weights_TK, rows_RD, grad_TK)
    return grad_RD, grad_TK


def _launch_spread(
    tokens_TD: Tensor,
    slot_R: Tensor,
    top_k: int,
    out: Tensor,
    row_TK: Tensor | None = None,
    weights: Tensor | None = None,
    rows: Tensor | None = None,
    dots: Tensor | None = None,
) -> None:
    num_rows, width = out.shape
    if num_rows == 0:
        return
    _spread_kernel[(triton.cdiv(num_rows, 8),)](
        tokens_TD,
        slot_R,
        row_TK,
        weights,
        rows,
        out,
        dots,
        num_rows,
        width,
        TOP_K=top_k,
        WEIGHTED=weights is not None,
        BLOCK_R=8,
        BLOCK_D=512,
    )


@on_device_of_first
def combine(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """float[T, D], the sum of the rows of each token, weighted if there are weights."""
    num_tokens, top_k = row_TK.shape
    width = rows_RD.shape[1]
    out = rows_RD.new_empty(num_tokens, width)
    if num_tokens == 0:
        return out
    _combine_kernel[(triton.cdiv(num_tokens, 8), triton.cdiv(width, 512))](
        rows_RD,
        row_TK,
        weights_TK,
        out,
        num_tokens,
        width,
        TOP_K=top_k,
        WEIGHTED=weights_TK is not None,
        BLOCK_T=8,
        BLOCK_D=512,
    )
    return out


__all__ = ["combine", "spread", "spread_weighted"]
