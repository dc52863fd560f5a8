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
    CONFIGS,
    NUM_STEPS,
    SEED,
    Case,
    Parts,
    Run,
    Trained,
    assert_as_one_process,
    in_new_groups,
    load_sharded,
    run_once,
    run_within_bound,
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
NUM_TOKENS = 16  # of a layer alone
EP4 = {"expert_parallel_size": 4}
TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
ALL_SENT = {"duplicate_token_dropping": False}
ETP1 = {"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1}
CASES = {
    "ep4, accumulation": Case(EP4, "noisy", accumulation=2),
    "ep4, zero 2, overlap": Case(EP4 | {"zero_stage": 2, "overlap_chunks": 2}, "noisy", accumulation=2),
    "ep2 x edp2, zero 3": Case(
        {"expert_parallel_size": 2, "zero_stage": 3}, "noisy", checkpointing="communication-aware"
    ),
    "tp2 x ep2, accumulation": Case(TP2_EP2, "noisy", accumulation=2, checkpointing="communication-aware"),
    "tp2 x ep2, all sent": Case(TP2_EP2 | ALL_SENT, "noisy", checkpointing="full"),
    "tp2, etp1 x ep4": Case(ETP1, "noisy"),
}
MIXTRAL = Case(EP4, "mixtral")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a rank has after a case.

    Attributes:
        bounded: trained within a bound that is enough.
        unbounded: the same without one.
        rerun: the parameters after training in which it was not always enough, and how often; by step, and by
            micro-batch if there are several.
        loads: of one layer, with equally popular experts, and without on the last ranks.
    """

    bounded: Trained
    unbounded: Trained
    rerun: list[tuple[Parts, int]]
    loads: tuple["Load", "Load"]


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


def run_all(folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {"mixtral": train_mixtral(folder)}
    for name, case in in_new_groups(CASES.items()):
        try:
            # which keeps the order of an expert's rows
            model, plugin = load_sharded(f"{folder}/noisy", case, experts_implementation="zcode_grouped")
            results[name] = run_case(model, plugin, case)
        except Exception as error:
            raise RuntimeError(f"case {name!r} failed") from error
    results["drawn"] = draw_as_captured(model)
    results["refused"] = refused_by(model)
    return results


def train_mixtral(folder: str) -> Trained:
    """Checkpointed, with all collectives kept."""
    model, plugin = load_sharded(f"{folder}/mixtral", MIXTRAL)
    context_fn = CommunicationAwareContextFn(every_collective=True)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})
    return train(model, plugin, MIXTRAL, functools.partial(run_within_bound, model, ALWAYS_ENOUGH))


def run_case(model: Any, plugin: TedPlugin, case: Case) -> Found:
    initial = [local_of(parameter)[0].detach().clone() for parameter in model.parameters()]

    def again(
        run_step: Callable[[Run], float] = run_once, run_micro_batch: Callable[[Run], float] = run_once
    ) -> Trained:
        put_back(model, initial)
        return train(model, plugin, case, run_step, run_micro_batch)

    within_enough = functools.partial(run_within_bound, model, ALWAYS_ENOUGH)
    found = Found(again(within_enough), again(), [], loads_of(model, plugin))
    steps = Reruns(model, keep_gradients=False)
    found.rerun.append((again(steps).parameters, steps.num_reruns))
    if case.accumulation > 1:
        micro_batches = Reruns(model, keep_gradients=True)
        found.rerun.append((again(run_once, micro_batches).parameters, micro_batches.num_reruns))
    return found


def put_back(model: Any, initial: list[Tensor]) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, FSDPModule):  # an evaluation has gathered its parameters
            module.reshard()
    with torch.no_grad():
        for parameter, local in zip(model.parameters(), initial, strict=True):
            local_of(parameter)[0].copy_(local)
    model.ted_random_state.load_state_dict({"num_forwards": 0, "base_seed": SEED})


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"noisy", "mixtral"})
    return folder, run_distributed_test(run_all, 4, str(folder))


@pytest.mark.parametrize("name", CASES)
def test_a_bound_that_is_enough_changes_nothing(launched: tuple[Path, list[dict[str, Found]]], name: str) -> None:
    folder, by_rank = launched
    assert_as_one_process(folder, CASES[name], [results[name].bounded for results in by_rank])
    for results in by_rank:
        bounded, unbounded = results[name].bounded, results[name].unbounded
        assert (bounded.losses, bounded.norms) == (unbounded.losses, unbounded.norms)
        assert_equal(bounded.gradients, unbounded.gradients)
        assert_equal(bounded.parameters, unbounded.parameters)


def test_other_models(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, by_rank = launched
    assert_as_one_process(folder, MIXTRAL, [results["mixtral"] for results in by_rank])


@pytest.mark.parametrize("name", CASES)
def test_steps_that_overflow_are_run_again(launched: tuple[Path, list[dict[str, Found]]], name: str) -> None:
    for results in launched[1]:
        found, expected_reruns = results[name], [1, NUM_STEPS * CASES[name].accumulation // 2]  # every second
        for (parameters, num_reruns), expected in zip(found.rerun, expected_reruns, strict=False):
            assert num_reruns == expected
            assert_equal(parameters, found.unbounded.parameters)


def assert_equal(found: Parts, expected: Parts) -> None:
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        assert all(torch.equal(part[1], other[1]) for part, other in zip(found[name], parts, strict=True)), name


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


def loads_of(model: Any, plugin: TedPlugin) -> tuple[Load, Load]:
    """With equally popular experts on all ranks, and with one expert for all tokens of the last batch."""
    experts = model.model.encoder.layers[1].ffn.experts
    is_last = dist.get_rank() // plugin.tp_size == plugin.dp_shard_size - 1
    hidden = torch.randn(NUM_TOKENS, 32, generator=torch.Generator().manual_seed(0))
    even = torch.arange(NUM_TOKENS) % 4

    def load(ids: Tensor) -> Load:
        inputs = hidden, ids.unsqueeze(1), torch.ones(NUM_TOKENS, 1)
        reading = [reads_sizes(model)]
        with bounded_expert_load(model) as overflow:
            output = experts(*inputs).detach()
            reading.append(reads_sizes(model))
            peak, any_rank = float(overflow.peak()), bool(overflow.any_rank())
        reading.append(reads_sizes(model))
        return Load(peak, any_rank, output, experts(*inputs).detach(), reading)

    return load(even), load(torch.full_like(even, 2) if is_last else even)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "overlap_chunks" not in case.layout])
def test_all_ranks_know_that_one_had_no_rows(launched: tuple[Path, list[dict[str, Found]]], name: str) -> None:
    layout = CASES[name].layout
    tp, ep = layout.get("tensor_parallel_size", 1), layout["expert_parallel_size"]
    num_tokens = NUM_TOKENS // (1 if name.endswith("all sent") else tp)  # those that a rank sends
    max_rows = math.ceil(1.5 * num_tokens / ep)
    for rank, results in enumerate(launched[1]):
        even, uneven = results[name].loads
        assert even.reads_sizes == uneven.reads_sizes == [True, False, True]
        assert torch.equal(even.output, even.expected) and not even.any_rank
        assert even.peak == pytest.approx(num_tokens / ep / max_rows)
        assert uneven.peak == pytest.approx(num_tokens / max_rows) and uneven.any_rank
        is_sent = torch.arange(NUM_TOKENS) % num_tokens < (max_rows if rank // tp == 4 // tp - 1 else NUM_TOKENS)
        expected = uneven.expected.masked_fill(~is_sent.unsqueeze(1), 0.0)
        torch.testing.assert_close(uneven.output, expected, rtol=1e-5, atol=1e-6)
        assert uneven.expected[~is_sent].any(dim=1).all()


def run_experts(experts: Any, num_tokens: int) -> None:
    ids = torch.arange(num_tokens).unsqueeze(1) % 4
    experts(torch.ones(num_tokens, 32), ids, torch.ones(num_tokens, 1))


class Ones(torch.nn.Module):
    """Of rows that nothing was written to, too: what is 0 behind it was dropped."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.ones_like(hidden)


def draw_as_captured(model: Any) -> list[Tensor]:
    """Which activations are dropped while a graph is captured, and what is drawn behind them."""
    experts = model.train().model.encoder.layers[1].ffn.experts
    experts.act_fn.dropout, experts.act_fn.activation = 0.5, Ones()
    drawn: list[Tensor] = []
    hook = experts.act_fn.register_forward_hook(lambda module, args, out: drawn.append((out != 0).flatten()))
    torch.manual_seed(0)
    with mock.patch.object(expert_parallel, "is_capturing", return_value=True), bounded_expert_load(model):
        run_experts(experts, NUM_TOKENS)
    hook.remove()
    return [*drawn, torch.rand(4)]


def test_ranks_draw_the_same_while_a_graph_is_captured(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    """Seeds cannot change there: ranks with other tokens draw the same numbers, and as many."""
    first, *others = (results["drawn"] for results in launched[1])
    assert len(first) > 1
    for drawn in others:
        assert all(map(torch.equal, drawn, first))


def refused_by(model: Any) -> dict[str, str]:
    refused = {}
    with bounded_expert_load(model):
        with pytest.raises(ValueError) as error, bounded_expert_load(model):
            pass
        refused["nested"] = str(error.value)
        with pytest.raises(RuntimeError) as error:
            run_experts(model.model.encoder.layers[1].ffn.experts, NUM_TOKENS + 8 * (dist.get_rank() // 2))
        refused["other shapes"] = str(error.value)
    return refused


def test_what_is_refused(launched: tuple[Path, list[dict[str, Any]]]) -> None:
    for results in launched[1]:
        assert "bounded_expert_load inside bounded_expert_load" in results["refused"]["nested"]
        assert "needs batches of the same shape on all data-parallel ranks" in results["refused"]["other shapes"]


def test_experts_of_another_implementation_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].is_spread_over_ranks = True
    for attempt in (lambda: bounded_expert_load(model).__enter__(), lambda: reads_sizes(model)):
        with pytest.raises(ValueError, match="Linear has another ep_implementation than 'ted'"):
            attempt()


def test_a_model_without_exchanges_runs_as_ever() -> None:
    model = ZCodeM3ForConditionalGeneration(CONFIGS["top2"]())
    ids = torch.randint(5, 96, (2, 7))
    assert not reads_sizes(model)
    expected = model(input_ids=ids, labels=ids).loss
    with bounded_expert_load(model) as overflow:
        assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
        assert not overflow.any_rank() and overflow.peak() == 0
