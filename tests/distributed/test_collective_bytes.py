"""Every collective that a layer runs, with its bytes, is the one that its formula says, forward and backward."""

import contextlib
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ted_cases import CONFIGS, CollectiveCounter, Log, count_collectives, in_new_groups, log_of, write_models
from torch import Tensor

from hf_moe_ted import TedPlugin, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.bounded_exchange import bounded_expert_load
from hf_moe_ted.distributed.collectives import even_shares
from hf_moe_ted.distributed.layout import LAYERS_PER_UNIT
from hf_moe_ted.testing import run_distributed_test

WORLD, NUM_EXPERTS, TOP_K, WIDTH, FFN, VOCAB = 4, 4, 2, 32, 64, 96
FLOAT, INT64 = 4, 8
NUM_TOKENS = 21  # which neither tensor-parallel ranks nor chunks divide evenly
MANY = 10**6  # a capacity that changes nothing


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    ep: int = 1
    etp: int = 1
    drops_duplicates: bool = True
    chunks: int = 1
    pads: bool = False
    bound: float | None = None
    capacity: int = MANY

    def plugin(self, **more: Any) -> TedPlugin:
        return TedPlugin(
            tensor_parallel_size=self.tp,
            expert_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            duplicate_token_dropping=self.drops_duplicates,
            overlap_chunks=self.chunks,
            pad_expert_input_to_capacity=self.pads,
            **more,
        )

    @property
    def num_shares(self) -> int:
        """Ranks that hold the same tokens and send each another part of them."""
        return self.tp if self.drops_duplicates or self.etp == 1 else self.tp // self.etp

    @property
    def shares_queues(self) -> bool:
        """Whether those ranks share the queues of the experts, and not the tokens."""
        return self.pads or (self.bound is not None and self.capacity < MANY and self.num_shares > 1)


LAYOUTS = {
    "ep4": Layout(ep=4),
    "ep4 in 2 chunks": Layout(ep=4, chunks=2),
    "ep2 x edp2": Layout(ep=2),
    "tp2 x ep2": Layout(tp=2, ep=2, etp=2),
    "tp2 x ep2 in 2 chunks": Layout(tp=2, ep=2, etp=2, chunks=2),
    "tp2 x ep2, all sent": Layout(tp=2, ep=2, etp=2, drops_duplicates=False),
    "tp4": Layout(tp=4, etp=4),
    "tp4, etp2 x ep2": Layout(tp=4, ep=2, etp=2),
    "tp4, etp2 x ep2, all sent": Layout(tp=4, ep=2, etp=2, drops_duplicates=False),
    "tp4, etp1 x ep4": Layout(tp=4, ep=4),
    "ep4, padded": Layout(ep=4, pads=True, capacity=20),
    "tp2 x ep2, padded": Layout(tp=2, ep=2, etp=2, pads=True, capacity=20),
    "tp2 x ep2, padded, all sent": Layout(tp=2, ep=2, etp=2, drops_duplicates=False, pads=True, capacity=20),
    "tp4, etp1 x ep4, padded": Layout(tp=4, ep=4, pads=True, capacity=20),
    "ep4, bounded": Layout(ep=4, bound=1.5),
    "ep4, bounded in 2 chunks": Layout(ep=4, bound=1.5, chunks=2),
    "tp2 x ep2, bounded": Layout(tp=2, ep=2, etp=2, bound=1.5),
    "tp2 x ep2, bounded, all sent": Layout(tp=2, ep=2, etp=2, drops_duplicates=False, bound=1.5),
    "tp4, etp1 x ep4, bounded": Layout(tp=4, ep=4, bound=1.5),
    # a capacity that is less than the bound
    "ep4, bounded, capacity": Layout(ep=4, bound=4.0, capacity=20),
    "tp2 x ep2, bounded, capacity": Layout(tp=2, ep=2, etp=2, bound=4.0, capacity=20),
}
CHECKPOINTED = ("tp2 x ep2", "ep4", "ep4, bounded")
CHECKPOINTING = (None, "full", "communication-aware")


def inputs_of(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and weights of a data-parallel rank; a fourth of the slots goes to no expert."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(NUM_EXPERTS, (NUM_TOKENS, TOP_K), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.25] = NUM_EXPERTS
    hidden, weights = torch.randn(NUM_TOKENS, WIDTH), torch.rand(NUM_TOKENS, TOP_K)
    return hidden.requires_grad_(), ids, weights.requires_grad_()


def count_experts(folder: str, layout: Layout) -> tuple[Log, Log]:
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model: Any = load(folder, distributed_config=layout.plugin().distributed_config, capacity_factor=1.0)
    experts = model.model.encoder.layers[1].ffn.experts
    experts.max_tokens_per_expert = lambda num_tokens: layout.capacity
    inputs = inputs_of(dist.get_rank() // layout.tp)
    with bounded_expert_load(model, layout.bound) if layout.bound else contextlib.nullcontext():
        return count_collectives(lambda: experts(*inputs))


def count_blocks(folder: str) -> dict[str, tuple[Log, Log]]:
    """The dense blocks of tensor parallelism, on batches of 3 x 7 tokens."""
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model: Any = load(folder, distributed_config=Layout(tp=4, etp=4).plugin().distributed_config)
    layers = model.model.encoder.layers, model.model.decoder.layers
    x, ids = torch.randn(3, 7, WIDTH).requires_grad_(), torch.randint(5, VOCAB, (3, 7))
    states = torch.randn(3, 5, WIDTH).requires_grad_()
    head = model.lm_head(x)
    logits = head.detach().requires_grad_()
    return {
        "attention": count_collectives(lambda: layers[0][0].self_attn(x)[0]),
        "cross-attention": count_collectives(lambda: layers[1][0].encoder_attn(x, key_value_states=states)[0]),
        "dense feed-forward": count_collectives(lambda: layers[0][0].ffn(x)),
        "encoder layer": count_collectives(lambda: layers[0][0](x, None, None)[0]),
        "embedding": count_collectives(lambda: model.model.shared(ids)),
        "head": count_collectives(lambda: model.lm_head(x).to_local()),
        "loss": count_collectives(lambda: model.cross_entropy(logits, ids, 0.1)),
        # two layers, each with one self-attention, one cross-attention and one feed-forward, dense or sparse
        "decoder": count_collectives(lambda: model.model.decoder(ids, encoder_hidden_states=states).last_hidden_state),
    }


def count_model(folder: str, layout: Layout, checkpointing: str | None, **options: Any) -> tuple[Log, Log]:
    """The second of two equal steps: FSDP2 sets up in the first."""
    plugin = layout.plugin(communication_aware_checkpointing=checkpointing != "full", **options)
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model: Any = load(folder, distributed_config=plugin.distributed_config).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable(plugin.activation_checkpointing_kwargs)
    ids = torch.randint(5, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    with bounded_expert_load(model, layout.bound) if layout.bound else contextlib.nullcontext():
        model(input_ids=ids, labels=ids).loss.backward()
        return count_collectives(lambda: model(input_ids=ids, labels=ids).loss)


def count_overflow(folder: str) -> Log:
    """What a bounded step runs more than another, whose rows are as many."""
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model: Any = load(folder, distributed_config=LAYOUTS["ep4"].plugin().distributed_config)
    experts = model.model.encoder.layers[1].ffn.experts
    with bounded_expert_load(model, 4.0) as overflow, CollectiveCounter() as counter:
        for batch in range(2):
            experts(*inputs_of(batch))
        before = counter.log.copy()
        overflow.any_rank()
    return counter.log - before


def count_all(folder: str) -> dict[Any, Any]:
    counted = in_new_groups(LAYOUTS.items())
    results: dict[Any, Any] = {name: count_experts(folder, layout) for name, layout in counted}
    results["blocks"] = count_blocks(folder)
    for name, checkpointing in in_new_groups(itertools.product(CHECKPOINTED, CHECKPOINTING)):
        results[name, checkpointing] = count_model(folder, LAYOUTS[name], checkpointing)
    results["overflow"] = count_overflow(folder)
    results["zero 3"] = count_model(folder, LAYOUTS["ep4"], None, zero_stage=3)
    return results


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"top2"})
    return run_distributed_test(count_all, WORLD, str(folder / "top2"))


def rows_to(layout: Layout, source: int, chunk: int) -> list[int]:
    """Rows that a rank sends to each rank of its expert-parallel group."""
    if layout.shares_queues:
        return [NUM_EXPERTS // layout.ep * math.ceil(layout.capacity / layout.num_shares)] * layout.ep
    if layout.bound:  # the share of the first rank, and the first chunk of it, are the longest
        num_slots = even_shares(even_shares(NUM_TOKENS, layout.num_shares)[0], layout.chunks)[0] * TOP_K
        bound = math.ceil(layout.bound * num_slots / layout.ep)
        return [min(bound, num_slots, NUM_EXPERTS // layout.ep * layout.capacity)] * layout.ep
    _, ids, _ = inputs_of(source // layout.tp)
    share = source % layout.tp if layout.num_shares == layout.tp else source % layout.tp // layout.etp
    ids = ids.split(even_shares(NUM_TOKENS, layout.num_shares))[share]
    ids = ids.split(even_shares(len(ids), layout.chunks))[chunk]
    per_rank = NUM_EXPERTS // layout.ep
    return [int((ids // per_rank == rank).sum()) for rank in range(layout.ep)]


def rows_received(layout: Layout, rank: int, chunk: int) -> int:
    group_size = layout.ep * layout.etp
    first = rank // group_size * group_size + rank % layout.etp
    peers = range(first, first + group_size, layout.etp)
    return sum(rows_to(layout, peer, chunk)[peers.index(rank)] for peer in peers)


def expected_of_experts(layout: Layout, rank: int) -> tuple[Log, Log]:
    """Forward and backward."""
    if layout.ep == 1:  # all experts are here in slices: the sum of outputs, and of the gradients of both inputs
        tokens, weights = NUM_TOKENS * WIDTH * FLOAT, NUM_TOKENS * TOP_K * FLOAT
        return log_of(all_reduce=[tokens]), log_of(all_reduce=[tokens, weights])
    row = WIDTH * FLOAT
    sizes = layout.chunks * NUM_EXPERTS * INT64  # how many rows go to which expert
    if layout.pads or layout.bound:
        sizes += layout.ep * INT64  # and the rows for each, which must be equal
    drops_duplicates = layout.drops_duplicates and layout.etp > 1
    rows, gathers, reductions, sums = [], [], [], []
    for chunk in range(layout.chunks):
        rows += [sum(rows_to(layout, rank, chunk)) * row, rows_received(layout, rank, chunk) * row]
        if drops_duplicates:  # each rank of the group pads to the longest
            first = rank // layout.etp * layout.etp
            longest = max(rows_received(layout, peer, chunk) for peer in range(first, first + layout.etp))
            gathers.append(longest * row)
            reductions.append(layout.etp * longest * row)
        elif layout.etp > 1:
            sums.append(rows_received(layout, rank, chunk) * row)
    inside = {"all_gather_into_tensor": gathers, "reduce_scatter_tensor": reductions, "all_reduce": sums}
    forward = log_of(**inside, all_to_all_single=[sizes, *rows])
    backward = log_of(**inside, all_to_all_single=rows)
    if drops_duplicates:
        forward += log_of(all_gather_into_tensor=[sizes])
    if layout.tp * layout.ep < WORLD:  # ZeRO: others hold the same experts
        elements = NUM_EXPERTS // layout.ep * (2 * WIDTH * FFN + FFN + WIDTH) * layout.ep * layout.tp // WORLD
        forward["c10d._allgather_base_", elements * FLOAT] += 1
        backward["c10d._reduce_scatter_base_", elements * FLOAT * WORLD // layout.ep] += 1
    if layout.num_shares > 1 and layout.shares_queues:
        share = sum(rows_to(layout, rank, 0))
        forward += log_of(all_gather_into_tensor=[share * row])
        backward += log_of(all_gather_into_tensor=[share * row])
    elif layout.num_shares > 1:
        share = even_shares(NUM_TOKENS, layout.num_shares)[0]
        forward += log_of(all_gather_into_tensor=[share * row])
        backward += log_of(all_gather_into_tensor=[share * row, share * TOP_K * FLOAT])
    return forward, backward


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts(by_rank: list[dict[Any, Any]], name: str) -> None:
    for rank, results in enumerate(by_rank):
        assert results[name] == expected_of_experts(LAYOUTS[name], rank)


def test_overflow_takes_one_collective_of_a_number(by_rank: list[dict[Any, Any]]) -> None:
    for results in by_rank:
        assert results["overflow"] == log_of(all_reduce=[FLOAT])


@pytest.mark.parametrize(("name", "size"), [("tp2 x ep2", 2), ("tp4, etp2 x ep2", 2), ("tp2 x ep2, padded", 2)])
def test_duplicate_token_dropping_divides_what_is_exchanged(by_rank: list, name: str, size: int) -> None:
    """By the ranks that hold the same slices' tokens: in forward and backward, over all ranks, to the byte."""

    def exchanged(name: str, direction: int) -> int:
        logs = [results[name][direction] for results in by_rank]
        total = sum(n * b for log in logs for (operation, b), n in log.items() if operation.endswith("to_all_single"))
        layout = LAYOUTS[name]
        sizes = NUM_EXPERTS + (layout.ep if layout.pads else 0)
        return total - (WORLD * sizes * INT64 if direction == 0 else 0)

    for direction in (0, 1):
        assert exchanged(name, direction) * size == exchanged(f"{name}, all sent", direction) > 0


def test_dense_blocks(by_rank: list[dict[Any, Any]]) -> None:
    states = 3 * 7 * WIDTH * FLOAT
    cross_states = 3 * 5 * WIDTH * FLOAT
    labels = 3 * 7 * FLOAT
    weights = 3 * 7 * TOP_K * FLOAT
    one = log_of(all_reduce=[states])
    expected = {
        "attention": (one, one),
        "cross-attention": (one, one),  # the states of the encoder are copied by the decoder, once for all layers
        "dense feed-forward": (one, one),
        "encoder layer": (log_of(all_reduce=[states] * 2), log_of(all_reduce=[states] * 2)),
        "embedding": (one, Counter()),
        "head": (Counter(), one),
        "loss": (log_of(all_reduce=[labels, 3 * labels]), Counter()),  # the largest logit, then three sums
        "decoder": (
            log_of(all_reduce=[states] * 7),
            log_of(all_reduce=[states] * 6 + [weights, cross_states]),
        ),
    }
    for results in by_rank:
        assert results["blocks"] == expected


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_communication_aware_checkpointing_repeats_none(by_rank: list[dict[Any, Any]], name: str) -> None:
    for results in by_rank:
        forward, backward = results[name, None]
        assert results[name, "communication-aware"] == (forward, backward)
        full_forward, full_backward = results[name, "full"]
        assert full_forward == forward
        repeated = full_backward - backward
        assert full_backward == backward + repeated  # nothing is left out
        functional = Counter({key: n for key, n in forward.items() if key[0].startswith("_c10d_functional")})
        if name != "tp2 x ep2":
            assert repeated == functional
        else:  # embedding and loss are in no layer, and recomputing stops before the last sum of each
            assert repeated < functional


@pytest.mark.parametrize(("name", "layers_per_unit"), [("ep4", LAYERS_PER_UNIT), ("zero 3", 1)])
def test_zero(by_rank: list[dict[Any, Any]], name: str, layers_per_unit: int) -> None:
    """A unit's parameters are gathered, its gradients scattered; ZeRO-3 gathers again."""
    with torch.device("meta"):
        model: Any = ZCodeM3ForConditionalGeneration(CONFIGS["top2"]())
    layers = [model.model.encoder.layers, model.model.decoder.layers]
    units = [layer for stack in layers for layer in stack] if layers_per_unit == 1 else layers
    numels = [sum(p.numel() for name, p in unit.named_parameters() if ".experts." not in name) for unit in units]
    numels.append(sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name))
    assert LAYERS_PER_UNIT >= 2
    gathered = Counter(("c10d._allgather_base_", numel * FLOAT // WORLD) for numel in numels)
    scattered = Counter(("c10d._reduce_scatter_base_", numel * FLOAT) for numel in numels)
    for results in by_rank:
        forward, backward = results[("ep4", None) if name == "ep4" else name]
        assert of_fsdp(forward) == gathered
        assert of_fsdp(backward) == (scattered + gathered if name == "zero 3" else scattered)


def of_fsdp(log: Log) -> Log:
    return Counter({key: n for key, n in log.items() if key[0].startswith("c10d.")})
