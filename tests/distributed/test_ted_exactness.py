"""Training on shards is training: losses, gradient norms, gradients and parameters are those of one process.

The parameters after three clipped steps depend on all gradients of all steps. Capacity is per rank and batch, so one
process computes batch by batch what the data-parallel ranks do; random numbers are drawn from the seeds of the ranks.
"""

from pathlib import Path

import pytest
import torch
from ted_cases import Case, Launched, assert_as_one_process, micro_batches, write_and_launch

from hf_moe_ted import ZCodeM3ForConditionalGeneration

EP4 = {"expert_parallel_size": 4}
TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
FOLDED = {"tensor_parallel_size": 4, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2}
ALL_SENT = {"duplicate_token_dropping": False}
PADDED = {"pad_expert_input_to_capacity": True}
ETP1 = {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1}

FOUR = {
    # layouts
    "data only": Case(),
    "ep4": Case(EP4),
    "ep2 x edp2": Case({"expert_parallel_size": 2}),
    "tp2, ep1": Case({"tensor_parallel_size": 2}),
    "tp2 x ep2": Case(TP2_EP2),
    "tp2 x ep2, all sent": Case(TP2_EP2 | ALL_SENT),
    "tp4": Case({"tensor_parallel_size": 4}),
    "tp2, etp1 x ep2": Case(ETP1 | {"expert_parallel_size": 2}),
    "tp2, etp1 x ep4": Case(ETP1 | {"expert_parallel_size": 4}),
    "tp4, etp2 x ep2, all sent": Case(FOLDED | ALL_SENT),
    # ZeRO, with what it does between micro-batches
    "ep4, zero 1, accumulation": Case(EP4, accumulation=2),
    "ep4, zero 2, accumulation": Case(EP4 | {"zero_stage": 2}, accumulation=2),
    "ep2 x edp2, zero 3": Case({"expert_parallel_size": 2, "zero_stage": 3}),
    "tp2 x ep2, zero 3, accumulation": Case(TP2_EP2 | {"zero_stage": 3}, accumulation=2),
    "tp2 x ep2, offload": Case(TP2_EP2 | {"offload": "cpu"}),
    "ep2 x edp2, offload, accumulation": Case({"expert_parallel_size": 2, "offload": "cpu"}, accumulation=2),
    # activation checkpointing and overlap
    "tp2 x ep2, full checkpointing": Case(TP2_EP2, checkpointing="full"),
    "tp2 x ep2, communication-aware": Case(TP2_EP2, checkpointing="communication-aware"),
    "tp2 x ep2, overlap": Case(TP2_EP2 | {"overlap_chunks": 2}, model="top2"),
    "ep4, overlap, communication-aware": Case(EP4 | {"overlap_chunks": 2}, checkpointing="communication-aware"),
    # what is routed where
    "ep4, one expert": Case(EP4, model="skewed"),
    "ep4, two experts, a rank without tokens": Case(EP4 | {"overlap_chunks": 3}, model="skewed2", data="idle"),
    "tp2 x ep2, one expert, all sent": Case(TP2_EP2 | ALL_SENT, model="skewed", data="idle"),
    "tp2, etp1 x ep4, one expert": Case(ETP1 | {"expert_parallel_size": 4}, model="skewed"),
    "ep4, top 2": Case(EP4, model="top2"),
    "tp2 x ep2, top 2, all sent": Case(TP2_EP2 | ALL_SENT, model="top2"),
    "tp2, etp1 x ep4, capacity": Case(ETP1 | {"expert_parallel_size": 4}, model="dropping"),
    # other models
    "tp2 x ep2, residual": Case(TP2_EP2, model="residual"),
    "tp4, untied positions and head": Case({"tensor_parallel_size": 4}, model="untied"),
    "tp2 x ep2, label smoothing": Case(TP2_EP2, model="smoothed"),
    # routers with more rows than there are experts
    "ep4, merged": Case(EP4 | {"overlap_chunks": 2}, model="merged"),
    "tp2 x ep2, merged, zero 3": Case(TP2_EP2 | {"zero_stage": 3}, model="merged", checkpointing="communication-aware"),
    "tp4, merged": Case({"tensor_parallel_size": 4}, model="merged"),
    "ep2 x edp2, thinned, uneven": Case({"expert_parallel_size": 2}, model="thinned", data="uneven"),
    "tp2 x ep2, thinned, all sent": Case(TP2_EP2 | ALL_SENT, model="thinned"),
    # batches
    "ep4, zero 3, uneven, communication-aware": Case(
        EP4 | {"zero_stage": 3}, data="uneven", checkpointing="communication-aware"
    ),
    "tp2 x ep2, uneven": Case(TP2_EP2, data="uneven"),
    # jitter, Random Token Selection, dropout of tokens and of activations
    "ep4, random": Case(EP4, model="random"),
    # exchanges padded to the capacity
    "ep4, padded": Case(EP4 | PADDED, model="dropping", accumulation=2),
    "ep4, padded, random": Case(EP4 | PADDED, model="random", checkpointing="communication-aware"),
    "tp2 x ep2, padded, random": Case(TP2_EP2 | PADDED, model="random", checkpointing="communication-aware"),
    "tp2 x ep2, padded, thinned, all sent": Case(TP2_EP2 | ALL_SENT | PADDED, model="thinned"),
    "tp2, etp1 x ep4, padded": Case(ETP1 | {"expert_parallel_size": 4} | PADDED, model="dropping"),
    "tp2 x ep2, random": Case(TP2_EP2, model="random", checkpointing="communication-aware"),
    "tp2, etp1 x ep4, random": Case(ETP1 | {"expert_parallel_size": 4}, model="random", checkpointing="full"),
}
EIGHT = {
    "tp2 x ep2 x edp2": Case(TP2_EP2),
    "tp2 x ep2 x edp2, zero 3": Case(TP2_EP2 | {"zero_stage": 3}, model="top2"),
    "tp2 x ep2 x edp2, offload, all sent": Case(TP2_EP2 | ALL_SENT | {"offload": "cpu"}, model="residual"),
    "tp4, etp2 x ep2 x edp2": Case(FOLDED),
    "tp4, etp2 x ep2 x edp2, all sent, zero 2": Case(FOLDED | ALL_SENT | {"zero_stage": 2}, accumulation=2),
    "tp4, etp1 x ep4 x edp2": Case(
        {"tensor_parallel_size": 4, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1}, model="top2"
    ),
    "tp2 x ep4": Case({"tensor_parallel_size": 2, "expert_parallel_size": 4}, model="dropping"),
    "tp4, etp2 x ep2 x edp2, padded": Case(FOLDED | PADDED, model="dropping"),
    "tp4, etp2 x ep2 x edp2, bounded": Case(
        FOLDED, model="top2", checkpointing="communication-aware", accumulation=2, load_bound=2.0
    ),
    "ep4 x edp2, a rank without tokens": Case(EP4, model="skewed", data="idle"),
}
CASES = FOUR | EIGHT


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return write_and_launch(tmp_path_factory.mktemp("models"), FOUR, EIGHT)


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(launched: Launched, name: str) -> None:
    folder, results = launched
    assert_as_one_process(folder, CASES[name], results[name])


@pytest.mark.parametrize(
    ("model", "data", "experts"), [("skewed", "even", {1}), ("skewed2", "idle", {1, 3}), ("top1", "even", {0, 1, 2, 3})]
)
def test_routing_is_what_the_cases_say(launched: Launched, model: str, data: str, experts: set[int]) -> None:
    for routing in routings(launched[0] / model, Case(EP4, model, data)):
        assert set(routing.expert_ids.unique().tolist()) <= experts | {routing.num_experts}


@pytest.mark.parametrize("model", ["dropping", "thinned", "random"])
def test_cases_drop_tokens(launched: Launched, model: str) -> None:
    assert all(routing.dropped_share() > 0.1 for routing in routings(launched[0] / model, Case(EP4, model)))


def routings(folder: Path, case: Case) -> list:
    model = ZCodeM3ForConditionalGeneration.from_pretrained(folder).train()
    torch.manual_seed(0)
    parts = micro_batches(case, 0, 4, causal=False)
    outputs = [model(**part, num_items_in_batch=8, output_routings=True) for part in parts]
    return [routing for output in outputs for routing in output.encoder_routings + output.decoder_routings]
