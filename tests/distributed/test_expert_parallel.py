"""Experts over ranks against a plain loop over all experts, in outputs and in all gradients."""

import contextlib
import functools
import operator
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ted_cases import assert_as_a_loop_over_all_experts, gradient_of, in_new_groups, parts_of, write_models
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.checkpoint import checkpoint

from hf_moe_ted import TedPlugin, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.bounded_exchange import bounded_expert_load
from hf_moe_ted.distributed.expert_parallel import inner_placement, layout_of_experts
from hf_moe_ted.models.experts import ZCodeM3Experts
from hf_moe_ted.testing import run_distributed_test

NUM_EXPERTS, WIDTH = 4, 32
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep4": {"expert_parallel_size": 4},
    "ep4 in 3 chunks": {"expert_parallel_size": 4, "overlap_chunks": 3},
    "tp4": {"tensor_parallel_size": 4},
    "tp4, etp2 x ep2": {"tensor_parallel_size": 4, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "tp4, etp1 x ep4": {"tensor_parallel_size": 4, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1},
}
LAYOUTS["tp4, etp2 x ep2, all sent"] = LAYOUTS["tp4, etp2 x ep2"] | {"duplicate_token_dropping": False}
LAYOUTS["tp4, etp2 x ep2 in 2 chunks"] = LAYOUTS["tp4, etp2 x ep2"] | {"overlap_chunks": 2}
LAYOUTS |= {
    f"{name}, padded": LAYOUTS[name] | {"pad_expert_input_to_capacity": True}
    for name in ("ep4", "tp4, etp2 x ep2", "tp4, etp1 x ep4", "tp4, etp2 x ep2, all sent")
}
# exchanges within a bound that is always enough: the name of the layout that they must be bit-equal to
BOUNDED = {
    f"{name}, bounded": name
    for name in LAYOUTS
    if "expert_parallel_size" in LAYOUTS[name] and not name.endswith("padded")
}
LAYOUTS |= {name: LAYOUTS[unbounded] for name, unbounded in BOUNDED.items()}
# tokens and, of each, the experts that may be chosen; 4 is none
INPUTS: dict[str, tuple[int, list[int]]] = {
    "many": (37, [0, 1, 2, 3, 4]),
    "one expert": (10, [2]),
    "no expert": (6, [4]),
    "fewer than ranks": (3, [0, 1, 3]),
    "no tokens": (0, [0]),
}
CASES = [(layout, inputs, "grouped_mm") for layout in LAYOUTS if layout not in BOUNDED for inputs in INPUTS]
# which keeps the order of the rows of an expert
CASES += [(layout, inputs, "zcode_grouped") for names in BOUNDED.items() for layout in names for inputs in INPUTS]
CASES += [("tp4, etp2 x ep2", "many", implementation) for implementation in ("eager", "batched_mm")]


def inputs_of(name: str, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, expert ids of two slots per token, and weights; another one for each data-parallel rank."""
    num_tokens, experts = INPUTS[name]
    generator = torch.Generator().manual_seed(batch)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator)
    ids = torch.tensor(experts)[torch.randint(len(experts), (num_tokens, 2), generator=generator)]
    weights = torch.rand(num_tokens, 2, generator=generator) * (ids < NUM_EXPERTS)
    return hidden.requires_grad_(), ids, weights.requires_grad_()


def layer_of(folder: str, layout: str, implementation: str) -> tuple[Any, int]:
    """Experts of a layer, and the data-parallel rank."""
    plugin = TedPlugin(**LAYOUTS[layout])
    model: Any = ZCodeM3ForConditionalGeneration.from_pretrained(
        f"{folder}/top2",
        distributed_config=plugin.distributed_config,
        experts_implementation=implementation,
        capacity_factor=1.0,
    )
    return model.model.encoder.layers[1].ffn.experts, dist.get_rank() // plugin.tp_size


def run_all(folder: str) -> dict[Any, Any]:
    """Output, gradients of hidden states and weights, and this rank's parts of those of the parameters."""
    results: dict[Any, Any] = {}
    cases_of: dict[tuple[str, str], list[tuple[str, str, str]]] = defaultdict(list)
    for case in CASES:
        cases_of[BOUNDED.get(case[0], case[0]), case[2]].append(case)
    for of_model, cases in in_new_groups(cases_of.items()):
        experts, batch = layer_of(folder, *of_model)
        for case in cases:
            results[case] = run_layer(experts, batch, *case[:2])
    experts, _ = layer_of(folder, "ep4, padded", "grouped_mm")
    experts.max_tokens_per_expert = lambda num_tokens: 20 + dist.get_rank() % 2
    with pytest.raises(RuntimeError) as error:
        experts(*inputs_of("one expert", 0))
    results["other capacities"] = str(error.value)
    return results


def run_layer(experts: Any, batch: int, layout: str, inputs: str) -> tuple[Any, ...]:
    experts.zero_grad()
    hidden, ids, weights = inputs_of(inputs, batch)
    # which only layouts that pad ask for, and under a bound those in which it is less
    experts.max_tokens_per_expert = functools.partial(operator.mul, 8 if layout in BOUNDED else 2)
    bound = bounded_expert_load(experts, 4.0) if layout in BOUNDED else contextlib.nullcontext()
    with bound as overflow:
        output = experts(hidden, ids, weights)
        output.backward(gradient_of(output, batch))
        assert overflow is None or not overflow.any_rank()
    gradients = parts_of({name: p.grad for name, p in experts.named_parameters()})
    return output.detach(), hidden.grad, weights.grad, gradients


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"top2"})
    return folder, run_distributed_test(run_all, 4, str(folder))


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_as_a_loop_over_all_experts(launched: tuple[Path, list], case: tuple[str, str, str]) -> None:
    folder, by_rank = launched
    tensor_parallel_size = LAYOUTS[case[0]].get("tensor_parallel_size", 1)
    assert_as_a_loop_over_all_experts(
        folder, [results[case] for results in by_rank], tensor_parallel_size, lambda batch: inputs_of(case[1], batch)
    )


@pytest.mark.parametrize("layout", BOUNDED)
@pytest.mark.parametrize("inputs", INPUTS)
def test_rows_within_a_bound_change_no_bit(launched: tuple[Path, list], layout: str, inputs: str) -> None:
    for results in launched[1]:
        *bounded, gradients = results[layout, inputs, "zcode_grouped"]
        *unbounded, expected = results[BOUNDED[layout], inputs, "zcode_grouped"]
        assert all(map(torch.equal, bounded, unbounded))
        for name, parts in expected.items():
            assert all(torch.equal(local, part[1]) for (_, local), part in zip(gradients[name], parts, strict=True)), (
                name
            )


def test_other_capacities_on_other_ranks_are_refused(launched: tuple[Path, list]) -> None:
    for results in launched[1]:
        assert "needs batches of the same shape on all data-parallel ranks" in results["other capacities"]


MASKED = [name for name in LAYOUTS if name.startswith("tp4") and "chunks" not in name]


def masks_of(folder: str) -> dict[str, list[Tensor]]:
    """Which activations were dropped, in forward and as it is recomputed in backward; and what is drawn behind."""
    seen: dict[str, list[Tensor]] = {}
    for name in in_new_groups(MASKED):
        plugin = TedPlugin(**LAYOUTS[name])
        model = ZCodeM3ForConditionalGeneration.from_pretrained(
            f"{folder}/top1",
            distributed_config=plugin.distributed_config,
            experts_implementation="eager",
            activation_function="sigmoid",
            capacity_factor=2.0,
        ).train()
        experts: Any = model.model.encoder.layers[1].ffn.experts
        experts.act_fn.dropout = 0.5  # also after the model was made
        masks: list[Tensor] = []
        experts.act_fn.register_forward_hook(lambda module, args, out, to=masks: to.append((out != 0).flatten()))
        torch.manual_seed(0)
        ids = torch.arange(32).remainder(NUM_EXPERTS).unsqueeze(1)  # each rank gets as many rows as the others
        hidden = torch.ones(32, WIDTH, requires_grad=True)
        output = checkpoint(experts, hidden, ids, torch.ones(32, 1), use_reentrant=False)
        behind = torch.rand(4)
        output.sum().backward()
        assert len(masks) % 2 == 0
        half = len(masks) // 2
        seen[name] = [torch.cat(masks[:half]), torch.cat(masks[half:]), behind]
    return seen


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    folder = tmp_path_factory.mktemp("masks")
    write_models(folder, {"top1"})
    return run_distributed_test(masks_of, 4, str(folder))


@pytest.mark.parametrize("layout", MASKED)
def test_masks_agree_where_ranks_have_the_same_tokens_only(masked: list, layout: str) -> None:
    by_rank = [result[layout] for result in masked]
    etp_size = LAYOUTS[layout].get("expert_tensor_parallel_size", 4)
    for rank, (mask, again, behind) in enumerate(by_rank):
        assert mask.numel() and torch.equal(mask, again)
        assert torch.equal(behind, by_rank[0][2])
        for other, (others, _, _) in enumerate(by_rank):
            shares_tokens = rank // etp_size == other // etp_size
            assert torch.equal(mask, others) == shares_tokens, (rank, other)


@pytest.mark.parametrize(
    ("param", "ndim", "is_transposed", "is_concatenated", "placement"),
    [
        ("up_proj", 3, False, False, Shard(1)),
        ("up_proj", 3, True, False, Shard(2)),
        ("up_proj_bias", 2, False, False, Shard(1)),
        ("up_proj_bias", 2, True, False, Shard(1)),
        ("gate_up_proj", 3, False, True, _StridedShard(1, split_factor=2)),
        ("gate_up_proj", 3, True, True, _StridedShard(2, split_factor=2)),
        ("gate_up_proj_bias", 2, True, True, _StridedShard(1, split_factor=2)),
        ("gate_up_proj", 3, False, False, Shard(1)),  # gate and up interleaved
        ("down_proj", 3, False, True, Shard(2)),
        ("down_proj", 3, True, True, Shard(1)),
        ("down_proj_bias", 2, False, True, Replicate()),
    ],
)
def test_inner_placement(param: str, ndim: int, is_transposed: bool, is_concatenated: bool, placement: object) -> None:
    experts = SimpleNamespace(is_transposed=is_transposed, is_concatenated=is_concatenated)
    assert inner_placement(experts, param, ndim) == placement


@pytest.mark.parametrize("experts", [nn.Linear(2, 2), ZCodeM3Experts.__new__(ZCodeM3Experts)])
def test_experts_without_a_layout_are_refused(experts: nn.Module) -> None:
    nn.Module.__init__(experts)
    with pytest.raises(ValueError, match=f"{type(experts).__name__} has no configuration with a TedConfig"):
        layout_of_experts(experts)
