"""Ranks that share a batch draw the same random numbers, and others do not, whatever seeds the user sets."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed as accelerate_set_seed
from ted_cases import in_new_groups, write_models
from torch import Tensor
from transformers import set_seed

from hf_moe_ted import TedPlugin, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed import random_state
from hf_moe_ted.testing import run_distributed_test

LAYOUTS = {
    "tp2 x ep2": {"tensor_parallel_size": 2, "expert_parallel_size": 2},
    # the experts of a tensor-parallel group get different numbers of tokens
    "tp2, etp1 x ep4": {"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1},
}
SEEDINGS = ("one seed", "seed of the rank", "seed of the device", "no seed")
CASES = [("tp2 x ep2", how) for how in SEEDINGS] + [("tp2, etp1 x ep4", "seed of the rank")]
NOISE: dict[str, Any] = {
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "capacity_factor": 0.5,
    "min_capacity": 1,
    "router_noise_policy": "jitter",
    "router_jitter_noise": 0.1,
}


def seed(how: str) -> None:
    if how == "one seed":
        set_seed(0)
    elif how == "seed of the rank":
        set_seed(dist.get_rank())
    elif how == "seed of the device":
        accelerate_set_seed(0, device_specific=True)
    else:
        torch.seed()


@dataclass(frozen=True)
class Drawn:
    """What one rank drew.

    Attributes:
        routings: of the two training forwards, the experts of the slots of each sparse layer.
        router_gradients: whole ones, by name.
        is_stream_untouched: whether the user's generator was where it had been, behind each forward.
        samples: of `generate`: two calls, and one after the seed of the second again.
        evaluated: the experts of the slots in evaluation, where second experts are sampled.
    """

    routings: list[list[Tensor]]
    router_gradients: dict[str, Tensor]
    is_stream_untouched: bool
    samples: list[Tensor]
    evaluated: list[Tensor]


def draw(folder: str, cases: list[tuple[str, str]]) -> dict[tuple[str, str], Drawn]:
    Accelerator(cpu=True, parallelism_config=TedPlugin(tensor_parallel_size=2))  # whose set_seed asks for its rank
    return {(layout, how): draw_once(folder, layout, how) for layout, how in in_new_groups(cases)}


def draw_once(folder: str, layout: str, how: str) -> Drawn:
    plugin = TedPlugin(**LAYOUTS[layout])
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model = load(f"{folder}/top1", distributed_config=plugin.distributed_config, **NOISE).train()
    generator = torch.Generator().manual_seed(1)
    batch = {key: torch.randint(5, 96, (6, 9), generator=generator) for key in ("input_ids", "labels")}
    seed(how)
    before = torch.get_rng_state()
    outputs = [model(**batch, output_routings=True) for _ in range(2)]  # the same batch on all ranks
    outputs[0].loss.backward()
    is_untouched = torch.equal(before, torch.get_rng_state())
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if "router" in name}

    model.eval()
    inputs = {"input_ids": batch["input_ids"], "do_sample": True, "max_new_tokens": 8}
    samples = [model.generate(**inputs)]
    for _ in range(2):
        seed(how)
        samples.append(model.generate(**inputs))
    model = load(f"{folder}/top2", distributed_config=plugin.distributed_config, second_expert_policy="sampling").eval()
    with torch.no_grad():
        evaluated = experts_of(model(**batch, output_routings=True))
    return Drawn([experts_of(output) for output in outputs], gradients, is_untouched, samples, evaluated)


def experts_of(output: Any) -> list[Tensor]:
    return [routing.expert_ids for routing in output.encoder_routings + output.decoder_routings]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Drawn]]:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"top1", "top2"})
    return run_distributed_test(draw, 4, str(folder), CASES)


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_a_batch_draw_the_same(drawn: list, case: tuple[str, str]) -> None:
    by_rank = [result[case] for result in drawn]
    for first, second in ((by_rank[0], by_rank[1]), (by_rank[2], by_rank[3])):
        torch.testing.assert_close(first.routings, second.routings, rtol=0, atol=0)
        torch.testing.assert_close(first.router_gradients, second.router_gradients, rtol=0, atol=0)
        torch.testing.assert_close(first.samples, second.samples, rtol=0, atol=0)
        torch.testing.assert_close(first.evaluated, second.evaluated, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_ranks_with_other_batches_draw_others(drawn: list, case: tuple[str, str]) -> None:
    first, second = drawn[0][case], drawn[2][case]
    assert differ(first.routings[0], second.routings[0])
    assert differ(first.samples, second.samples)
    assert differ(first.evaluated, second.evaluated)


@pytest.mark.parametrize("case", CASES)
def test_each_forward_draws_others(drawn: list, case: tuple[str, str]) -> None:
    assert differ(*drawn[0][case].routings)


@pytest.mark.parametrize("case", CASES)
def test_the_users_stream_is_left_alone(drawn: list, case: tuple[str, str]) -> None:
    assert all(result[case].is_stream_untouched for result in drawn)


@pytest.mark.parametrize("case", CASES)
def test_a_seed_repeats_what_is_sampled(drawn: list, case: tuple[str, str]) -> None:
    _, second, again = drawn[0][case].samples
    assert torch.equal(second, again) == (case[1] != "no seed")


def differ(first: list[Tensor], second: list[Tensor]) -> bool:
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_captured_forwards_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state.RandomState(data_parallel_rank=0)
    state.base_seed = 3
    model = torch.nn.Dropout(0.5)
    model.register_forward_pre_hook(state.before_forward, with_kwargs=True)
    model.register_forward_hook(state.after_forward, always_call=True)

    def dropped_twice() -> list[Tensor]:
        torch.manual_seed(0)
        return [model(torch.ones(100)) for _ in range(2)]

    seeded = dropped_twice()
    assert state.num_forwards == 2
    monkeypatch.setattr(random_state, "is_capturing", lambda: True)
    captured = dropped_twice()
    torch.manual_seed(0)
    expected = [torch.nn.functional.dropout(torch.ones(100), 0.5) for _ in range(2)]
    assert all(map(torch.equal, captured, expected)) and not any(map(torch.equal, seeded, captured))
    assert state.num_forwards == 2


def state_after_draws(num_draws: int) -> tuple[Any, ...]:
    set_seed(3)
    for draw in (random.random, np.random.rand, lambda: torch.rand(())):
        for _ in range(num_draws):
            draw()
    return generators()


def generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def save_and_load(folder: str) -> dict[str, tuple[Any, ...]]:
    """The generators of this rank when a state is saved with two data-parallel ranks, and after it is loaded."""
    found = {}
    for name, layout in (("dp2", {"expert_parallel_size": 2}), ("tp2", {"tensor_parallel_size": 2})):
        AcceleratorState._reset_state(reset_partial_state=True)  # else it is the layout of the first one
        plugin = TedPlugin(**layout)
        accelerator = Accelerator(cpu=True, parallelism_config=plugin)
        load = ZCodeM3ForConditionalGeneration.from_pretrained
        model = load(f"{folder}/top1", distributed_config=plugin.distributed_config)
        optimizer_class, options = plugin.tiled_adamw(lr=1e-3)
        accelerator.prepare(model, optimizer_class(model.parameters(), **options))
        if name == "dp2":
            found["saved"] = state_after_draws(1 + dist.get_rank())
            accelerator.save_state(f"{folder}/state")
        state_after_draws(5 + dist.get_rank())
        accelerator.load_state(f"{folder}/state")
        found[name] = generators()
    state_after_draws(1 + dist.get_rank())
    random_state.load_generators(model, {})  # as earlier versions saved it
    found["earlier version"] = generators()
    saved = random_state.saved_random_state(model)["generators"]
    random_state.load_generators(torch.nn.Linear(2, 2), {"generators": [*saved, *saved]})
    assert len(saved) == 1 and generators() == found["earlier version"]
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


def test_accelerator_loads_the_generators_of_the_data_parallel_rank(tmp_path: Path) -> None:
    write_models(tmp_path, {"top1"})
    first, second = run_distributed_test(save_and_load, 2, str(tmp_path))
    assert first["saved"] != second["saved"]
    assert (first["dp2"], second["dp2"]) == (first["saved"], second["saved"])
    assert first["tp2"] == second["tp2"] == first["saved"]
    assert first["earlier version"] == second["earlier version"] == first["saved"]
