"""One matrix of quantized experts for a few slots, without gradients: half of a step of generation (Triton).

Nothing is sorted, and nothing is unpacked into memory. Each program takes one expert, some rows of its matrix and at
most `TILE_S` of its slots. So the packed weights of a needed expert are read once, at the memory's speed.

Shape letters: S slots, E experts, N outputs, K inputs, B packed bytes of K inputs, G groups of K inputs.
"""

# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_guard import on_device_of_first
from .triton_dequantize import bytes_with_one_scale, inputs_of_plane, integers_of_plane

MAX_SLOTS = 64
_TILE_SLOTS = 8  # the fewest that tensor cores take
_WARPS_OF_A_GPU = 1584  # 12 on each multiprocessor of an H200
_MIN_STEPS = 16
_MAX_SLOTS_WITHOUT_PLAN = (
    16  # with more slots, a kernel that finds them once is faster than every program searching its own
)


@triton.jit
def _slots_of_tile(ids, leader, num_slots, num_experts, BLOCK_S: tl.constexpr, TILE_S: tl.constexpr):
    """The expert of a slot; if the slot is the first of `TILE_S` of its expert, these slots, and which exist."""
    slots = tl.arange(0, BLOCK_S)
    experts = tl.minimum(tl.load(ids + slots, mask=slots < num_slots, other=-1), num_experts)
    expert = tl.minimum(tl.load(ids + leader), num_experts)
    is_mine = (experts == expert).to(tl.int32)
    rank = tl.cumsum(is_mine, axis=0) - 1
    first = tl.sum(tl.where(slots < leader, is_mine, 0), axis=0)
    places = first + tl.arange(0, TILE_S)
    is_at = tl.where(rank[:, None] == places[None, :], is_mine[:, None], 0)
    is_slot = places < tl.where(first % TILE_S == 0, tl.sum(is_mine, axis=0), 0)
    return expert.to(tl.int32), tl.sum(is_at * slots[:, None], axis=0), is_slot


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["ids"])
def _plan_tiles_kernel(ids, tiles, num_slots, num_experts, BLOCK_S: tl.constexpr, TILE_S: tl.constexpr):
    """Write tiles[slot] as in `_slots_of_tile`, -1 for no slot; the last line has the experts."""
    leader = tl.program_id(0)
    expert, slot, is_slot = _slots_of_tile(ids, leader, num_slots, num_experts, BLOCK_S, TILE_S)
    tl.store(tiles + leader * TILE_S + tl.arange(0, TILE_S), tl.where(is_slot, slot, -1))
    tl.store(tiles + num_slots * TILE_S + leader, expert)


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["ids", "weights", "scale", "bias"])
def _quantized_linear_kernel(
    inputs,
    ids,
    tiles,
    weights,
    packed,
    scale,
    bias,
    out,
    num_slots,
    num_experts,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS_PER_INPUT: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    OUT_PLANES: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PARTS: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """`matrix[e] @ inputs + bias[e]` of slots of one expert, times their `weights` unless they are `None`.

    The programs of the first of each `TILE_S` slots of an expert compute all of these slots; other programs do nothing.
    Slots without an expert get zeros if there are weights. Sums over `K` consist of `PARTS` sums, one per warp.

    Args:
        tiles: from `_plan_tiles_kernel`, or `None` if each program finds its slots by itself.
        inputs: [S / SLOTS_PER_INPUT, K]: in order with `IN_PAIRS`, else plane by plane, like `out` with `OUT_PLANES`.
        OUT_PLANES: 2 writes outputs at even positions before those at odd ones, as a matrix of 4 bits reads its inputs.
    """
    dtype: tl.constexpr = inputs.dtype.element_ty
    PLANES: tl.constexpr = 8 // BITS
    NUM_BYTES: tl.constexpr = K // PLANES
    NUM_GROUPS: tl.constexpr = K // GROUP
    STEP: tl.constexpr = PARTS * BLOCK_B
    # scales of outputs, of one partial sum, or of single weights
    BY_CHUNK: tl.constexpr = NUM_GROUPS > 1 and GROUP % (BLOCK_B * PLANES) == 0
    BY_WEIGHT: tl.constexpr = NUM_GROUPS > 1 and not BY_CHUNK

    leader = tl.program_id(1)
    if tiles is not None:
        slot = tl.load(tiles + leader * TILE_S + tl.arange(0, TILE_S))
        expert = tl.load(tiles + num_slots * TILE_S + leader)
        is_slot = slot >= 0
    else:
        expert, slot, is_slot = _slots_of_tile(ids, leader, num_slots, num_experts, BLOCK_S, TILE_S)
    if tl.sum(is_slot.to(tl.int32), axis=0) == 0:
        return

    NUM_ROWS: tl.constexpr = N // OUT_PLANES
    NUM_BLOCKS: tl.constexpr = (NUM_ROWS + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0)
    row = block % NUM_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < NUM_ROWS
    columns = row * OUT_PLANES + block // NUM_BLOCKS
    out_pointers = out + slot[None, :] * N + (block // NUM_BLOCKS * NUM_ROWS + row)[:, None]
    out_mask = is_row[:, None] & is_slot[None, :]
    if expert == num_experts:
        if weights is not None:
            tl.store(out_pointers, tl.zeros((BLOCK_N, TILE_S), out.dtype.element_ty), mask=out_mask)
        return

    matrix_row = expert.to(tl.int64) * N + columns
    row_bias = tl.load(bias + matrix_row, mask=is_row, other=0.0).to(tl.float32)
    part = tl.arange(0, PARTS)
    depths = (part * BLOCK_B)[:, None, None] + tl.arange(0, BLOCK_B)[None, None, :]
    packed_pointers = packed + matrix_row[None, :, None] * NUM_BYTES + depths
    IN_TYPE: tl.constexpr = tl.int64 if dtype == tl.float32 else tl.int32
    if IN_PAIRS:
        inputs = inputs.to(tl.pointer_type(IN_TYPE))
    IN_STRIDE: tl.constexpr = NUM_BYTES if IN_PAIRS else K
    input_pointers = inputs + (slot // SLOTS_PER_INPUT)[None, :, None] * IN_STRIDE + depths
    scale_pointers = scale + matrix_row * NUM_GROUPS
    starts = (part * BLOCK_B)[:, None]
    if BY_CHUNK:
        chunk_mask = is_row[None, :] & (starts < NUM_BYTES)
        chunk_scale = tl.load(scale_pointers[None, :] + starts * PLANES // GROUP, mask=chunk_mask, other=0.0)
    sums = tl.zeros((PARTS, BLOCK_N, TILE_S), tl.float32)
    for b in range(0, NUM_BYTES, STEP):
        matrix_mask = is_row[None, :, None]
        input_mask = is_slot[None, :, None]
        if NUM_BYTES % STEP != 0:
            matrix_mask = matrix_mask & (depths < NUM_BYTES - b)
            input_mask = input_mask & (depths < NUM_BYTES - b)
        bytes_PNB = tl.load(packed_pointers + b, mask=matrix_mask, other=0)
        if IN_PAIRS:
            pairs = tl.load(input_pointers + b, mask=input_mask, other=0)
        products = tl.zeros((PARTS, BLOCK_N, TILE_S), tl.float32) if BY_CHUNK else sums
        for plane in tl.static_range(PLANES):
            a = integers_of_plane(bytes_PNB, plane, BITS, dtype, USE_PTX)
            if BY_WEIGHT:
                groups = ((b + depths) * PLANES + plane) // GROUP
                a *= tl.load(scale_pointers[None, :, None] + groups, mask=matrix_mask, other=0.0).to(dtype)
            if IN_PAIRS:
                x = inputs_of_plane(pairs, plane, dtype)
            else:
                x = tl.load(input_pointers + b + plane * NUM_BYTES, mask=input_mask, other=0.0)
            products = tl.dot(a, x.permute(0, 2, 1), products, input_precision="ieee")
        if BY_CHUNK:
            sums += products * chunk_scale[:, :, None].to(tl.float32)
            starts += STEP  # loads of the next step, so that products do not wait for them
            chunk_mask = is_row[None, :] & (starts < NUM_BYTES)
            chunk_scale = tl.load(scale_pointers[None, :] + starts * PLANES // GROUP, mask=chunk_mask, other=0.0)
        else:
            sums = products
    result = tl.sum(sums, axis=0)
    if NUM_GROUPS == 1:
        result *= tl.load(scale_pointers, mask=is_row, other=0.0).to(tl.float32)[:, None]
    result += row_bias[:, None]
    if RELU:
        result = tl.maximum(result, 0.0)
    if weights is not None:
        result *= tl.load(weights + slot, mask=is_slot, other=0.0).to(tl.float32)[None, :]
    tl.store(out_pointers, result.to(out.dtype.element_ty), mask=out_mask)


@dataclass(frozen=True)
class SmallBatchTile:
    """Rows of the matrix and bytes of each part that a program takes at once, and the number of loads ahead."""

    block_n: int
    block_b: int
    parts: int
    num_stages: int


def small_batch_tile(num_slots: int, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> SmallBatchTile:
    """The tile for products of `dtype`. It does not depend on the number of experts, so results do not either.

    If a large GPU would have too few programs, tiles are narrow and several warps share their rows. Otherwise a program
    should have many steps, so that its start and end take a small part of its time.
    """
    if dtype == torch.float32:  # products without tensor cores: registers per thread limit the tile
        return SmallBatchTile(16, 16, 4, 2)
    _, num_rows, num_bytes = packed.shape
    block_b = bytes_with_one_scale(packed, scale)
    num_blocks = num_slots * num_rows // 32
    parts = 4 if num_blocks < _WARPS_OF_A_GPU else min(4, max(1, num_bytes // (_MIN_STEPS * block_b)))
    return SmallBatchTile(16 if num_blocks < 256 else 32, block_b, 1 << (parts.bit_length() - 1), 4)


@on_device_of_first
def plan_tiles(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Plan which slots programs compute together, for both matrices.

    Args:
        expert_ids: integer[T, k], contiguous; `num_experts` or more for a slot that no expert computes.

    Returns:
        int32; empty if there are so few slots that each program finds its own.
    """
    num_slots = expert_ids.numel()
    tiles = _empty_tiles(expert_ids)
    if tiles.numel():
        sizes: Any = {"BLOCK_S": _padded(num_slots), "TILE_S": _TILE_SLOTS}
        _plan_tiles_kernel[(num_slots,)](expert_ids, tiles, num_slots, num_experts, **sizes, num_warps=1)
    return tiles


# in eager mode the operator's wrappers would take longer than the kernel
plan_tiles_op = torch.library.custom_op("hf_moe_ted::plan_tiles", plan_tiles, mutates_args=())


@plan_tiles_op.register_fake
def _(expert_ids: Tensor, num_experts: int) -> Tensor:
    return _empty_tiles(expert_ids)


def _empty_tiles(expert_ids: Tensor) -> Tensor:
    num_slots = expert_ids.numel()
    is_planned = num_slots > _MAX_SLOTS_WITHOUT_PLAN
    return expert_ids.new_empty(num_slots * (_TILE_SLOTS + 1) * is_planned, dtype=torch.int32)


def _padded(num_slots: int) -> int:
    # in plain Python, because Triton's function for this would take 2 us
    return max(16, 1 << (num_slots - 1).bit_length())


@on_device_of_first
def small_batch_quantized_linear(
    inputs: Tensor,
    expert_ids: Tensor,
    weights: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor,
    tiles: Tensor,
    *,
    in_planes: bool,
    out_planes: bool,
    relu: bool,
    tile: SmallBatchTile | None = None,
) -> Tensor:
    """`matrix[e] @ input + bias[e]` of the expert of each slot, for at most `MAX_SLOTS` slots.

    Args:
        inputs: float[T, K] of tokens or [S, K] of slots, of 2 to 4 bytes; all tensors are contiguous.
        expert_ids: integer[T, k]; E or more for a slot that no expert computes.
        weights: float[T, k], factors of the outputs, or `None`.
        packed: int8[E, N, K], or uint8[E, N, K / 2] with 4 bits.
        scale: float[E, N, G].
        bias: float[E, N].
        tiles: from [`plan_tiles`].
        in_planes: whether, with 4 bits, inputs at even positions come before those at odd positions.
        out_planes: whether to write outputs in that order.
        relu: whether to apply ReLU to the outputs.
        tile: default [`small_batch_tile`].

    Returns:
        float[S, N] in the dtype of the inputs. A slot without an expert has zeros if there are weights, else is
        undefined.
    """
    num_experts, num_rows, _ = packed.shape
    num_slots, depth = expert_ids.numel(), inputs.shape[1]
    bits = 8 if packed.dtype == torch.int8 else 4
    group = depth // scale.shape[2]
    out = inputs.new_empty(num_slots, num_rows)
    tile = tile or small_batch_tile(num_slots, packed, scale, inputs.dtype)
    planes = 2 if out_planes else 1
    is_in_pairs = bits == 4 and not in_planes
    if is_in_pairs and inputs.data_ptr() % (2 * inputs.element_size()):
        inputs = inputs.clone()
    grid = (planes * -(-num_rows // planes // tile.block_n), num_slots)
    _quantized_linear_kernel[grid](
        inputs,
        expert_ids,
        tiles if tiles.numel() else None,
        weights,
        packed,
        scale,
        bias,
        out,
        num_slots,
        num_experts,
        N=num_rows,
        K=depth,
        BITS=bits,
        GROUP=group,
        SLOTS_PER_INPUT=num_slots // inputs.shape[0],
        IN_PAIRS=is_in_pairs,
        OUT_PLANES=planes,
        RELU=relu,
        BLOCK_S=_padded(num_slots),
        TILE_S=_TILE_SLOTS,
        BLOCK_N=tile.block_n,
        BLOCK_B=tile.block_b,
        PARTS=tile.parts,
        USE_PTX=not triton.knobs.runtime.interpret,
        num_warps=tile.parts,
        num_stages=tile.num_stages,
    )
    return out


__all__ = [
    "MAX_SLOTS",
    "SmallBatchTile",
    "plan_tiles",
    "plan_tiles_op",
    "small_batch_quantized_linear",
    "small_batch_tile",
]
