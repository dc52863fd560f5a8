"""Ungated ReLU experts with biases for a few slots, without gradients: a step of generation in two launches (Triton).

Nothing is sorted. Each program takes one expert and some columns and computes all slots at once, padded to at least 16.
So the weights of a needed expert are read once, at the memory's speed, and those of other experts never. It uses
pointers, not TMA: descriptors would take the host longer than the kernels take the device.

Shape letters: T tokens, K slots per token, S = T * K slots, E experts, D model width, F inner width.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_guard import on_device_of_first

MAX_SLOTS = 64
MAX_SLOTS_COMPILED = 8  # with more slots, the kernels for many slots take less time on the device, but more on the host
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["ids", "weights"])
def _expert_linear_kernel(
    inputs,
    ids,
    weights,
    matrix,
    bias,
    out,
    num_slots,
    num_experts,
    N: tl.constexpr,
    K: tl.constexpr,
    SLOTS_PER_INPUT: tl.constexpr,
    IS_DOWN: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """`inputs @ matrix[e].T + bias[e]` of the slots of one expert; with `IS_DOWN` times their weights, else with ReLU.

    The group of a program is an expert, or `num_experts` for slots without one. With `BY_SLOT` it is the first slot of
    the expert, so there are at most as many programs as slots. Sums over `K` consist of `PARTS` sums, one per warp,
    because products that wait for each other would take longer than the memory.
    """
    group = tl.program_id(1)
    slots = tl.arange(0, BLOCK_S)
    experts = tl.minimum(tl.load(ids + slots, mask=slots < num_slots, other=-1), num_experts)
    expert = tl.minimum(tl.load(ids + group), num_experts) if BY_SLOT else group
    is_mine = experts == expert
    first = tl.min(tl.where(is_mine, slots, BLOCK_S), axis=0)
    is_needed = first == group if BY_SLOT else first < BLOCK_S
    if not is_needed:
        return

    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < N
    out_pointers = out + slots[:, None] * N + columns[None, :]
    out_mask = is_mine[:, None] & is_column[None, :]
    if expert == num_experts:
        if IS_DOWN:
            tl.store(out_pointers, tl.zeros((BLOCK_S, BLOCK_N), out.dtype.element_ty), mask=out_mask)
        return

    # before the products, so that nothing waits for these loads afterwards
    row_bias = tl.load(bias + expert * N + columns, mask=is_column, other=0.0).to(tl.float32)
    if IS_DOWN:
        weight = tl.load(weights + slots, mask=is_mine, other=0.0).to(tl.float32)
    depths = (tl.arange(0, PARTS) * BLOCK_K)[:, None, None] + tl.arange(0, BLOCK_K)[None, None, :]
    input_pointers = inputs + (slots // SLOTS_PER_INPUT)[None, :, None] * K + depths
    matrix_pointers = matrix + (expert.to(tl.int64) * N + columns)[None, :, None] * K + depths
    sums = tl.zeros((PARTS, BLOCK_S, BLOCK_N), tl.float32)
    for k in range(0, K, PARTS * BLOCK_K):
        is_depth = depths < K - k
        a = tl.load(input_pointers + k, mask=is_mine[None, :, None] & is_depth, other=0.0)
        b = tl.load(matrix_pointers + k, mask=is_column[None, :, None] & is_depth, other=0.0)
        sums = tl.dot(a, b.permute(0, 2, 1), sums, input_precision="ieee")
    result = tl.sum(sums, axis=0) + row_bias[None, :]
    result = result * weight[:, None] if IS_DOWN else tl.maximum(result, 0.0)
    tl.store(out_pointers, result.to(out.dtype.element_ty), mask=out_mask)


@on_device_of_first
def small_batch_relu_experts(
    expert_ids: Tensor, tokens: Tensor, weights: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor
) -> Tensor:
    """Weighted outputs of experts, `weight * down(relu(up(token)))`, for at most `MAX_SLOTS` slots.

    Args:
        expert_ids: integer[T, K]; E or more for a slot that no expert computes.
        tokens: float[T, D], contiguous like all others, and of the same dtype as up, up_bias, down and down_bias.
        weights: float[T, K].
        up, up_bias, down, down_bias: [E, F, D], [E, F], [E, D, F], [E, D]; D and F multiples of 8.

    Returns:
        float[T, K, D], the output of each slot, zeros for one without an expert.
    """
    inner = tokens.new_empty(weights.numel(), up.shape[1])
    output = tokens.new_empty(*weights.shape, tokens.shape[1])
    _expert_linear(tokens, expert_ids, weights, up, up_bias, inner, is_down=False)
    _expert_linear(inner, expert_ids, weights, down, down_bias, output, is_down=True)
    return output


# in eager mode the operator's wrappers would take longer than the kernels
small_batch_relu_experts_op = torch.library.custom_op(
    "hf_moe_ted::small_batch_relu_experts", small_batch_relu_experts, mutates_args=()
)


@small_batch_relu_experts_op.register_fake
def _(expert_ids: Tensor, tokens: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
    return tokens.new_empty(*weights.shape, tokens.shape[1])


def _expert_linear(
    inputs: Tensor, ids: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor, out: Tensor, *, is_down: bool
) -> None:
    num_experts, num_columns, depth = matrix.shape
    num_slots = ids.numel()
    is_by_slot = num_slots <= num_experts
    # in plain Python, because Triton's functions for these would take 2 us each
    block_s = max(16, 1 << (num_slots - 1).bit_length())
    block_n, block_k, num_stages = _tile(block_s, inputs.dtype, is_down)
    grid = (-(-num_columns // block_n), num_slots if is_by_slot else num_experts + 1)
    _expert_linear_kernel[grid](
        inputs,
        ids,
        weights,
        matrix,
        bias,
        out,
        num_slots,
        num_experts,
        N=num_columns,
        K=depth,
        SLOTS_PER_INPUT=num_slots // inputs.shape[0],
        IS_DOWN=is_down,
        BY_SLOT=is_by_slot,
        BLOCK_S=block_s,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PARTS=_NUM_WARPS,
        num_warps=_NUM_WARPS,
        num_stages=num_stages,
    )


def _tile(block_s: int, dtype: torch.dtype, is_down: bool) -> tuple[int, int, int]:
    """Columns, depth of each part, and stages, with enough bytes in flight even if only one expert is needed.

    `down` has few columns, so its tiles are narrow and deep; with more inputs per tile they are less so.
    """
    if dtype == torch.float32:  # products without tensor cores: registers per thread limit the tile
        return 512 // block_s, 16, 4
    block_n = block_s // 2 if is_down else 32
    weights_per_tile = 4096
    return block_n, weights_per_tile // (_NUM_WARPS * block_n), 5


__all__ = ["MAX_SLOTS", "MAX_SLOTS_COMPILED", "small_batch_relu_experts", "small_batch_relu_experts_op"]
