"""The largest models that fit, by formula, and ranks of published models, simulated, beside the formula.

    python examples/benchmarks/plan_simulation.py

Prints the tables of docs/benchmarks/plan_2026-11-29.md. Needs no GPU: a rank is this process with torch's fake process
group, and a model on the meta device. With `--steps` it is a step of training of one rank of each published model, on
tensors without numbers, which takes minutes.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_moe_ted import (
    Layout,
    Workload,
    ZCodeM3Config,
    collectives_of_step,
    local_numels_of_rank,
    memory_of_rank,
    parameters_of_rank,
    simulated_step,
)

GIB = 2**30
USABLE, HOST_GIB_PER_GPU = 0.92, 128  # as `plan_training` assumes
NUM_HEADS, BASE_EXPERTS = 16, 16
WIDTHS = (1024, 2048, 4096, 6144, 8192)  # among which the largest total is looked for
WORKLOAD = Workload(4, 512, 512, checkpointing="full")
WAYS: dict[str, list[dict[str, int]]] = {
    "experts + data": [{"tp": 1, "zero_stage": 1}],
    "tensor parallelism": [{"tp": tp, "zero_stage": 1} for tp in (2, 4, 8)],
    "ZeRO 3": [{"tp": 1, "zero_stage": 3}],
}


def model_of(width: int, num_experts: int, layers: tuple[int, int] = (24, 12), **fields: Any) -> ZCodeM3Config:
    return ZCodeM3Config(
        d_model=width, encoder_layers=layers[0], decoder_layers=layers[1], encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, encoder_attention_heads=NUM_HEADS, decoder_attention_heads=NUM_HEADS,
        num_experts=num_experts, **fields,
    )  # fmt: skip


PUBLISHED = {
    "3.5T on 512 (2109.10465)": (
        model_of(4096, 1024, (34, 18)),
        Layout(1, 512, 512, 1, zero_stage=2, offload="cpu"),
    ),
    "40B on 128 (2303.06318)": (
        model_of(4096, 16, (31, 1), vocab_size=51_200, decoder_sparse_layers=[0]),
        Layout(4, 32, 16, 4),
    ),
}


def total(config: ZCodeM3Config) -> int:
    return parameters_of_rank(config, Layout()).total


def layout_of(num_gpus: int, num_experts: int, way: dict[str, int], offload: bool) -> Layout:
    """With as much expert parallelism as the experts and GPUs allow."""
    tp = way["tp"]
    ep = min(num_experts, num_gpus // tp)
    return Layout(tp, num_gpus // tp, ep, tp, zero_stage=way["zero_stage"], offload="cpu" if offload else None)


def fits(config: ZCodeM3Config, layout: Layout, memory_gib: int) -> bool:
    memory = memory_of_rank(config, layout, WORKLOAD)
    return memory.peak <= USABLE * memory_gib * GIB and memory.host <= HOST_GIB_PER_GPU * GIB


def largest(is_possible: Callable[[int], bool], most: int) -> int:
    """The largest number for which something is possible, 0 if for none."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_possible(middle) else (low, middle)
    return low


def largest_base(num_gpus: int, memory_gib: int, way: dict[str, int], offload: bool) -> int:
    """Parameters of the model with one expert in place of 16 that fit; widths are multiples of 128."""
    layout = layout_of(num_gpus, BASE_EXPERTS, way, offload)
    steps = largest(lambda n: fits(model_of(128 * n, BASE_EXPERTS), layout, memory_gib), 256)
    return total(model_of(128 * steps, 1)) if steps else 0


def largest_total(num_gpus: int, memory_gib: int, way: dict[str, int], offload: bool) -> int:
    """Parameters of the largest model of any width, with experts in multiples of the expert-parallel size."""
    group = num_gpus // way["tp"]
    found = 0
    for width in WIDTHS:
        layout = layout_of(num_gpus, group, way, offload)
        times = largest(lambda n, w=width, s=layout: fits(model_of(w, n * group), s, memory_gib), 64)  # type: ignore[misc]
        found = max(found, total(model_of(width, times * group)) if times else 0)
    return found


def print_largest() -> None:
    names = [f"{name}, {kind}" for kind in ("base", "total") for name in WAYS]
    print(f"| GPUs | GB | offload | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    for num_gpus in (32, 128, 512):
        for memory_gib in (32, 40, 80):
            for offload in (False, True):
                cells = []
                for find, unit in ((largest_base, 1e9), (largest_total, 1e12)):
                    for ways in WAYS.values():
                        most = max(find(num_gpus, memory_gib, way, offload) for way in ways)
                        cells.append(f"{most / unit:.1f} B" if unit == 1e9 else f"{most / unit:.2f} T")
                print(f"| {num_gpus} | {memory_gib} | {'cpu' if offload else ''} | {' | '.join(cells)} |", flush=True)


def print_simulated() -> None:
    print("\n| model | parameters | rank | simulated | formula | optimizer, GB | GPU, GiB | host, GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (config, layout) in PUBLISHED.items():
        world_size = layout.tensor_parallel_size * layout.data_parallel_size
        memory = memory_of_rank(config, layout, WORKLOAD)
        for rank in (0, world_size // 2 + 1, world_size - 1):
            simulated = sum(local_numels_of_rank(config, layout, rank).values())
            planned = parameters_of_rank(config, layout, rank).total
            print(
                f"| {name} | {total(config) / 1e9:,.1f} B | {rank} | {simulated:,} | {planned:,} | "
                f"{12 * simulated / 1e9:.2f} | {memory.peak / GIB:.1f} | {memory.host / GIB:.1f} |",
                flush=True,
            )


def print_steps() -> None:
    """Of a rank in the middle, exchanges padded to the capacity and nothing offloaded."""
    print(
        "\n| model | rank | collectives, GB | as planned | optimizer, bytes | as planned |\n|---|---|---|---|---|---|"
    )
    for name, (given, of_model) in PUBLISHED.items():
        config = ZCodeM3Config.from_dict(given.to_dict() | {"capacity_factor": 1.25})
        layout = replace(of_model, offload=None, pad_expert_input_to_capacity=True)
        rank = layout.tensor_parallel_size * layout.data_parallel_size // 2 + 1
        step = simulated_step(config, layout, WORKLOAD, rank)
        planned: Counter[tuple[str, int]] = Counter()
        for collective in collectives_of_step(config, layout, WORKLOAD):
            planned[collective.operation, collective.num_bytes] += collective.count
        states = WORKLOAD.state_bytes * parameters_of_rank(config, layout, rank).total
        moved = sum(num_bytes * count for (_, num_bytes), count in step.collectives.items()) / 1e9
        is_as_planned = [step.collectives == planned, step.optimizer_bytes == states]
        shown = ["to the byte" if is_equal else "no" for is_equal in is_as_planned]
        print(f"| {name} | {rank} | {moved:.2f} | {shown[0]} | {step.optimizer_bytes:,} | {shown[1]} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true", help="only steps of one rank of each published model")
    if parser.parse_args().steps:
        print_steps()
    else:
        print_simulated()
        print()
        print_largest()
