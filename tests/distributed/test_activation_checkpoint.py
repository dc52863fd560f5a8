"""Communication-aware checkpointing changes nothing but what is kept. Its collectives: test_collective_bytes.py."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ted_cases import CONFIGS, SEED, CollectiveCounter, parts_of, write_models
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Seq2SeqTrainingArguments

from hf_moe_ted import TedPlugin, ZCodeM3ForConditionalGeneration, communication_aware_context_fn
from hf_moe_ted.distributed.activation_checkpoint import CommunicationAwareContextFn
from hf_moe_ted.distributed.collectives import sum_over_group
from hf_moe_ted.testing import run_distributed_test

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 x ep2": {"tensor_parallel_size": 2, "expert_parallel_size": 2},
    "ep4, overlap": {"expert_parallel_size": 4, "overlap_chunks": 2, "zero_stage": 3},
}


def gradients(folder: str, layout: dict[str, Any], checkpointing: str | None) -> dict[str, Tensor]:
    plugin = TedPlugin(**layout, communication_aware_checkpointing=checkpointing == "communication-aware")
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model: Any = load(
        f"{folder}/random", distributed_config=plugin.distributed_config, attention_dropout=0.1, activation_dropout=0.1
    )
    model.train().ted_random_state.load_state_dict({"num_forwards": 0, "base_seed": SEED})
    if checkpointing is not None:
        model.activation_checkpointing_enable(plugin.activation_checkpointing_kwargs)
    ids = torch.randint(5, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parts[0][1] for name, parts in parts_of({k: p.grad for k, p in model.named_parameters()}).items()}


def all_gradients(folder: str) -> dict[tuple[str, str | None], dict[str, Tensor]]:
    modes = (None, "full", "communication-aware")
    return {(name, mode): gradients(folder, layout, mode) for name, layout in LAYOUTS.items() for mode in modes}


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str | None], dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"random"})
    return run_distributed_test(all_gradients, 4, str(folder))


@pytest.mark.parametrize("mode", ["full", "communication-aware"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_the_same_bit_for_bit(by_rank: list, layout: str, mode: str) -> None:
    """With dropout, jitter and Random Token Selection, whose numbers are drawn again."""
    for results in by_rank:
        assert results[layout, mode].keys() == results[layout, None].keys()
        for name, gradient in results[layout, None].items():
            assert torch.equal(results[layout, mode][name], gradient), name


def test_one_process() -> None:
    torch.manual_seed(0)
    model = ZCodeM3ForConditionalGeneration(CONFIGS["random"]()).train()
    ids = torch.randint(5, 96, (2, 7))
    found = []
    for options in (None, {"context_fn": communication_aware_context_fn}):
        if options is not None:
            model.activation_checkpointing_enable(options)
        torch.manual_seed(1)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


class Noted(torch.autograd.Function):
    """Twice its input; keeps the name in a list."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, calls: list[str]) -> Tensor:
        calls.append(name)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * 2, None, None


class ForeignSum(torch.autograd.Function):
    """What others than `collectives` might run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x, "sum", dist.group.WORLD.group_name))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def run_layer(every_collective: bool) -> tuple[list[str], int]:
    """A layer with two collectives: what is computed in it, and the collectives in backward."""
    calls: list[str] = []

    def layer(x: Tensor) -> Tensor:
        x = sum_over_group(Noted.apply(x, "before", calls), dist.group.WORLD)
        return Noted.apply(ForeignSum.apply(x), "behind", calls).sin()

    x = torch.ones(3, requires_grad=True)
    context_fn = CommunicationAwareContextFn(every_collective)
    output = checkpoint(layer, x, use_reentrant=False, context_fn=context_fn)
    with CollectiveCounter() as counter:
        output.sum().backward()
    # on two ranks, twice the input is summed to 4, then to 8, and doubled
    torch.testing.assert_close(x.grad, torch.full((3,), 4 * math.cos(16.0)))
    return calls, counter.log.total()


def run_layers() -> list[tuple[list[str], int]]:
    return [run_layer(every_collective) for every_collective in (False, True)]


def test_all_but_collectives_is_computed_again() -> None:
    for own, every in run_distributed_test(run_layers, 2):
        for (calls, num_collectives), num_repeated in ((own, 1), (every, 0)):
            assert calls == ["before", "behind"] * 2
            assert num_collectives == num_repeated


def test_what_the_plugin_gives() -> None:
    aware, full = (TedPlugin(communication_aware_checkpointing=value) for value in (True, False))
    assert aware.activation_checkpointing_kwargs == {
        "use_reentrant": False,
        "context_fn": communication_aware_context_fn,
    }
    assert full.activation_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("every_collective", [False, True])
def test_arguments_as_json_pickled_and_copied(tmp_path: Path, every_collective: bool) -> None:
    """As TensorBoard, checkpoints and sweeps have them."""
    kwargs = {"use_reentrant": False, "context_fn": CommunicationAwareContextFn(every_collective)}
    args = Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, parallelism_config=TedPlugin(), activation_checkpointing_kwargs=kwargs
    )
    assert '"context_fn": "communication_aware_context_fn' in args.to_json_string()
    assert isinstance(args.to_sanitized_dict(), dict)
    for again in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        context_fn = again.activation_checkpointing_kwargs["context_fn"]
        assert context_fn.every_collective is every_collective
        first, second = context_fn()
        with first, second:
            pass
