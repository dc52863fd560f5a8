"""What `bench_ted.py` measures: cases, and the suites that records are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from least_loaded import MOVES, even_routing, routing_of_pair

# d_model, encoder and decoder layers, heads; the feed-forward is 4 * d_model wide, the vocabulary has 128,000 tokens
BASES = {
    "0.6B": (1024, 24, 12, 16),
    "1.3B": (2048, 12, 6, 16),
    "6.7B": (4096, 16, 11, 32),
    "tiny": (64, 2, 2, 4),
}
OF_TWO = ("across", "memory")  # suites of two GPUs
PADDED = {"pad_expert_input_to_capacity": True}


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        system: "ours", "transformers" (its own expert parallelism on our model), "dense" (M2M100) or "deepspeed".
        layout: arguments of TedPlugin, of DistributedConfig for "transformers", `tp` and `ep` for "deepspeed".
        checkpointing: `None`, "full", or "communication-aware".
        batch_size, length: per data-parallel rank; tokens of source and target each.
        graph: whether the whole step is one CUDA graph. Not where the host waits for the device: expert parallelism
            without `pad_expert_input_to_capacity`, and `offload`.
        forward: whether only the loss is computed, without gradients, as in evaluation.
        routing: of `least_loaded`, in place of what routers say.
        capacity_factor: of the experts; `None` drops nothing.
        load_bound: of `bounded_expert_load`, around the whole step; it has to be enough, as nothing is run again.
        accumulation: micro-batches of a step, whose gradients are reduced with the last.
        gathers_again: whether ZeRO gathers parameters for each of these, and not once a step as TED's trainers do.
    """

    system: str
    num_gpus: int
    base: str = "0.6B"
    num_experts: int = 16
    layout: dict[str, Any] = field(default_factory=dict)
    checkpointing: str | None = None
    optimizer: str = "tiled"
    experts_implementation: str | None = None
    batch_size: int = 64
    length: int = 128
    graph: bool = False
    forward: bool = False
    routing: dict[str, Any] | None = None
    capacity_factor: float | None = 1.25
    load_bound: float | None = None
    accumulation: int = 1
    gathers_again: bool = False

    @property
    def name(self) -> str:
        layout = " ".join(f"{key}={value}" for key, value in self.layout.items())
        parts = [
            self.system,
            f"{self.base}x{self.num_experts}",
            layout,
            self.checkpointing and f"ckpt={self.checkpointing}",
        ]
        parts += ["" if self.optimizer == "tiled" else self.optimizer, "graph" if self.graph else ""]
        parts += ["forward" if self.forward else "", f"bound={self.load_bound}" if self.load_bound else ""]
        if self.accumulation > 1:
            parts += [f"accumulation={self.accumulation}", "gathers again" if self.gathers_again else ""]
        parts += [self.routing["pair"], f"{self.batch_size}x{self.length}"] if self.routing else []
        return " ".join(part for part in parts if part)


def suite_of(
    name: str, num_gpus: int = 1, num_nodes: int = 1, shapes: Sequence[str] = (), pair: str = "en-de"
) -> list[Case]:
    """The cases of one record, in the order in which they run.

    Args:
        name: of the suite.
        num_gpus, num_nodes: of the suite "nodes".
        shapes: of the suites "nodes" and "across", such as "1.3Bx16".
        pair: languages whose routing the skewed suites have.
    """
    if name == "nodes":
        return node_cases(num_gpus, num_nodes, shapes)
    if name in OF_TWO:
        return across_cases(shapes) if name == "across" else memory_cases()
    if name in SKEWED:
        return skewed_cases(SKEWED[name], routing_of_pair(pair, 20 if name == "skewed_tiny" else 500))
    if name == "tiny":
        return tiny_cases()
    if name == "one":
        return one_gpu_cases()
    if name == "two":
        return one_gpu_cases() + two_gpu_cases()
    return large_cases({"four": 4, "eight": 8}[name])


def tiny_cases() -> list[Case]:
    """To try the script, on CPUs too, which have no graphs."""
    small: dict[str, Any] = {"base": "tiny", "num_experts": 4, "batch_size": 2, "length": 16}
    ep2: dict[str, Any] = {"expert_parallel_size": 2}
    tp2: dict[str, Any] = small | {"layout": {"tensor_parallel_size": 2}, "checkpointing": "communication-aware"}
    native = {"layout": {"fsdp_size": 2, "ep_size": 2}, "experts_implementation": "grouped_mm", "capacity_factor": None}
    eager_and_graph = (False, True) if torch.cuda.is_available() else (False,)
    return [
        Case("dense", 1, **small),
        *(Case("ours", 1, graph=graph, **small) for graph in eager_and_graph),
        Case("ours", 2, layout=ep2, **small),
        *(Case("ours", 2, layout=ep2 | PADDED, graph=graph, **small) for graph in eager_and_graph),
        *(Case("ours", 2, graph=graph, **tp2) for graph in eager_and_graph),
        Case("transformers", 2, **native, **small),
        Case("deepspeed", 4, layout={"tp": 2, "ep": 2}, checkpointing="full", **small),
    ]


def skewed_cases(shapes: list[dict[str, Any]], routing: dict[str, Any]) -> list[Case]:
    """Plain and least-loaded expert parallelism, forward and training."""
    cases = []
    for shape in shapes:
        for forward in (True, False):
            without = {"checkpointing": None} if forward else {}
            for moves in ({}, shape["moves"]):
                fields = {name: value for name, value in shape.items() if name != "moves"} | without
                fields["layout"] = shape["layout"] | moves
                fields |= {"num_experts": 8, "routing": routing, "capacity_factor": None}
                cases.append(Case("ours", forward=forward, **fields))
    return cases


def _skewed_shapes(num_gpus: int) -> list[dict[str, Any]]:
    """Batches of 8,192 and 16,384 tokens of source and target, of models of several widths."""
    ep: dict[str, Any] = {"expert_parallel_size": num_gpus}
    sizes = [("0.6B", ep, 32), ("1.3B", ep, 16), ("1.3B", ep, 32)]
    if num_gpus == 4:
        sizes += [("1.3B", {"tensor_parallel_size": 2, "expert_parallel_size": 2}, 32), ("6.7B", ep, 16)]
    return [
        {
            "num_gpus": num_gpus,
            "base": base,
            "layout": layout,
            "batch_size": batch_size,
            "length": 512,
            "checkpointing": None if base == "0.6B" else "communication-aware",
            "moves": {MOVES: True},
        }
        for base, layout, batch_size in sizes
    ]


SKEWED = {
    "skewed_tiny": [
        {
            "num_gpus": 2, "base": "tiny", "layout": {"expert_parallel_size": 2}, "batch_size": 2, "length": 16,
            "moves": {MOVES: True, "least_loaded_min_tokens": 1, "least_loaded_bound": 1.0},
        }
    ],
    "skewed_two": _skewed_shapes(2),
    "skewed_four": _skewed_shapes(4),
}  # fmt: skip


def one_gpu_cases() -> list[Case]:
    return [
        Case("dense", 1, optimizer="fused"),
        Case("ours", 1, optimizer="fused"),
        Case("ours", 1),
        Case("ours", 1, graph=True),
        Case("transformers", 1, experts_implementation="grouped_mm", optimizer="fused", capacity_factor=None),
        Case("deepspeed", 1, layout={"ep": 1}),
    ]


def two_gpu_cases() -> list[Case]:
    tp2, ep2 = {"tensor_parallel_size": 2}, {"expert_parallel_size": 2}
    native = {"layout": {"fsdp_size": 2, "ep_size": 2}, "experts_implementation": "grouped_mm", "capacity_factor": None}
    return [
        Case("ours", 2, layout=ep2),
        Case("ours", 2, layout=ep2 | PADDED),
        Case("ours", 2, layout=ep2 | PADDED, graph=True),
        Case("ours", 2, layout={**ep2, "offload": "cpu"}),
        Case("ours", 2, layout={**ep2, "overlap_chunks": 2}),
        Case("ours", 2, layout={**ep2, "zero_stage": 3}),
        Case("ours", 2, layout={}),
        Case("ours", 2, layout=tp2),
        Case("ours", 2, layout=tp2, checkpointing="full"),
        Case("ours", 2, layout=tp2, checkpointing="communication-aware"),
        Case("transformers", 2, optimizer="fused", **native),
        Case("ours", 2, num_experts=32, layout=ep2),
        Case("ours", 2, num_experts=64, layout=ep2),
        Case("deepspeed", 2, layout={"ep": 2}),
    ]


def large_cases(num_gpus: int) -> list[Case]:
    """Tensor-expert parallelism beside DeepSpeed's, then weak scaling, then the rest, should time run out."""
    shapes: list[dict[str, Any]] = [
        {"base": base, "num_experts": num_experts, "batch_size": 16, "length": 512}
        for base, num_experts in (("1.3B", 16), ("6.7B", 8), ("1.3B", 8))
    ]
    cases = tensor_expert_cases(num_gpus, shapes[0]) + tensor_expert_cases(num_gpus, shapes[1])
    for scale in (1, 2, 4) if num_gpus == 4 else (num_gpus,):  # 64 x 128 tokens per GPU
        layout: dict[str, Any] = {"expert_parallel_size": scale}
        cases.append(Case("ours", scale, layout=layout))
        if scale > 1:
            layout = layout | PADDED
            cases.append(Case("ours", scale, layout=layout))
        cases.append(Case("ours", scale, layout=layout, graph=True))
    zero3 = {"tensor_parallel_size": 2, "expert_parallel_size": 2, "zero_stage": 3}
    untiled = {"tensor_parallel_size": 2, "expert_parallel_size": 2, "tile_numel": 2**40}
    for shape in shapes:
        for layout in ({"expert_parallel_size": num_gpus}, {"tensor_parallel_size": 4}, zero3):
            cases.append(Case("ours", num_gpus, layout=layout, checkpointing="communication-aware", **shape))
    cases.append(Case("ours", num_gpus, layout=untiled, checkpointing="communication-aware", **shapes[0]))
    cases += tensor_expert_cases(num_gpus, shapes[2])
    cases.append(Case("deepspeed", num_gpus, layout={"ep": num_gpus}))
    return cases


def node_cases(num_gpus: int, num_nodes: int, shapes: Sequence[str] = ("1.3Bx16",)) -> list[Case]:
    """Across machines: the paper's layout, its neighbours, ZeRO with and without replicas, and DeepSpeed's own.

    Tensor parallelism is inside machines and experts across them, with neither, either and both of the paper's
    optimizations, as whole steps in graphs; then all ranks for tensor and for expert parallelism; then experts inside
    machines. In one machine it is tensor parallelism of 2.

    Args:
        shapes: bases and numbers of experts, such as "6.7Bx8".

    Raises:
        ValueError: a shape that is none.
    """
    return [case for shape in shapes for case in _cases_of_shape(num_gpus, num_nodes, shape)]


def fields_of(shape: str) -> dict[str, Any]:
    """Base, number of experts and batch of a shape such as "6.7Bx8".

    Raises:
        ValueError: it is none.
    """
    base, _, experts = shape.partition("x")
    if base not in BASES or not experts.isdecimal():
        raise ValueError(f"--shapes {shape} must be one of {', '.join(BASES)} and a number of experts, as in 1.3Bx16")
    batch = {"batch_size": 2, "length": 16} if base == "tiny" else {"batch_size": 16, "length": 512}
    return {"base": base, "num_experts": int(experts), **batch}


def _cases_of_shape(num_gpus: int, num_nodes: int, shape: str) -> list[Case]:
    fields = fields_of(shape)
    inside = num_gpus // num_nodes if num_nodes > 1 else min(2, num_gpus)
    paper: dict[str, Any] = {"tensor_parallel_size": inside, "expert_parallel_size": num_gpus // inside}
    replicas = {"dp_replicate_size": num_nodes}
    in_machines: dict[str, Any] = {"expert_parallel_size": inside} | PADDED
    full, aware = "full", "communication-aware"
    cases = [
        *(
            (paper | PADDED | {"duplicate_token_dropping": drops}, kept)
            for drops in (False, True)
            for kept in (full, aware)
        ),
        (paper | PADDED | {"zero_stage": 3}, aware),
        *(({"tensor_parallel_size": num_gpus}, kept) for kept in (full, aware)),
        *(({"expert_parallel_size": num_gpus} | PADDED, kept) for kept in (full, aware)),
    ]
    for stage in (1, 3) if num_nodes > 1 and inside > 1 else ():
        cases += [(in_machines | options | {"zero_stage": stage}, aware) for options in ({}, replicas)]
    ours = [Case("ours", num_gpus, layout=layout, checkpointing=kept, graph=True, **fields) for layout, kept in cases]
    deepspeed = {"tp": inside, "ep": num_gpus // inside}
    return [*ours, Case("deepspeed", num_gpus, layout=deepspeed, checkpointing=full, **fields)]


def across_cases(shapes: Sequence[str] = ("1.3Bx16",)) -> list[Case]:
    """Two GPUs, in one machine or in two: what goes over the link between them, and when.

    Experts get even shares of the tokens, as those of trained routers do, so that a padded exchange is compared with
    others for the padding that its capacity has, and not for what random routers drop.

    Raises:
        ValueError: a shape that is none.
    """
    return [case for shape in shapes for case in _across(fields_of(shape))]


def _across(fields: dict[str, Any]) -> list[Case]:
    ep2: dict[str, Any] = {"expert_parallel_size": 2}
    even: dict[str, Any] = {"routing": even_routing(fields["num_experts"])} | fields
    has_graphs = torch.cuda.is_available()
    bounded: dict[str, Any] = {"load_bound": 1.1} | even
    cases = [
        Case("ours", 2, layout=ep2 | PADDED, graph=has_graphs, **even),
        Case("ours", 2, layout=ep2, graph=has_graphs, **bounded),
        Case("ours", 2, layout=ep2 | {"overlap_chunks": 2}, graph=has_graphs, **bounded),
        Case("ours", 2, layout=ep2, **even),
        Case("ours", 2, layout=ep2 | {"zero_stage": 3}, graph=has_graphs, **bounded),
        *(
            Case("ours", 2, layout=ep2, graph=has_graphs, accumulation=4, gathers_again=again, **bounded)
            for again in (True, False)
        ),
        Case("ours", 2, layout={"tensor_parallel_size": 2}, graph=has_graphs, **fields),
        Case("ours", 2, layout={}, graph=has_graphs, **even),
        Case("ours", 2, layout={"zero_stage": 3}, graph=has_graphs, **even),
    ]
    eager = [Case("ours", 2, layout=ep2 | PADDED, **even), Case("ours", 2, layout=ep2 | {"zero_stage": 3}, **even)]
    return cases + eager if has_graphs else cases


def memory_cases() -> list[Case]:
    """Peak memory of two GPUs by layout, ZeRO stage and activation checkpointing; the largest model comes last."""
    ep2, tp2 = {"expert_parallel_size": 2}, {"tensor_parallel_size": 2}
    zero3 = {"zero_stage": 3}
    aware = "communication-aware"
    cases: list[Case] = [Case("ours", 2, layout=layout) for layout in ({}, ep2, ep2 | zero3, tp2)]
    cases += [Case("ours", 2, layout=tp2, checkpointing=kept) for kept in ("full", aware)]
    ways: list[tuple[dict[str, int], str]] = [(ep2, aware), (ep2 | zero3, aware), (tp2, "full"), (tp2, aware)]
    for shape in ("1.3Bx4", "6.7Bx2"):  # whose peak is at the loss, and not in the step of the optimizer
        cases += [Case("ours", 2, layout=layout, checkpointing=kept, **fields_of(shape)) for layout, kept in ways]
    return cases


def tensor_expert_cases(num_gpus: int, shape: dict[str, Any]) -> list[Case]:
    """Tensor parallelism of 2 with and without dropping of duplicate tokens and of collectives, and DeepSpeed's."""
    ep = num_gpus // 2
    cases = []
    for drops in (False, True):
        layout = {"tensor_parallel_size": 2, "expert_parallel_size": ep, "duplicate_token_dropping": drops}
        cases += [
            Case("ours", num_gpus, layout=layout, checkpointing=checkpointing, **shape)
            for checkpointing in ("full", "communication-aware")
        ]
    padded = {"tensor_parallel_size": 2, "expert_parallel_size": ep} | PADDED
    cases += [
        Case("ours", num_gpus, layout=padded, checkpointing=checkpointing, graph=graph, **shape)
        for graph in (False, True)
        for checkpointing in ("full", "communication-aware")
    ]
    return [*cases, Case("deepspeed", num_gpus, layout={"tp": 2, "ep": ep}, checkpointing="full", **shape)]


__all__ = ["BASES", "OF_TWO", "SKEWED", "Case", "across_cases", "memory_cases", "node_cases", "suite_of"]
