"""The planner's collectives against those that a model of the layout runs on four ranks, and against rings by hand."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_ted import TedPlugin, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.layout import Layout
from hf_moe_ted.planning.communication import Collective, bytes_over_links, collectives_of_step
from hf_moe_ted.planning.workload import Workload
from hf_moe_ted.testing import run_distributed_test, tiny_config

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from ted_cases import CollectiveCounter, Log, in_new_groups

WORLD, BATCH_SIZE, SOURCE, TARGET = 4, 2, 6, 8
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep4": {"expert_parallel_size": 4},
    "ep2 x edp2": {"expert_parallel_size": 2},
    "tp2 x ep2": {"tensor_parallel_size": 2, "expert_parallel_size": 2},
    "tp2 x ep2, all sent": {
        "tensor_parallel_size": 2,
        "expert_parallel_size": 2,
        "duplicate_token_dropping": False,
    },
    "ep4, no load moves": {"expert_parallel_size": 4, "least_loaded_experts": True, "least_loaded_bound": 4.0},
    "tp4, etp1 x ep4": {"tensor_parallel_size": 4, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1},
    "tp2": {"tensor_parallel_size": 2},
    "dp4": {},
    "dp4, HSDP": {"dp_replicate_size": 2},
    "ep2 x edp2, HSDP": {"expert_parallel_size": 2, "dp_replicate_size": 2},
    "ep4, HSDP": {"expert_parallel_size": 4, "dp_replicate_size": 2},
}
# layout, checkpointing, ZeRO stage, dropout, whether experts are padded to their capacity
CASES = [
    *((name, "communication-aware", 1, 0.0, "ep" in name and "moves" not in name) for name in LAYOUTS),
    ("tp2 x ep2", None, 1, 0.0, True),
    ("tp2 x ep2", "full", 1, 0.0, True),
    ("tp2 x ep2", "full", 1, 0.1, True),
    ("tp2", "full", 3, 0.0, False),
    ("ep2 x edp2", "full", 3, 0.1, True),
    ("ep4", "full", 2, 0.0, False),
    ("tp4, etp1 x ep4", "full", 1, 0.0, False),
    ("dp4, HSDP", None, 3, 0.0, False),
    ("ep2 x edp2, HSDP", None, 3, 0.0, True),
]
OPERATIONS = {
    "_c10d_functional.all_reduce": "all_reduce",
    "_c10d_functional.all_gather_into_tensor": "all_gather",
    "_c10d_functional.reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional.all_to_all_single": "all_to_all",
    "c10d._allgather_base_": "all_gather",
    "c10d._reduce_scatter_base_": "reduce_scatter",
    "c10d.allreduce_": "all_reduce",
}


def config_of(dropout: float) -> Any:
    return tiny_config(
        encoder_layers=2, decoder_layers=2, num_experts_per_tok=2, capacity_factor=1.0, dropout=dropout,
        token_drop_policy="position", router_noise_policy=None,
    )  # fmt: skip


def plugin_of(name: str, stage: int, pads: bool) -> TedPlugin:
    return TedPlugin(**LAYOUTS[name], zero_stage=stage, pad_expert_input_to_capacity=pads)  # type: ignore[arg-type]


def count_steps(folder: str) -> list[tuple[Layout, Log]]:
    """Layouts, and what a rank counts in the second of two equal steps: FSDP2 sets up in the first."""
    found = []
    for name, checkpointing, stage, dropout, pads in in_new_groups(CASES):
        plugin = plugin_of(name, stage, pads)
        load: Any = ZCodeM3ForConditionalGeneration.from_pretrained
        model = load(
            f"{folder}/{dropout}",
            distributed_config=plugin.distributed_config,
            capacity_factor=1.0 if pads else None,
        ).train()
        if checkpointing is not None:
            kwargs = {"use_reentrant": False} if checkpointing == "full" else plugin.activation_checkpointing_kwargs
            model.activation_checkpointing_enable(kwargs)
        ids = torch.randint(5, 96, (BATCH_SIZE, SOURCE), generator=torch.Generator().manual_seed(0))
        labels = torch.randint(5, 96, (BATCH_SIZE, TARGET), generator=torch.Generator().manual_seed(1))
        model(input_ids=ids, labels=labels).loss.backward()
        with CollectiveCounter() as counter:
            model(input_ids=ids, labels=labels).loss.backward()
        found.append((plugin.distributed_config.layout, counter.log))
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[Layout, Log]]]:
    folder = tmp_path_factory.mktemp("models")
    for dropout in (0.0, 0.1):
        ZCodeM3ForConditionalGeneration(config_of(dropout)).save_pretrained(folder / str(dropout))
    return run_distributed_test(count_steps, WORLD, str(folder))


def planned(case: int, layout: Layout) -> list[Collective]:
    _, checkpointing, _, dropout, pads = CASES[case]
    config = config_of(dropout)
    config.capacity_factor = 1.0 if pads else None
    workload = Workload(BATCH_SIZE, SOURCE, TARGET, dtype="float32", checkpointing=checkpointing)  # type: ignore[arg-type]
    return collectives_of_step(config, layout, workload)


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_bytes(counted: list[list[tuple[Layout, Log]]], case: int) -> None:
    """Every collective to the byte; where routing decides on rows, the sum of the exchange over all ranks."""
    exchanges_by_routing = "ep" in CASES[case][0] and not CASES[case][-1]
    totals: Counter[str] = Counter()
    for results in counted:
        layout, log = results[case]
        expected: Counter[tuple[str, int]] = Counter()
        for collective in planned(case, layout):
            expected[collective.operation, collective.num_bytes] += collective.count
        seen: Counter[tuple[str, int]] = Counter()
        for (operation, num_bytes), count in log.items():
            seen[OPERATIONS[operation], num_bytes] += count
        if not exchanges_by_routing:
            assert seen == expected
            continue
        for counts, sign in ((seen, 1), (expected, -1)):
            for (operation, num_bytes), count in counts.items():
                totals[operation] += sign * num_bytes * count
    assert not any(totals.values())


def test_accumulation_gathers_and_reduces_once_or_every_time() -> None:
    layout = Layout(data_parallel_size=4, expert_parallel_size=4)

    def zero(stage: int, accumulation: int) -> Counter[str]:
        workload = Workload(2, 6, 8, accumulation=accumulation)
        found: Counter[str] = Counter()
        for collective in collectives_of_step(config_of(0.0), replace(layout, zero_stage=stage), workload):
            if collective.is_zero:
                found[collective.operation] += collective.count * collective.num_bytes
        return found

    once = zero(1, 1)
    assert zero(1, 3) == once
    assert zero(2, 3) == {"all_gather": once["all_gather"], "reduce_scatter": 3 * once["reduce_scatter"]}
    assert zero(3, 1)["all_gather"] == 2 * once["all_gather"]
    assert zero(3, 3) == {"all_gather": 6 * once["all_gather"], "reduce_scatter": once["reduce_scatter"]}


def test_ranks_that_split_experts_gather_the_loads_of_all() -> None:
    """8 bytes for each of 4 experts, of 2 ranks; without least-loaded experts of those that the rank sends only."""
    workload, layout = Workload(2, 6, 8), Layout(2, 2, 2, 2)
    for name, num_ranks in (("ted", 1), ("ted_least_loaded", 2)):
        collectives = collectives_of_step(config_of(0.0), replace(layout, ep_implementation=name), workload)
        loads = [c.num_bytes for c in collectives if c.axis == "etp" and c.operation == "all_gather"]
        assert min(loads) == 4 * 8 * num_ranks


def test_links() -> None:
    """8 ranks in machines of 4, tp 2: a group of ep 4 has two ranks in each machine."""
    layout = Layout(2, 4, 4, 2)
    exchange = Collective("all_to_all", "ep", "forward", 800)
    links = bytes_over_links(exchange, layout, 4)
    assert (links.fast, links.slow) == (200, 400)
    links = bytes_over_links(Collective("all_reduce", "tp", "forward", 800), layout, 4)
    assert (links.fast, links.slow) == (800, 0)
    links = bytes_over_links(Collective("all_gather", "dp", "forward", 100), layout, 4)
    assert (links.fast, links.slow) == (150, 150)
    links = bytes_over_links(Collective("reduce_scatter", "dp", "backward", 400), layout, 2)
    assert (links.fast, links.slow) == (0, 300)


def test_links_with_a_replica_per_machine() -> None:
    """8 ranks in machines of 4: ZeRO inside, the sum of shards across."""
    layout = Layout(1, 8, 2, 1, dp_replicate_size=2)
    links = bytes_over_links(Collective("all_gather", "dp", "forward", 100), layout, 4)
    assert (links.fast, links.slow) == (300, 0)
    for axis in ("dp_replicate", "edp_replicate"):
        links = bytes_over_links(Collective("all_reduce", axis, "backward", 100), layout, 4)  # type: ignore[arg-type]
        assert (links.fast, links.slow) == (0, 100)
