"""Experts that go to ranks with few tokens: the numbers of a plain loop, of one process, and what is sent for them."""

import itertools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ted_cases import (
    Case,
    Log,
    assert_as_a_loop_over_all_experts,
    assert_as_one_process,
    count_collectives,
    gradient_of,
    in_new_groups,
    log_of,
    messages_of,
    parts_of,
    run_cases,
    write_models,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_moe_ted import CudaGraphSeq2SeqTrainingArguments, TedPlugin, TedSeq2SeqTrainer, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.bounded_exchange import bounded_expert_load
from hf_moe_ted.testing import run_distributed_test

NUM_EXPERTS, WIDTH, FFN, FLOAT, INT64 = 4, 32, 64, 4, 8
MOVES = {"least_loaded_experts": True, "least_loaded_bound": 1.0, "least_loaded_min_tokens": 1}
EP4 = {"expert_parallel_size": 4} | MOVES
TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2} | MOVES
ETP1_EP4 = {"tensor_parallel_size": 4, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1} | MOVES
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep4": EP4,
    "ep2 x edp2": {"expert_parallel_size": 2} | MOVES,
    "tp2 x ep2": TP2_EP2,
    "tp2 x ep2, all sent": TP2_EP2 | {"duplicate_token_dropping": False},
    "tp4, etp1 x ep4": ETP1_EP4,
}
# the tokens of each data-parallel rank, and of each token the experts that may be chosen; 4 is none
INPUTS: dict[str, tuple[list[int], list[int]]] = {
    "many": ([37, 20, 5, 40], [0, 1, 2, 3, 4]),
    "one expert": ([10, 10, 10, 10], [2]),
    "two experts of one rank of two": ([21, 9, 1, 30], [2, 2, 2, 3]),
    "most on one": ([19, 0, 24, 11], [1, 1, 1, 1, 1, 0, 3]),
    "no expert": ([6, 6, 6, 6], [4]),
    "no tokens": ([0, 0, 0, 0], [0]),
}
CHECKPOINTING = (None, "full", "communication-aware")
CASES = [(layout, inputs, "grouped_mm") for layout in LAYOUTS for inputs in INPUTS]
CASES += [("tp2 x ep2", "most on one", name) for name in ("eager", "batched_mm", "zcode_grouped", "zcode_cpu")]


def inputs_of(name: str, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, expert ids of two slots per token, and weights."""
    sizes, experts = INPUTS[name]
    generator = torch.Generator().manual_seed(batch)
    hidden = torch.randn(sizes[batch], WIDTH, generator=generator)
    ids = torch.tensor(experts)[torch.randint(len(experts), (sizes[batch], 2), generator=generator)]
    weights = torch.rand(sizes[batch], 2, generator=generator) * (ids < NUM_EXPERTS)
    return hidden.requires_grad_(), ids, weights.requires_grad_()


# whole models, three steps and an evaluation each
TRAINED = {
    "ep4, a rank without tokens": Case(EP4, model="skewed2", data="idle", checkpointing="communication-aware"),
    "ep2 x edp2, zero 3, full checkpointing": Case(
        {"expert_parallel_size": 2, "zero_stage": 3} | MOVES, model="skewed", checkpointing="full"
    ),
    "ep2 x edp2, offload, accumulation": Case(
        {"expert_parallel_size": 2, "offload": "cpu"} | MOVES, model="skewed", accumulation=2
    ),
    "tp2 x ep2, zero 2, uneven": Case(
        TP2_EP2 | {"zero_stage": 2}, model="skewed2", data="uneven", checkpointing="communication-aware"
    ),
    "ep4, tokens are dropped": Case(EP4, model="dropping", accumulation=2),
    "ep4, mixtral": Case(EP4, model="mixtral", checkpointing="full"),
}


def layer_of(folder: str, **options: Any) -> tuple[Any, int]:
    """Experts of a layer, and the data-parallel rank."""
    plugin = TedPlugin(**options)
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model: Any = load(f"{folder}/top2", distributed_config=plugin.distributed_config)
    return model.model.encoder.layers[1].ffn.experts, dist.get_rank() // plugin.tp_size


def run_layers(folder: str) -> dict[Any, Any]:
    """Output, gradients of hidden states and weights, and this rank's parts of those of the parameters."""
    results: dict[Any, Any] = {}
    for layout, options in in_new_groups(LAYOUTS.items()):
        experts, batch = layer_of(folder, **options)
        for inputs, implementation in [case[1:] for case in CASES if case[0] == layout]:
            experts.config._experts_implementation = implementation
            experts.zero_grad()
            results[layout, inputs, implementation] = run_layer(experts, batch, inputs)
        with torch.no_grad():  # the last one again; FSDP keeps parameters gathered behind it
            assert torch.equal(experts(*inputs_of(inputs, batch)), results[layout, inputs, implementation][0])
    return results


def run_layer(experts: Any, batch: int, inputs: str) -> tuple[Any, ...]:
    hidden, ids, weights = inputs_of(inputs, batch)
    output = experts(hidden, ids, weights)
    output.backward(gradient_of(output, batch))
    gradients = parts_of({name: p.grad for name, p in experts.named_parameters()})
    return output.detach(), hidden.grad, weights.grad, gradients


def run_within_bound(folder: str) -> dict[str, bool]:
    """Whether all numbers are those of plain expert parallelism, to the bit, where no load is over the bound."""
    found = {}
    for name in ("ep4", "tp2 x ep2"):
        plain, batch = layer_of(folder, **LAYOUTS[name] | {"least_loaded_experts": False})
        moving, _ = layer_of(folder, **LAYOUTS[name] | {"least_loaded_bound": 4.0})
        (*expected, gradients), (*outputs, others) = (run_layer(e, batch, "most on one") for e in (plain, moving))
        pairs = [(part, other) for key in gradients for part, other in zip(gradients[key], others[key], strict=True)]
        found[name] = all(map(torch.equal, expected, outputs)) and all(
            index == same_index and torch.equal(local, same) for (index, local), (same_index, same) in pairs
        )
    return found


def run_frozen(folder: str) -> dict[str, bool]:
    """Whether gradients are as ever where experts, or what is below them, get none."""
    experts, batch = layer_of(folder, **EP4)
    output, of_hidden, _, gradients = run_layer(experts, batch, "most on one")
    experts.zero_grad()
    hidden, ids, weights = inputs_of("most on one", batch)
    experts(hidden.detach(), ids, weights.detach()).backward(gradient_of(output, batch))
    again = parts_of({name: p.grad for name, p in experts.named_parameters()})
    same = all(torch.equal(gradients[name][0][1], again[name][0][1]) for name in gradients)
    experts.requires_grad_(False).zero_grad()
    experts(hidden, ids, weights).backward(gradient_of(output, batch))
    assert hidden.grad is not None
    return {"experts only": same, "tokens only": torch.equal(hidden.grad, of_hidden)}


def masks_of(folder: str) -> tuple[Tensor, Tensor]:
    """Which activations of own experts and of guests were dropped, in forward and as it is recomputed."""
    plugin = TedPlugin(**TP2_EP2)
    model = ZCodeM3ForConditionalGeneration.from_pretrained(
        f"{folder}/top2",
        distributed_config=plugin.distributed_config,
        experts_implementation="eager",
        activation_function="sigmoid",
    ).train()
    experts: Any = model.model.encoder.layers[1].ffn.experts
    experts.act_fn.dropout = 0.5
    masks: list[Tensor] = []
    experts.act_fn.register_forward_hook(lambda module, args, out: masks.append((out != 0).flatten()))
    output = checkpoint(experts, *inputs_of("one expert", dist.get_rank() // plugin.tp_size), use_reentrant=False)
    output.sum().backward()
    half = len(masks) // 2
    return torch.cat(masks[:half]), torch.cat(masks[half:])


def count_layers(folder: str) -> dict[Any, tuple[Log, Log]]:
    results = {}
    for name, moves in in_new_groups(itertools.product(("ep4", "tp2 x ep2"), (True, False))):
        experts, batch = layer_of(folder, **LAYOUTS[name] | {"least_loaded_experts": moves})
        results[name, moves] = count_collectives(lambda e=experts, b=batch: e(*inputs_of("one expert", b)))
    return results


def run_model(folder: str, checkpointing: str | None) -> tuple[tuple[Log, Log], list[list[int]]]:
    """Collectives of a step, and what is generated."""
    plugin = TedPlugin(**EP4, communication_aware_checkpointing=checkpointing != "full")
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model: Any = load(f"{folder}/skewed2", distributed_config=plugin.distributed_config).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable(plugin.activation_checkpointing_kwargs)
    ids = torch.randint(5, 96, (2, 7), generator=torch.Generator().manual_seed(dist.get_rank()))
    model(input_ids=ids, labels=ids).loss.backward()
    log = count_collectives(lambda: model(input_ids=ids, labels=ids).loss)
    return log, model.eval().generate(ids, max_new_tokens=5).tolist() if checkpointing is None else []


def refused(folder: str) -> dict[str, str]:
    experts, _ = layer_of(folder, **EP4)
    plugin = TedPlugin(**EP4)
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model = load(f"{folder}/top2", distributed_config=plugin.distributed_config)

    def train_with_graphs() -> None:
        args = CudaGraphSeq2SeqTrainingArguments(
            tempfile.mkdtemp(), parallelism_config=plugin, cuda_graphs=True, use_cpu=True, report_to=[]
        )
        TedSeq2SeqTrainer(model, args, optimizer_cls_and_kwargs=plugin.tiled_adamw())

    def enter_bound() -> None:
        with bounded_expert_load(experts):
            pass

    return messages_of(
        {
            "bound": enter_bound,
            "graphs": train_with_graphs,
            "chunks": lambda: TedPlugin(**EP4, overlap_chunks=2),
            "padding": lambda: TedPlugin(**EP4, pad_expert_input_to_capacity=True),
            "load": lambda: TedPlugin(**EP4 | {"least_loaded_bound": 0.5}),
            "tokens": lambda: TedPlugin(**EP4 | {"least_loaded_min_tokens": 0}),
        }
    )


def run_all(folder: str) -> dict[Any, Any]:
    return {
        **run_layers(folder),
        "within the bound": run_within_bound(folder),
        "frozen": run_frozen(folder),
        "masks": masks_of(folder),
        "counts": count_layers(folder),
        "models": {checkpointing: run_model(folder, checkpointing) for checkpointing in in_new_groups(CHECKPOINTING)},
        "refused": refused(folder),
        "trained": run_cases(folder, TRAINED),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"top2", *(case.model for case in TRAINED.values())})
    return folder


@pytest.fixture(scope="module")
def by_rank(folder: Path) -> list[dict[Any, Any]]:
    return run_distributed_test(run_all, 4, str(folder))


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_as_a_loop_over_all_experts(folder: Path, by_rank: list[Any], case: tuple[str, str, str]) -> None:
    tensor_parallel_size = LAYOUTS[case[0]].get("tensor_parallel_size", 1)
    assert_as_a_loop_over_all_experts(
        folder, [results[case] for results in by_rank], tensor_parallel_size, lambda batch: inputs_of(case[1], batch)
    )


@pytest.mark.parametrize("name", TRAINED)
def test_training_as_one_process(folder: Path, by_rank: list[Any], name: str) -> None:
    assert_as_one_process(folder, TRAINED[name], [results["trained"][name] for results in by_rank])


@pytest.mark.parametrize("name", ["ep4", "tp2 x ep2"])
def test_no_bit_changes_within_the_bound(by_rank: list[Any], name: str) -> None:
    assert all(results["within the bound"][name] for results in by_rank)


@pytest.mark.parametrize("trained", ["experts only", "tokens only"])
def test_frozen_parts(by_rank: list[Any], trained: str) -> None:
    assert all(results["frozen"][trained] for results in by_rank)


def test_ranks_that_split_an_expert_drop_the_same_activations(by_rank: list[Any]) -> None:
    masks = [results["masks"] for results in by_rank]
    for rank, (mask, again) in enumerate(masks):
        assert mask.numel() and torch.equal(mask, again)
        assert torch.equal(mask, masks[rank // 2 * 2][0])


ROW = WIDTH * FLOAT


def expert_bytes(etp: int) -> int:
    """Of the parameters of one expert, of which the second bias is not split."""
    return (2 * FFN * WIDTH + FFN) * FLOAT // etp + WIDTH * FLOAT


def test_bytes_of_one_expert_on_four_ranks(by_rank: list[Any]) -> None:
    """Each rank has 20 slots, all of expert 2; with three copies of it each rank computes those that it has."""
    for rank, results in enumerate(by_rank):
        sent, helps = (3, 0) if rank == 2 else (0, 1)
        rows, loads = [20 * ROW] * 2, NUM_EXPERTS * INT64
        forward = log_of(all_gather_into_tensor=[loads], all_to_all_single=[*rows, sent * expert_bytes(1)])
        backward = log_of(all_to_all_single=[*rows, helps * expert_bytes(1)])
        assert results["counts"]["ep4", True] == (forward, backward)
        # a plain rank gets all 80 rows or none
        received = 80 * ROW if rank == 2 else 0
        rows = [20 * ROW, received]
        assert results["counts"]["ep4", False] == (
            log_of(all_to_all_single=[loads, *rows]),
            log_of(all_to_all_single=rows),
        )


def test_bytes_of_one_expert_of_two_slices(by_rank: list[Any]) -> None:
    """Each rank has half of the 20 slots of its group, and gets them back; those that split an expert gather theirs."""
    share, loads = 10 * ROW, NUM_EXPERTS * INT64
    joined = 5 * ROW, 5 * 2 * FLOAT  # half of the tokens, and of their weights
    for rank, results in enumerate(by_rank):
        sent, helps = (1, 0) if rank >= 2 else (0, 1)
        inside: dict[str, list[int]] = {"reduce_scatter_tensor": [2 * share]}
        forward = log_of(
            all_gather_into_tensor=[loads, 2 * loads, share, joined[0]],
            all_to_all_single=[share, share, sent * expert_bytes(2)],
            **inside,
        )
        backward = log_of(
            all_gather_into_tensor=[share, *joined],
            all_to_all_single=[share, share, helps * expert_bytes(2)],
            **inside,
        )
        assert results["counts"]["tp2 x ep2", True] == (forward, backward)


def test_checkpointing(by_rank: list[Any]) -> None:
    """The communication-aware kind sends no expert twice, the full one runs all of forward again."""
    for rank, results in enumerate(by_rank):
        forward, backward = results["models"][None][0]
        largest = max(num_bytes for name, num_bytes in forward if name.endswith("all_to_all_single"))
        assert (largest >= expert_bytes(1)) == (rank in (1, 3))  # those of the experts that all tokens want
        assert results["models"]["communication-aware"][0] == (forward, backward)
        functional = Counter({key: n for key, n in forward.items() if key[0].startswith("_c10d_functional")})
        assert results["models"]["full"][0] == (forward, backward + functional)


def test_generation_as_one_process(folder: Path, by_rank: list[Any]) -> None:
    model = ZCodeM3ForConditionalGeneration.from_pretrained(folder / "skewed2").eval()
    for rank, results in enumerate(by_rank):
        ids = torch.randint(5, 96, (2, 7), generator=torch.Generator().manual_seed(rank))
        assert results["models"][None][1] == model.generate(ids, max_new_tokens=5).tolist()


REFUSED = {
    "bound": "least_loaded_experts (True) does not work with bounded_expert_load",
    "graphs": "least_loaded_experts (True) does not work with cuda_graphs (True)",
    "chunks": "overlap_chunks (2) must be 1 with least_loaded_experts",
    "padding": "pad_expert_input_to_capacity (True) does not work with least_loaded_experts (True)",
    "load": "least_loaded_bound (0.5) must be a number of at least 1",
    "tokens": "least_loaded_min_tokens (0) must be a whole number of at least 1",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_it(by_rank: list[Any], name: str) -> None:
    assert all(REFUSED[name] in results["refused"][name] for results in by_rank)
