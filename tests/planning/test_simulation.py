"""The planner's collectives and optimizer states against a step of one rank of worlds that are not there."""

import math
from collections import Counter

import pytest

from hf_moe_ted import Layout, Workload, collectives_of_step, parameters_of_rank, simulated_step
from hf_moe_ted.testing import tiny_config

CONFIG = tiny_config(
    encoder_layers=2, decoder_layers=2, num_experts_per_tok=2, capacity_factor=1.0, dropout=0.0,
    token_drop_policy="position", router_noise_policy=None,
)  # fmt: skip
PADDED = {"pad_expert_input_to_capacity": True}


@pytest.mark.parametrize(
    ("layout", "checkpointing", "rank"),
    [
        (Layout(2, 8, 4, 2, **PADDED), "communication-aware", 3),  # type: ignore[arg-type]
        (Layout(1, 512, 4, 1, zero_stage=3, **PADDED), "full", 257),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_step(layout: Layout, checkpointing: str, rank: int) -> None:
    workload = Workload(2, 6, 8, checkpointing=checkpointing)  # type: ignore[arg-type]
    step = simulated_step(CONFIG, layout, workload, rank)
    planned: Counter[tuple[str, int]] = Counter()
    for collective in collectives_of_step(CONFIG, layout, workload):
        planned[collective.operation, collective.num_bytes] += collective.count
    assert step.collectives == planned and math.prod(planned.values()) > 0
    assert step.optimizer_bytes == workload.state_bytes * parameters_of_rank(CONFIG, layout, rank).total


def test_what_cannot_be_simulated() -> None:
    with pytest.raises(ValueError, match=r"pad_expert_input_to_capacity \(False\) must be True"):
        simulated_step(CONFIG, Layout(1, 4, 4, 1), Workload(2, 6, 8), 0)
    with pytest.raises(ValueError, match=r"offload \('cpu'\) must be None"):
        simulated_step(CONFIG, Layout(1, 4, 1, 1, offload="cpu"), Workload(2, 6, 8), 0)
