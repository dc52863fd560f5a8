"""Kernels of the MoE layer: what they have to do, and what they take.

    python examples/benchmarks/bench_layer_kernels.py --roofline
    python examples/benchmarks/bench_layer_kernels.py --output layer_kernels.json

The first needs no GPU: FLOPs and bytes of each kernel of forward and backward, and the time that they need at least.
The second has all kernels of a step, of the dense feed-forward of the same FLOPs and of the sparse layer. Whole layers
are timed by bench_experts.py, whose tokens and weights these are.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_experts import step_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hf_moe_ted import ZCodeM3Config, ZCodeM3Model

SIZES = [(65536, 64), (65536, 128), (16384, 64), (16384, 128), (4096, 64)]
D_MODEL, FFN_DIM = 1024, 4096
TILE_ROWS = 128
FLOPS_PER_MS, BYTES_PER_MS = 790e9, 4.3e9  # of an H200: products in bfloat16, copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roofline", action="store_true", help="what the kernels have to do, no GPU")
    parser.add_argument("--sizes", nargs="+", help="tokens,experts; default: the five with targets")
    parser.add_argument("--output", type=Path, help="JSON, written after each size")
    args = parser.parse_args()
    sizes = SIZES if args.sizes is None else [tuple(map(int, size.split(","))) for size in args.sizes]
    if args.roofline:
        Console(width=140).print(roofline_table(sizes))
        return
    rows: list[dict[str, Any]] = []
    for size in sizes:
        rows.append(profile(*size))
        Console(width=140).print(profile_table(rows[-1]))
        if args.output:
            setting = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            args.output.write_text(json.dumps(setting | {"rows": rows}, indent=1) + "\n")


# --- What the kernels have to do


@dataclass(frozen=True)
class Work:
    """Of one kernel.

    Attributes:
        flops: that are asked for.
        computed: flops with the rows that fill up tiles.
        moved: bytes read and written, each once.
    """

    kernel: str
    flops: int
    computed: int
    moved: int

    @property
    def milliseconds(self) -> float:
        return max(self.computed / FLOPS_PER_MS, self.moved / BYTES_PER_MS)


def work_of_a_step(num_tokens: int, num_experts: int) -> list[Work]:
    """In bfloat16, top-1. Rows per expert are those of one random routing, uniform over the experts."""
    generator = torch.Generator().manual_seed(0)
    rows_E = torch.randint(num_experts, (num_tokens,), generator=generator).bincount(minlength=num_experts)
    num_rows = int((rows_E + TILE_ROWS - 1).div(TILE_ROWS, rounding_mode="floor").sum()) * TILE_ROWS
    tokens, inner = 2 * num_tokens * D_MODEL, 2 * num_tokens * FFN_DIM  # bytes
    weights, logits = 2 * num_experts * D_MODEL * FFN_DIM, 4 * num_tokens * num_experts
    router = 2 * num_tokens * D_MODEL * num_experts
    flops, computed = (2 * rows * D_MODEL * FFN_DIM for rows in (num_tokens, num_rows))
    return [
        Work("router", router, router, tokens + logits),
        Work("gather", 0, 0, 2 * tokens),
        Work("up", flops, computed, tokens + weights + inner),
        Work("down, with outputs before their weights", flops, computed, inner + weights + 2 * tokens),
        Work("gather backward", 0, 0, 3 * tokens),
        Work("gradient at the activation", flops, computed, tokens + weights + 2 * inner),
        Work("gradient of input", flops, computed, inner + weights + tokens),
        Work("gradients of up and its bias", flops, flops, tokens + inner + weights),
        Work("gradients of down and its bias", flops, flops, tokens + inner + weights),
        Work("router backward", 2 * router, 2 * router, 2 * tokens + 3 * logits),
        Work("sum of two gradients", 0, 0, 3 * tokens),
    ]


def roofline_table(sizes: list[tuple[int, int]]) -> Table:
    result = Table(title="GFLOP / GB / milliseconds at least")
    result.add_column("kernel")
    for num_tokens, num_experts in sizes:
        result.add_column(f"{num_tokens:,}, {num_experts}", justify="right")
    columns = [work_of_a_step(*size) for size in sizes]
    for kernels in zip(*columns, strict=True):
        cells = [f"{k.flops / 1e9:.0f} / {k.moved / 1e9:.2f} / {k.milliseconds:.3f}" for k in kernels]
        result.add_row(kernels[0].kernel, *cells)
    result.add_row("sum", *(f"{sum(kernel.milliseconds for kernel in kernels):.2f}" for kernels in columns))
    return result


# --- What they take


def modules(num_tokens: int, num_experts: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Dense and sparse feed-forward, tokens and cotangent."""
    torch.manual_seed(0)
    config = ZCodeM3Config(
        vocab_size=8, d_model=D_MODEL, encoder_ffn_dim=FFN_DIM, encoder_layers=2, encoder_sparse_step=2,
        decoder_layers=1, decoder_sparse_step=0, num_experts=num_experts, num_experts_per_tok=1,
        activation_dropout=0.0, capacity_factor=None, router_noise_policy=None,
    )  # fmt: skip
    hidden = torch.randn(1, num_tokens, D_MODEL, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cotangent = torch.randn_like(hidden)
    with torch.device("cuda"):
        model = ZCodeM3Model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.03)
    model.set_experts_implementation("zcode_fused")
    dense, layer = (layer.ffn for layer in model.to(torch.bfloat16).encoder.layers)
    return dense, layer, hidden, cotangent


def profile(num_tokens: int, num_experts: int) -> dict[str, Any]:
    """Microseconds of each kernel in a step of the dense and of the sparse layer, mean of ten."""
    dense, layer, hidden, cotangent = modules(num_tokens, num_experts)
    result: dict[str, Any] = {"tokens": num_tokens, "experts": num_experts}
    for name, module in (("dense", dense), ("sparse", layer)):
        step = step_of(module, hidden, cotangent)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
            for _ in range(10):
                step()
            torch.cuda.synchronize()
        result[name] = kernels_of(record, num_steps=10)
    return result


def kernels_of(record: Any, num_steps: int) -> list[tuple[str, float]]:
    """Names and microseconds of the kernels of a step, in their order, means of all steps.

    In the order of their times if the steps differ.
    """
    events = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    names = [event.name for event in events]
    per_step = len(events) // num_steps
    if len(events) % num_steps or names[:per_step] * num_steps != names:
        total = Counter()
        for event in events:
            total[event.name[:80]] += event.time_range.elapsed_us() / num_steps
        return [(name, round(us, 1)) for name, us in total.most_common()]
    return [
        (names[i][:80], round(sum(event.time_range.elapsed_us() for event in events[i::per_step]) / num_steps, 1))
        for i in range(per_step)
    ]


def profile_table(row: dict[str, Any]) -> Table:
    result = Table(title=f"microseconds of a step, {row['tokens']:,} tokens, {row['experts']} experts")
    for column in ("layer", "kernel", "us"):
        result.add_column(column)
    for name in ("dense", "sparse"):
        for kernel, microseconds in row[name]:
            result.add_row(name, kernel, f"{microseconds:.1f}")
        result.add_row(name, "sum", f"{sum(us for _, us in row[name]):.1f}", end_section=True)
    return result


if __name__ == "__main__":
    main()
