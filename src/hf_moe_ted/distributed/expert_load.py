"""Bounds on the rows that a rank sends to each rank of its expert-parallel group, independent of the routing.

Shape letters: T tokens, K experts per token, R rows, P ranks of the expert-parallel group, E local experts of each.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.permutation import sort_slots
from .collectives import max_over

EXPERT_LOAD_BOUND = 1.5


class ExpertLoadOverflow:
    """Records whether slots were left out in a step because their rank had no row left for the rank of their expert.

    The record stays on the device, so nothing waits for it and a CUDA graph can capture it. Recomputation of a forward
    records the same again, which changes nothing.

    Args:
        bound: rows for each rank, as a multiple of the balanced load, which is the same for all ranks; at least 1.

    Raises:
        ValueError: the bound is below 1 or not a number.
    """

    def __init__(self, bound: float = EXPERT_LOAD_BOUND):
        if not (isinstance(bound, int | float) and 1.0 <= bound < math.inf):
            raise ValueError(
                f"expert_load_bound ({bound!r}) must be a number of at least 1; 1 is the load if all ranks get the "
                f"same number of tokens; the default is {EXPERT_LOAD_BOUND}"
            )
        self.bound = bound
        self._peaks: list[Tensor] = []  # float32[] each; no running maximum: recomputation must run the same operations

    def max_rows(self, num_slots: int, num_ranks: int) -> int:
        """Rows for each of `num_ranks` ranks; at least one, at most all slots."""
        return max(1, min(math.ceil(self.bound * num_slots / num_ranks), num_slots))

    def note(self, num_slots_P: Tensor, max_rows: int) -> None:
        """Record the slots that each rank should get, integer[..., P], and the available rows for each rank."""
        self._peaks.append(num_slots_P.max().float() / max_rows)

    def peak(self) -> Tensor:
        """float32[], the largest load on any rank so far, as a fraction of its available rows.

        It is above 1 exactly if slots were left out, and 0 if no tokens go between ranks. It is a collective over all
        ranks of the job. A graph may include it, after backward.
        """
        if not self._peaks:
            return torch.zeros(())
        world: Any = dist.group.WORLD
        return max_over(torch.stack(self._peaks).max(), world)

    def any_rank(self) -> Tensor:
        """bool[], whether any rank left slots out, in any layer; the same on all ranks. A collective, like `peak`."""
        return self.peak() > 1.0


@dataclass(frozen=True)
class BoundedRows:
    """Rows of slots, the same number for each rank, ordered by rank and expert; slots of one expert keep their order.

    Attributes:
        slot_R: integer[R], the slot, `token * K + k`, of each row; -1 for a row that is only padding up to the bound.
        row_TK: integer[T, K], the row of each slot; -1 for a slot that no expert computes, or that found no row.
        ends_PE: int64[P, E], for each expert of a rank, the end of its rows within the rank's rows.
        num_slots_P: int64[P], the slots for each rank, with or without a row.
    """

    slot_R: Tensor
    row_TK: Tensor
    ends_PE: Tensor
    num_slots_P: Tensor


def rows_within_bound(expert_ids_TK: Tensor, num_experts: int, num_ranks: int, max_rows: int) -> BoundedRows:
    """Give each rank `max_rows` rows, which its experts share; nothing is read back to the host.

    Args:
        expert_ids_TK: int64[T, K], global expert of each slot; `num_experts` for one that no expert computes.
        num_experts: number of experts of all ranks together.
    """
    order, sorted_row_TK, counts = sort_slots(expert_ids_TK, num_experts)
    ends_PE = counts.view(num_ranks, -1).cumsum(1)
    num_slots_P = ends_PE[:, -1]
    first_P = num_slots_P.cumsum(0) - num_slots_P

    place_R = torch.arange(max_rows, device=order.device)
    has_slot_PR = place_R < num_slots_P.unsqueeze(1)
    order = torch.nn.functional.pad(order, (0, 1), value=-1)
    slot_PR = order[(first_P.unsqueeze(1) + place_R).where(has_slot_PR, len(order) - 1)]

    rank_TK = expert_ids_TK.clamp(max=num_experts - 1) // ends_PE.shape[1]
    place_TK = sorted_row_TK - first_P[rank_TK]
    has_row_TK = (sorted_row_TK >= 0) & (place_TK < max_rows)
    row_TK = (rank_TK * max_rows + place_TK).where(has_row_TK, -1)
    return BoundedRows(slot_PR.flatten(), row_TK, ends_PE.clamp(max=max_rows), num_slots_P)


def experts_of_rows(ends_PE: Tensor, max_rows: int) -> Tensor:
    """int64[P * max_rows], the expert of each row that came with [`BoundedRows.ends_PE`]; E for no expert."""
    place_PR = torch.arange(max_rows, device=ends_PE.device).expand(ends_PE.shape[0], -1)
    return torch.searchsorted(ends_PE.contiguous(), place_PR.contiguous(), right=True).flatten()


__all__ = ["EXPERT_LOAD_BOUND", "BoundedRows", "ExpertLoadOverflow", "experts_of_rows", "rows_within_bound"]
