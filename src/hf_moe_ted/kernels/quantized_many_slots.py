"""One matrix of quantized experts for many slots, without gradients: grouped products of sorted rows (Triton).

For how slots become rows and tiles, see row_plan.py. Weights are the first operand of the products, so they become
floats in registers. A tile takes many rows, so this happens seldom.

Shape letters: T tokens, S slots, R rows, E experts, N outputs, K inputs, B packed bytes of K inputs, G groups of them.
"""

# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import fused_ffn
from .device_guard import on_device_of_first
from .row_plan import RowPlan
from .triton_dequantize import bytes_with_one_scale, inputs_of_plane, integers_of_plane

_GATHER_COLUMNS = 128


@triton.jit(do_not_specialize_on_alignment=["order"])
def _gather_planes_kernel(
    tokens,
    rows_out,
    order,
    offsets,
    num_experts,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Move tokens to rows; with two planes, columns at even positions come before those at odd positions."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < tl.load(offsets + num_experts)
    dtype: tl.constexpr = rows_out.dtype.element_ty
    PLANE: tl.constexpr = WIDTH // PLANES
    columns = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = is_row[:, None] & (columns < PLANE)[None, :]
    token = (tl.load(order + rows, mask=is_row, other=0) // TOP_K).to(tl.int64)
    out_pointers = rows_out + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    if PLANES == 1:
        tl.store(out_pointers, tl.load(tokens + token[:, None] * WIDTH + columns[None, :], mask=mask), mask=mask)
    else:
        tokens = tokens.to(tl.pointer_type(tl.int64 if dtype == tl.float32 else tl.int32))
        pairs = tl.load(tokens + token[:, None] * PLANE + columns[None, :], mask=mask)
        for plane in tl.static_range(2):
            tl.store(out_pointers + plane * PLANE, inputs_of_plane(pairs, plane, dtype), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["weights", "scale", "bias"])
def _quantized_grouped_kernel(
    rows_desc,
    packed_desc,
    scale,
    bias,
    weights,
    out,
    order,
    offsets,
    row_ends,
    tile_expert,
    tile_row,
    num_experts,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OUT_PLANES: tl.constexpr,
    RELU: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """`matrix[e] @ row + bias[e]` of the rows of each expert; times their `weights` to slots, if they are not `None`.

    Args:
        rows_desc: [R, K]; with two planes, inputs at even positions come before those at odd positions.
        packed_desc: with `TMA` a descriptor like `rows_desc`, for [E, OUT_PLANES, N / OUT_PLANES, B]; else both are
            pointers.
        OUT_PLANES: 2 writes outputs at even positions before those at odd positions; a 4-bit matrix reads its rows in
            this order.
    """
    PLANES: tl.constexpr = 8 // BITS
    NUM_BYTES: tl.constexpr = K // PLANES
    NUM_GROUPS: tl.constexpr = K // GROUP
    BY_CHUNK: tl.constexpr = NUM_GROUPS > 1 and GROUP % (BLOCK_B * PLANES) == 0
    BY_WEIGHT: tl.constexpr = NUM_GROUPS > 1 and not BY_CHUNK
    dtype: tl.constexpr = out.dtype.element_ty
    NUM_ROWS: tl.constexpr = N // OUT_PLANES
    NUM_BLOCKS: tl.constexpr = (NUM_ROWS + BLOCK_N - 1) // BLOCK_N
    NUM_COLUMNS: tl.constexpr = NUM_BLOCKS * OUT_PLANES
    groups = tl.arange(0, GROUPS)
    is_group = groups <= num_experts
    num_rows = tl.load(row_ends + groups, mask=is_group, other=0) - tl.load(offsets + groups, mask=is_group, other=0)
    tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    num_tiles = tl.sum(tl.where(groups < num_experts, tiles, 0), axis=0) * NUM_COLUMNS
    depths = tl.arange(0, BLOCK_B)
    for index in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS):
        tile = index // NUM_COLUMNS
        block = index % NUM_COLUMNS
        expert = tl.load(tile_expert + tile)
        first = tl.load(tile_row + tile)
        rows = first + tl.arange(0, BLOCK_M)
        is_row = rows < tl.load(row_ends + expert)
        out_plane = block // NUM_BLOCKS
        n = block % NUM_BLOCKS * BLOCK_N
        matrix_row = n + tl.arange(0, BLOCK_N)
        is_column = matrix_row < NUM_ROWS
        out_column = out_plane * NUM_ROWS + matrix_row
        matrix_row = expert.to(tl.int64) * N + matrix_row * OUT_PLANES + out_plane
        scale_pointers = scale + matrix_row * NUM_GROUPS
        if BY_WEIGHT:
            factor = is_column.to(tl.float32)
        else:
            factor = tl.load(scale_pointers, mask=is_column, other=0.0).to(tl.float32)
        accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for b in tl.range(0, NUM_BYTES, BLOCK_B):
            if TMA:
                bytes_NB = packed_desc.load([expert, out_plane, n, b]).reshape(BLOCK_N, BLOCK_B)
            else:
                matrix_mask = is_column[:, None] & (depths < NUM_BYTES - b)[None, :]
                bytes_NB = tl.load(
                    packed_desc + matrix_row[:, None] * NUM_BYTES + (b + depths)[None, :], mask=matrix_mask, other=0
                )
            products = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for plane in tl.static_range(PLANES):
                a = integers_of_plane(bytes_NB, plane, BITS, dtype, USE_PTX)
                if BY_WEIGHT:
                    weight_groups = ((b + depths) * PLANES + plane) // GROUP
                    weight_mask = is_column[:, None] & (depths < NUM_BYTES - b)[None, :]
                    weight_pointers = scale_pointers[:, None] + weight_groups[None, :]
                    a *= tl.load(weight_pointers, mask=weight_mask, other=0.0).to(dtype)
                if TMA:
                    x = rows_desc.load([first, plane * NUM_BYTES + b])
                else:
                    row_mask = is_row[:, None] & (depths < NUM_BYTES - b)[None, :]
                    row_offsets = rows.to(tl.int64)[:, None] * K + (plane * NUM_BYTES + b + depths)[None, :]
                    x = tl.load(rows_desc + row_offsets, mask=row_mask, other=0.0)
                products = tl.dot(a, x.T, products, input_precision="ieee")
            # The factor is applied in each step, even if once after the loop would be enough: otherwise a product that
            # runs into the next step reads `a` from registers that Triton 3.6 has already overwritten (seen with 8
            # bits, two steps, 8 warps).
            accumulator += products * factor[:, None]
            if BY_CHUNK:  # the scale of the next chunk, so that products do not wait for it
                is_next = is_column & (b + BLOCK_B < NUM_BYTES)
                next_pointers = scale_pointers + (b + BLOCK_B) * PLANES // GROUP
                factor = tl.load(next_pointers, mask=is_next, other=0.0).to(tl.float32)

        accumulator += tl.load(bias + matrix_row, mask=is_column, other=0.0).to(tl.float32)[:, None]
        if RELU:
            accumulator = tl.maximum(accumulator, 0.0)
        target = rows
        if weights is not None:
            target = tl.load(order + rows, mask=is_row, other=0)
            accumulator *= tl.load(weights + target, mask=is_row, other=0.0).to(tl.float32)[None, :]
        out_pointers = out + target.to(tl.int64)[:, None] * N + out_column[None, :]
        tl.store(out_pointers, accumulator.to(dtype).T, mask=is_row[:, None] & is_column[None, :])

    if weights is not None:  # slots without an expert
        num_all_tiles = tl.sum(tiles, axis=0) * NUM_BLOCKS
        end = tl.load(row_ends + num_experts)
        for index in tl.range(num_tiles + tl.program_id(0), num_all_tiles, NUM_PROGRAMS):
            rows = tl.load(tile_row + index // NUM_BLOCKS) + tl.arange(0, BLOCK_M)
            columns = index % NUM_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
            slots = tl.load(order + rows, mask=rows < end, other=0).to(tl.int64)
            zeros = tl.zeros((BLOCK_M, BLOCK_N), dtype)
            mask = (rows < end)[:, None] & (columns < N)[None, :]
            tl.store(out + slots[:, None] * N + columns[None, :], zeros, mask=mask)


@dataclass(frozen=True)
class ManySlotsTile:
    """Rows of slots, rows of the matrix and bytes of each that a program takes at once; programs per processor."""

    block_m: int
    block_n: int
    block_b: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1


def many_slots_tile(
    num_slots: int, num_experts: int, packed: Tensor, scale: Tensor, dtype: torch.dtype
) -> ManySlotsTile:
    """The tile for products of `dtype`; its `block_m` does not depend on the matrix."""
    rows_per_expert = num_slots / num_experts
    if dtype == torch.float32:
        return ManySlotsTile(64 if rows_per_expert > 16 else 16, 64, 16, 4, 2, 2)
    block_b = bytes_with_one_scale(packed, scale)
    if not fused_ffn.has_much_shared_memory(packed.device):
        block_m = 16 if rows_per_expert <= 16 else 64
        return ManySlotsTile(block_m, 64 if block_m == 16 else 128, min(block_b, 32), 4, 3)
    if rows_per_expert <= 16:
        return ManySlotsTile(16, 64, block_b, 4, 5, 3)
    if rows_per_expert <= 48:
        return ManySlotsTile(64, 128, block_b, 8, 4)
    return ManySlotsTile(128, 128, block_b, 8, 3)


@on_device_of_first
def gather_planes(tokens: Tensor, plan: RowPlan, top_k: int, planes: int) -> Tensor:
    """Rows of the slots with an expert; with two planes, columns at even positions come before odd ones.

    Args:
        tokens: float[T, K], contiguous, of 2 or 4 bytes.

    Returns:
        float[R, K].
    """
    width = tokens.shape[1]
    rows = tokens.new_empty(plan.num_rows, width)
    if planes == 2 and tokens.data_ptr() % (2 * tokens.element_size()):
        tokens = tokens.clone()
    grid = (triton.cdiv(plan.num_rows, 32), triton.cdiv(width // planes, _GATHER_COLUMNS))
    _gather_planes_kernel[grid](
        tokens,
        rows,
        plan.order,
        plan.offsets,
        plan.num_experts,
        WIDTH=width,
        PLANES=planes,
        TOP_K=top_k,
        BLOCK_M=32,
        BLOCK_B=_GATHER_COLUMNS,
        num_warps=4,
    )
    return rows


@on_device_of_first
def quantized_grouped_linear(
    rows: Tensor,
    plan: RowPlan,
    weights: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    out_planes: bool,
    relu: bool,
    tile: ManySlotsTile,
) -> Tensor:
    """`matrix[e] @ row + bias[e]` of the rows of each expert.

    Args:
        rows: float[R, K] from [`gather_planes`], or from this function with `out_planes`; all tensors are contiguous.
        plan: a plan with the `block_m` of the tile and a `row_multiple` of 1.
        weights: float[T, k], factors of the outputs, or `None`.
        packed: int8[E, N, K], or uint8[E, N, K / 2] with 4 bits.
        scale: float[E, N, G].
        bias: float[E, N].
        out_planes: whether to write outputs at even positions before those at odd positions.
        relu: whether to apply ReLU to the outputs.

    Returns:
        with weights float[S, N] by slot, zeros without an expert; else float[R, N], undefined after the last row of an
        expert.
    """
    num_experts, num_columns, num_bytes = packed.shape
    bits = 8 if packed.dtype == torch.int8 else 4
    planes = 2 if out_planes else 1
    out = rows.new_empty(plan.num_rows if weights is None else plan.num_slots, num_columns)
    operands: list[Any] = [rows, packed]
    has_tma = fused_ffn.has_tma(rows.device) and num_bytes % max(tile.block_b, 16) == 0
    if has_tma:
        shape = [num_experts, planes, num_columns // planes, num_bytes]
        strides = [num_columns * num_bytes, num_bytes, planes * num_bytes, 1]
        operands = [
            TensorDescriptor.from_tensor(rows, [tile.block_m, tile.block_b]),
            TensorDescriptor(packed, shape, strides, [1, 1, tile.block_n, tile.block_b]),
        ]
    num_programs = fused_ffn.num_multiprocessors(rows.device) * tile.programs_per_sm
    _quantized_grouped_kernel[(num_programs,)](
        *operands,
        scale,
        bias,
        weights,
        out,
        plan.order,
        plan.offsets,
        plan.row_ends,
        plan.tile_expert,
        plan.tile_row,
        num_experts,
        GROUPS=triton.next_power_of_2(num_experts + 1),
        N=num_columns,
        K=rows.shape[1],
        BITS=bits,
        GROUP=rows.shape[1] // scale.shape[2],
        OUT_PLANES=planes,
        RELU=relu,
        TMA=has_tma,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_B=tile.block_b,
        NUM_PROGRAMS=num_programs,
        USE_PTX=not triton.knobs.runtime.interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


__all__ = ["ManySlotsTile", "gather_planes", "many_slots_tile", "quantized_grouped_linear"]
