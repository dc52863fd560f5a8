"""Attention of the beams of a sentence to keys that they share; the kernel also writes their new keys (Triton).

There is one program per sentence and head. It writes the new keys and values of the beams and does not read them again:
a beam attends to its own new key, which is in registers, and not to those of other beams.

Shape letters: B sentences, N beams of each, H heads, D head width, K keys.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_guard import on_device_of_first

MAX_BEAMS = 16
_WIDTHS = (16, 32, 64, 128)


@triton.jit
def beam_attention_kernel(
    query,
    new_keys,
    new_values,
    keys,
    values,
    mask,
    places,
    out,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    mask_stride_b,
    mask_stride_n,
    num_keys,
    scaling,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax over the keys block by block, in float32."""
    sentence = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    beams = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, D)
    is_beam = beams < N
    own = sentence * query_stride_b + head * query_stride_h + beams[:, None] * query_stride_n + columns[None, :]
    first_key = sentence * key_stride_b + head * key_stride_h
    queries = tl.load(query + own, mask=is_beam[:, None], other=0.0)
    largest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    sums = tl.zeros((BLOCK_N, D), tl.float32)
    if WRITES:
        own_keys = tl.load(new_keys + own, mask=is_beam[:, None], other=0.0)
        own_values = tl.load(new_values + own, mask=is_beam[:, None], other=0.0)
        place = tl.load(places + beams, mask=is_beam, other=0)
        to = first_key + place[:, None] * D + columns[None, :]
        tl.store(keys + to, own_keys, mask=is_beam[:, None])
        tl.store(values + to, own_values, mask=is_beam[:, None])
        num_keys = tl.load(places).to(tl.int32)  # keys of earlier steps
        largest = tl.sum(queries.to(tl.float32) * own_keys.to(tl.float32), axis=1) * scaling
        total += 1.0
        sums += own_values.to(tl.float32)
    for start in range(0, num_keys, BLOCK_K):
        index = start + tl.arange(0, BLOCK_K)
        is_key = index < num_keys
        offsets = first_key + index[:, None] * D + columns[None, :]
        some_keys = tl.load(keys + offsets, mask=is_key[:, None], other=0.0)
        some_values = tl.load(values + offsets, mask=is_key[:, None], other=0.0)
        to_mask = sentence * mask_stride_b + beams[:, None] * mask_stride_n + index[None, :]
        is_pair = is_beam[:, None] & is_key[None, :]
        added = tl.load(mask + to_mask, mask=is_pair, other=0.0).to(tl.float32)
        scores = tl.dot(queries, tl.trans(some_keys), input_precision=PRECISION) * scaling + added
        scores = tl.where(is_key[None, :], scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        shares = tl.exp(scores - larger[:, None])
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(shares, axis=1)
        sums = sums * shrink[:, None] + tl.dot(shares.to(some_values.dtype), some_values, input_precision=PRECISION)
        largest = larger
    result = sums / total[:, None]
    rows = (sentence * N + beams[:, None]) * (H * D) + head * D + columns[None, :]
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=is_beam[:, None])


def can_attend(num_beams: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the kernel has room for so many beams and heads of a width."""
    return num_beams <= MAX_BEAMS and width in _WIDTHS and dtype in (torch.float32, torch.bfloat16, torch.float16)


@on_device_of_first
def beam_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Write the new keys and values of the beams, then compute attention.

    Args:
        query, new_keys, new_values: float[B, H, N, D] with equal strides and contiguous columns.
        keys, values: float[B, H, K, D] with equal strides and contiguous rows.
        scaling: factor for the scores.
        mask: float[B, 1, N, K], added to the scores except those of new keys, of which each beam attends to its own.
        places: int64[N], ascending places of the new keys; keys from the first of these on are not read.

    Returns:
        float[B, N, H, D].
    """
    num_sentences, num_heads, num_beams, width = query.shape
    out = torch.empty(num_sentences, num_beams, num_heads, width, dtype=query.dtype, device=query.device)
    beam_attention_kernel[(num_sentences * num_heads,)](
        query, new_keys, new_values, keys, values, mask, places, out,
        query.stride(0), query.stride(1), query.stride(2), keys.stride(0), keys.stride(1),
        mask.stride(0), mask.stride(2), keys.shape[2], scaling,
        N=num_beams, H=num_heads, D=width, WRITES=places is not None, BLOCK_N=16,
        BLOCK_K=64 if query.dtype == torch.float32 else 128,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


__all__ = ["MAX_BEAMS", "beam_attention", "can_attend"]
