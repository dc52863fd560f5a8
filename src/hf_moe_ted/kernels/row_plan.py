"""Slots sorted by expert into rows and tiles of rows, on the device (Triton).

A slot is `token * K + k`. Slots are sorted by expert into rows; slots without an expert come last. Rows of one expert
are cut into tiles of at most `block_m`. The first row of each expert is a multiple of `row_multiple`; if that is more
than 1, some rows have no slot. Nothing waits for the host, and shapes do not depend on the routing.

Shape letters: T tokens, K slots per token, S = T * K slots, R rows, E experts.
"""

# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_guard import on_device_of_first

_MAX_PROGRAMS = 256  # each program reads the counts of all
_MIN_SLOTS_PER_PROGRAM = 64


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["ids"])
def _count_slots_kernel(
    ids, counts, num_slots, num_experts, BLOCK: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr
):
    """counts[block, expert], the slots per expert in each block of `BLOCK`; `num_experts` counts as an expert."""
    block = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    count = tl.zeros((GROUPS,), tl.int32)
    for start in range(0, BLOCK, STEP):
        slots = block * BLOCK + start + tl.arange(0, STEP)
        group = tl.minimum(tl.load(ids + slots, mask=slots < num_slots, other=-1), num_experts)
        count += tl.sum((group[:, None] == groups[None, :]).to(tl.int32), axis=0)
    tl.store(counts + block * GROUPS + groups, count)


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "max_tiles"], do_not_specialize_on_alignment=["ids"])
def _place_slots_kernel(
    ids,
    counts,
    order,
    row_of_slot,
    offsets,
    row_ends,
    tile_ends,
    tile_expert,
    tile_row,
    num_slots,
    num_experts,
    num_blocks,
    max_tiles,
    BLOCK_M: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES_STEP: tl.constexpr,
):
    """Write the plan, see [`RowPlan`]. Slots of one expert keep their order."""
    block = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    total = tl.zeros((GROUPS,), tl.int32)
    before = tl.zeros((GROUPS,), tl.int32)
    for first in range(0, num_blocks, STEP):
        blocks = first + tl.arange(0, STEP)[:, None]
        count = tl.load(counts + blocks * GROUPS + groups[None, :], mask=blocks < num_blocks, other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where(blocks < block, count, 0), axis=0)
    ends = tl.cumsum(tl.cdiv(total, ROW_MULTIPLE) * ROW_MULTIPLE, axis=0)
    starts = ends - tl.cdiv(total, ROW_MULTIPLE) * ROW_MULTIPLE

    next_row = starts + before
    for start in range(0, BLOCK, STEP):
        slots = block * BLOCK + start + tl.arange(0, STEP)
        group = tl.minimum(tl.load(ids + slots, mask=slots < num_slots, other=-1), num_experts)
        is_before = (group[None, :] == group[:, None]) & (slots[None, :] < slots[:, None])
        is_in = (group[:, None] == groups[None, :]).to(tl.int32)
        row = tl.sum(is_in * next_row[None, :], axis=1) + tl.sum(is_before.to(tl.int32), axis=1)
        tl.store(order + row, slots, mask=slots < num_slots)
        tl.store(row_of_slot + slots, tl.where(group < num_experts, row, -1), mask=slots < num_slots)
        next_row += tl.sum(is_in, axis=0)

    tiles = tl.cdiv(total, BLOCK_M)
    ends_of_tiles = tl.cumsum(tiles, axis=0)
    if block == 0:
        tl.store(offsets, 0)
        tl.store(offsets + 1 + groups, ends, mask=groups <= num_experts)
        tl.store(row_ends + groups, starts + total, mask=groups <= num_experts)
        tl.store(tile_ends + groups, ends_of_tiles, mask=groups <= num_experts)
    row_of_tile_0 = starts - (ends_of_tiles - tiles) * BLOCK_M
    for first in range(block * TILES_STEP, max_tiles, num_blocks * TILES_STEP):
        tile = first + tl.arange(0, TILES_STEP)
        group = tl.sum((ends_of_tiles[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        row = tl.sum(tl.where(groups[None, :] == group[:, None], row_of_tile_0[None, :], 0), axis=1) + tile * BLOCK_M
        tl.store(tile_expert + tile, group, mask=tile < max_tiles)
        tl.store(tile_row + tile, row, mask=tile < max_tiles)


@dataclass(frozen=True)
class RowPlan:
    """The places of slots, as parts of one int32 tensor.

    Attributes:
        num_slots: S.
        num_rows: R.
        num_experts: E.
        block_m: rows of a tile.
        row_multiple: first rows are multiples of it; it divides `block_m`.
        order: [R and more], the slot of each row that has one.
        row_of_slot: [S and more], the row of each slot; -1 for a slot without an expert.
        offsets: [E + 2 and more], the first row of each expert; the first row of slots without one; the number of used
            rows.
        row_ends: [E + 1 and more], the end of each expert's rows with a slot, and of the rows of slots without an
            expert.
        tile_ends: [E + 1 and more], the number of tiles up to each expert, inclusive, and with those of slots without
            one.
        tile_expert, tile_row: [num_tiles or more], expert and first row of each tile.
    """

    num_slots: int
    num_rows: int
    num_experts: int
    block_m: int
    row_multiple: int
    order: Tensor
    row_of_slot: Tensor
    offsets: Tensor
    row_ends: Tensor
    tile_ends: Tensor
    tile_expert: Tensor
    tile_row: Tensor

    @staticmethod
    def max_rows(num_slots: int, num_experts: int, row_multiple: int) -> int:
        """R, enough for any routing."""
        num_groups = min(num_experts + 1, num_slots)  # experts that have a slot
        return num_slots + num_groups * (row_multiple - 1)

    @classmethod
    def sizes(cls, num_slots: int, num_experts: int, block_m: int, row_multiple: int) -> list[int]:
        """Lengths of the parts, each a multiple of 16 bytes: Triton compiles kernels again for other alignments."""
        num_rows = cls.max_rows(num_slots, num_experts, row_multiple)
        max_tiles = num_slots // block_m + num_experts + 1
        lengths = num_rows, num_slots, num_experts + 2, num_experts + 1, num_experts + 1, max_tiles, max_tiles
        return [-(-length // 4) * 4 for length in lengths]

    @classmethod
    def of(cls, plan: Tensor, num_slots: int, num_experts: int, block_m: int, row_multiple: int = 1) -> "RowPlan":
        """The plan in a tensor that `plan_rows` wrote."""
        num_rows = cls.max_rows(num_slots, num_experts, row_multiple)
        parts = plan.split(cls.sizes(num_slots, num_experts, block_m, row_multiple))
        return cls(num_slots, num_rows, num_experts, block_m, row_multiple, *parts)

    @property
    def of_rows_and_tiles(self) -> tuple[Tensor, ...]:
        """The arguments of kernels that run over tiles of rows, in their order."""
        return self.order, self.offsets, self.row_ends, self.tile_ends, self.tile_expert, self.tile_row


@on_device_of_first
def plan_rows(expert_ids: Tensor, num_experts: int, block_m: int, row_multiple: int = 1) -> Tensor:
    """Sort slots by expert.

    Args:
        expert_ids: integer[T, K]; `num_experts` or more for a slot that no expert computes.
        block_m, row_multiple: see [`RowPlan`].

    Returns:
        int32, see [`RowPlan`].
    """
    num_slots = expert_ids.numel()
    sizes_of_parts = RowPlan.sizes(num_slots, num_experts, block_m, row_multiple)
    plan = expert_ids.new_empty(sum(sizes_of_parts), dtype=torch.int32)
    ids = expert_ids.contiguous()
    groups = triton.next_power_of_2(num_experts + 1)
    block = max(_MIN_SLOTS_PER_PROGRAM, triton.next_power_of_2(triton.cdiv(num_slots, _MAX_PROGRAMS)))
    num_blocks = triton.cdiv(num_slots, block)
    sizes: dict[str, Any] = {"BLOCK": block, "STEP": min(64, max(16, 8192 // groups)), "GROUPS": groups}
    counts = plan.new_empty(num_blocks, groups)
    _count_slots_kernel[(num_blocks,)](ids, counts, num_slots, num_experts, **sizes)
    _place_slots_kernel[(num_blocks,)](
        ids,
        counts,
        *plan.split(sizes_of_parts),
        num_slots,
        num_experts,
        num_blocks,
        sizes_of_parts[-1],
        BLOCK_M=block_m,
        ROW_MULTIPLE=row_multiple,
        TILES_STEP=16,
        **sizes,
    )
    return plan


# in eager mode the operator's wrappers would take longer than the kernels
plan_rows_op = torch.library.custom_op("hf_moe_ted::plan_rows", plan_rows, mutates_args=())


@plan_rows_op.register_fake
def _(expert_ids: Tensor, num_experts: int, block_m: int, row_multiple: int = 1) -> Tensor:
    sizes = RowPlan.sizes(expert_ids.numel(), num_experts, block_m, row_multiple)
    return expert_ids.new_empty(sum(sizes), dtype=torch.int32)


__all__ = ["RowPlan", "plan_rows", "plan_rows_op"]
