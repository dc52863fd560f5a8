"""Rows within a bound against a loop over all slots, and what is noted of it."""

import math

import pytest
import torch

from hf_moe_ted.distributed.expert_load import ExpertLoadOverflow, experts_of_rows, rows_within_bound

NUM_EXPERTS, NUM_RANKS = 6, 3


@pytest.mark.parametrize("max_rows", [1, 4, 40])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(20, 1), (20, 2), (1, 2), (0, 2)])
def test_rows_within_bound(num_tokens: int, top_k: int, max_rows: int) -> None:
    ids = torch.randint(NUM_EXPERTS + 1, (num_tokens, top_k))
    rows = rows_within_bound(ids, NUM_EXPERTS, NUM_RANKS, max_rows)
    per_rank = NUM_EXPERTS // NUM_RANKS
    slots_of, experts_of, counts = [], [], []
    for rank in range(NUM_RANKS):
        mine = [
            (expert, slot)
            for expert in range(rank * per_rank, (rank + 1) * per_rank)
            for slot, wanted in enumerate(ids.flatten().tolist())
            if wanted == expert
        ]
        counts.append(len(mine))
        missing = [(NUM_EXPERTS, -1)] * max(0, max_rows - len(mine))
        slots_of += [slot for _, slot in (*mine[:max_rows], *missing)]
        experts_of += [min(expert - rank * per_rank, per_rank) for expert, _ in mine[:max_rows]]
        experts_of += [per_rank] * len(missing)
    assert rows.slot_R.tolist() == slots_of
    expected = [slots_of.index(slot) if slot in slots_of else -1 for slot in range(num_tokens * top_k)]
    assert rows.row_TK.flatten().tolist() == expected
    assert rows.num_slots_P.tolist() == counts
    assert experts_of_rows(rows.ends_PE, max_rows).tolist() == experts_of


@pytest.mark.parametrize(
    ("num_slots", "num_ranks", "expected"), [(100, 4, 38), (8, 8, 2), (3, 8, 1), (2, 1, 2), (0, 4, 1)]
)
def test_max_rows(num_slots: int, num_ranks: int, expected: int) -> None:
    assert ExpertLoadOverflow().max_rows(num_slots, num_ranks) == expected


@pytest.mark.parametrize("bound", [0.9, math.inf, math.nan, "1.5", None])
def test_other_bounds_are_refused(bound: object) -> None:
    with pytest.raises(ValueError, match=r"expert_load_bound \(.*\) must be a number of at least 1"):
        ExpertLoadOverflow(bound)  # type: ignore[arg-type]
