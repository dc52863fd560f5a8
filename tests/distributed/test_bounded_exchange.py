"""Steps within a bound of the load: as without it where it is enough; else all ranks know, and can run them again."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ted_cases import (
    NUM_STEPS,
    SEED,
    Case,
    Parts,
    Run,
    Trained,
    assert_as_one_process,
    load_sharded,
    run_once,
    train,
    write_models,
)
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hf_moe_ted import TedPlugin, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed import expert_parallel
from hf_moe_ted.distributed.activation_checkpoint import CommunicationAwareContextFn
from hf_moe_ted.distributed.bounded_exchange import bounded_expert_load, reads_sizes
from hf_moe_ted.distributed.private_torch import local_of
from hf_moe_ted.distributed.step_snapshot import StepSnapshot
from hf_moe_ted.testing import run_distributed_test

ALWAYS_ENOUGH = 4.0
EP4 = {"expert_parallel_size": 4}
TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
ALL_SENT = {"duplicate_token_dropping": False}
ETP1 = {"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1}
FOLDED = {"tensor_parallel_size": 4, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2}
FOUR = {
    "ep4, accumulation": Case(EP4, "noisy", accumulation=2),
    "ep4, zero 2, overlap": Case(EP4 | {"zero_stage": 2, "overlap_chunks": 2}, "noisy", accumulation=2),
    "ep2 x edp2, zero 3": Case(
        {"expert_parallel_size": 2, "zero_stage": 3}, "noisy", checkpointing="communication-aware"
    ),
    "tp2 x ep2, accumulation": Case(TP2_EP2, "noisy", accumulation=2, checkpointing="communication-aware"),
    "tp2 x ep2, all sent": Case(TP2_EP2 | ALL_SENT, "noisy", checkpointing="full"),
    "tp2, etp1 x ep4": Case(ETP1, "noisy"),
}
EIGHT = {"tp4, etp2 x ep2 x edp2": Case(FOLDED, "noisy", accumulation=2, checkpointing="communication-aware")}
CASES = FOUR | EIGHT
MIXTRAL = Case(EP4, "mixtral")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a rank has after a case.

    Attributes:
        bounded: trained within a bound that is enough.
        unbounded: the same without one.
        rerun: the parameters after training in which it was not always enough, and how often; by step, and by
            micro-batch if there are several.
    """

    bounded: Trained
    unbounded: Trained
    rerun: list[tuple[Parts, int]]


class Reruns:
    """Runs within a bound, which is not enough every second time, and again without where it was not.

    Args:
        keep_gradients: of what was accumulated before.
    """

    def __init__(self, model: Any, *, keep_gradients: bool):
        self.model, self.keep_gradients = model, keep_gradients
        self.num_runs = self.num_reruns = 0

    def __call__(self, run: Run) -> float:
        bound = 1.0 if self.num_runs % 2 else ALWAYS_ENOUGH
        self.num_runs += 1
        snapshot = StepSnapshot.take(self.model, keep_gradients=self.keep_gradients)
        with bounded_expert_load(self.model, bound) as overflow:
            loss = run()
            is_incomplete = overflow.any_rank()
        if is_incomplete:
            self.num_reruns += 1
            snapshot.restore()
            loss = run()
        return loss


def run_case(folder: str, case: Case) -> Found:
    # which keeps the order of an expert's rows
    model, plugin = load_sharded(f"{folder}/{case.model}", case, experts_implementation="zcode_grouped")
    initial = [local_of(parameter)[0].detach().clone() for parameter in model.parameters()]

    def again(
        run_step: Callable[[Run], float] = run_once, run_micro_batch: Callable[[Run], float] = run_once
    ) -> Trained:
        put_back(model, initial)
        return train(model, plugin, case, run_step, run_micro_batch)

    found = Found(again(functools.partial(run_within_enough, model)), again(), [])
    steps = Reruns(model, keep_gradients=False)
    found.rerun.append((again(steps).parameters, steps.num_reruns))
    if case.accumulation > 1:
        micro_batches = Reruns(model, keep_gradients=True)
        found.rerun.append((again(run_once, micro_batches).parameters, micro_batches.num_reruns))
    return found


def run_within_enough(model: Any, run: Run) -> float:
    with bounded_expert_load(model, ALWAYS_ENOUGH) as overflow:
        loss = run()
        assert not overflow.any_rank()
    return loss


def train_mixtral(folder: str) -> Trained:
    """Checkpointed, with all collectives kept."""
    model, plugin = load_sharded(f"{folder}/mixtral", MIXTRAL)
    context_fn = CommunicationAwareContextFn(every_collective=True)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})
    return train(model, plugin, MIXTRAL, functools.partial(run_within_enough, model))


def put_back(model: Any, initial: list[Tensor]) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, FSDPModule):  # an evaluation has gathered its parameters
            module.reshard()
    with torch.no_grad():
        for parameter, local in zip(model.parameters(), initial, strict=True):
            local_of(parameter)[0].copy_(local)
    model.ted_random_state.load_state_dict({"num_forwards": 0, "base_seed": SEED})


def run_cases(folder: str, cases: dict[str, Case]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            results[name] = run_case(folder, case)
        except Exception as error:
            raise RuntimeError(f"case {name!r} failed") from error
    if dist.get_world_size() == 4:
        results["mixtral"] = train_mixtral(folder)
        results["loads"] = {name: loads_of(folder, layout) for name, layout in LOADS.items()}
        results["attempts"] = attempts(folder)
    return results


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"noisy", "mixtral", "top1"})
    found: dict[str, list[Any]] = {}
    for world_size, cases in ((4, FOUR), (8, EIGHT)):
        by_rank = run_distributed_test(run_cases, world_size, str(folder), cases)
        found |= {name: [results[name] for results in by_rank] for name in by_rank[0]}
    return folder, found


@pytest.mark.parametrize("name", CASES)
def test_a_bound_that_is_enough_changes_nothing(launched: tuple[Path, dict[str, list[Found]]], name: str) -> None:
    folder, results = launched
    by_rank = results[name]
    assert_as_one_process(folder, CASES[name], [found.bounded for found in by_rank])
    for found in by_rank:
        assert (found.bounded.losses, found.bounded.norms) == (found.unbounded.losses, found.unbounded.norms)
        assert_equal(found.bounded.gradients, found.unbounded.gradients)
        assert_equal(found.bounded.parameters, found.unbounded.parameters)


def test_other_models(launched: tuple[Path, dict[str, list[Any]]]) -> None:
    assert_as_one_process(launched[0], MIXTRAL, launched[1]["mixtral"])


@pytest.mark.parametrize("name", CASES)
def test_steps_that_overflow_are_run_again(launched: tuple[Path, dict[str, list[Found]]], name: str) -> None:
    for found in launched[1][name]:
        expected_reruns = [1, NUM_STEPS * CASES[name].accumulation // 2]  # every second
        for (parameters, num_reruns), expected in zip(found.rerun, expected_reruns, strict=False):
            assert num_reruns == expected
            assert_equal(parameters, found.unbounded.parameters)


def assert_equal(found: Parts, expected: Parts) -> None:
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        assert all(torch.equal(part[1], other[1]) for part, other in zip(found[name], parts, strict=True)), name


LOADS = {
    "ep4": EP4,
    "tp2 x ep2": TP2_EP2,
    "tp2 x ep2, all sent": TP2_EP2 | ALL_SENT,
    "tp2, etp1 x ep4": ETP1,
    "tp4, etp2 x ep2": FOLDED,
    "tp4": {"tensor_parallel_size": 4},
}
NUM_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Load:
    """Of a layer with one expert per token.

    Attributes:
        peak, any_rank: of the default bound.
        output: of this rank.
        expected: the same without a bound.
        reads_sizes: before, within the bound and behind it.
    """

    peak: float
    any_rank: bool
    output: Tensor
    expected: Tensor
    reads_sizes: list[bool]


def loads_of(folder: str, layout: dict[str, Any]) -> list[Load]:
    """With equally popular experts on all ranks, and with one expert for all tokens of the last batch."""
    plugin = TedPlugin(**layout)
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model: Any = load(f"{folder}/top1", distributed_config=plugin.distributed_config)
    experts = model.model.encoder.layers[1].ffn.experts
    is_last = dist.get_rank() // plugin.tp_size == plugin.dp_shard_size - 1
    hidden = torch.randn(NUM_TOKENS, 32, generator=torch.Generator().manual_seed(0))
    even = torch.arange(NUM_TOKENS) % 4
    found = []
    for ids in (even, torch.full_like(even, 2) if is_last else even):
        inputs = hidden, ids.unsqueeze(1), torch.ones(NUM_TOKENS, 1)
        reading = [reads_sizes(model)]
        with bounded_expert_load(model) as overflow:
            output = experts(*inputs)
            peak, any_rank = overflow.peak(), overflow.any_rank()
            reading.append(reads_sizes(model))
        reading.append(reads_sizes(model))
        found.append(Load(float(peak), bool(any_rank), output.detach(), experts(*inputs).detach(), reading))
    return found


@pytest.mark.parametrize("name", LOADS)
def test_all_ranks_know_that_one_had_no_rows(launched: tuple[Path, dict[str, list[Any]]], name: str) -> None:
    tp, ep = LOADS[name].get("tensor_parallel_size", 1), LOADS[name].get("expert_parallel_size", 1)
    num_tokens = NUM_TOKENS // (1 if name.endswith("all sent") else tp)  # those that a rank sends
    max_rows = math.ceil(1.5 * num_tokens / ep)
    for rank, by_layout in enumerate(launched[1]["loads"]):
        even, uneven = by_layout[name]
        assert even.reads_sizes == uneven.reads_sizes == [ep > 1, False, ep > 1]
        assert torch.equal(even.output, even.expected) and not even.any_rank
        if ep == 1:  # no token goes anywhere
            assert (uneven.peak, uneven.any_rank) == (0.0, False)
            continue
        assert even.peak == pytest.approx(num_tokens / ep / max_rows)
        assert uneven.peak == pytest.approx(num_tokens / max_rows) and uneven.any_rank
        is_sent = torch.arange(NUM_TOKENS) % num_tokens < (max_rows if rank // tp == 4 // tp - 1 else NUM_TOKENS)
        expected = uneven.expected.masked_fill(~is_sent.unsqueeze(1), 0.0)
        torch.testing.assert_close(uneven.output, expected, rtol=1e-5, atol=1e-6)
        assert uneven.expected[~is_sent].all()


def attempts(folder: str) -> tuple[dict[str, str], list[Tensor]]:
    """What is refused; and what is dropped in the activations, and drawn behind them, while a graph is captured."""
    plugin = TedPlugin(**ETP1)
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    options: dict[str, Any] = {"experts_implementation": "eager", "activation_function": "sigmoid"}
    model: Any = load(f"{folder}/top1", distributed_config=plugin.distributed_config, **options).train()
    experts = model.model.encoder.layers[1].ffn.experts
    experts.act_fn.dropout = 0.5
    drawn: list[Tensor] = []
    experts.act_fn.register_forward_hook(lambda module, args, out: drawn.append((out != 0).flatten()))

    def run(num_tokens: int) -> None:
        experts(torch.ones(num_tokens, 32), torch.arange(num_tokens).unsqueeze(1) % 4, torch.ones(num_tokens, 1))

    torch.manual_seed(0)
    with mock.patch.object(expert_parallel, "is_capturing", return_value=True), bounded_expert_load(model):
        run(NUM_TOKENS)
    drawn.append(torch.rand(4))
    refused = {}
    with bounded_expert_load(model):
        with pytest.raises(ValueError) as error, bounded_expert_load(model):
            pass
        refused["nested"] = str(error.value)
        with pytest.raises(RuntimeError) as error:
            run(NUM_TOKENS + 8 * (dist.get_rank() // 2))
        refused["other shapes"] = str(error.value)
    return refused, drawn


def test_what_is_refused(launched: tuple[Path, dict[str, list[Any]]]) -> None:
    for refused, _ in launched[1]["attempts"]:
        assert "bounded_expert_load inside bounded_expert_load" in refused["nested"]
        assert "needs batches of the same shape on all data-parallel ranks" in refused["other shapes"]


def test_experts_of_another_implementation_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].is_spread_over_ranks = True
    for attempt in (lambda: bounded_expert_load(model).__enter__(), lambda: reads_sizes(model)):
        with pytest.raises(ValueError, match="Linear gets its tokens from another ep_implementation than 'ted'"):
            attempt()


def test_ranks_draw_the_same_while_a_graph_is_captured(launched: tuple[Path, dict[str, list[Any]]]) -> None:
    """As seeds cannot change there; else those with other tokens draw other numbers, and as many only by chance."""
    (_, drawn), *others = launched[1]["attempts"]
    assert len(drawn) > 1
    for _, found in others:
        assert all(map(torch.equal, found, drawn))
