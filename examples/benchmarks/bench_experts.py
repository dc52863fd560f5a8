"""Time of one MoE layer, router included, beside the dense feed-forward of the same FLOPs, on one GPU.

    python examples/benchmarks/bench_experts.py --output experts.json [--plot experts.png]

Random tokens and weights, top-1, nothing dropped, ungated ReLU experts with biases. All implementations of a row run
after each other in one process, so that their ratios can be compared where their milliseconds cannot.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from triton.testing import do_bench

from hf_moe_ted import ZCodeM3Config, ZCodeM3Model

SIZES = [(65536, 64), (65536, 128), (16384, 64), (16384, 128), (4096, 64), (4096, 128), (64, 64), (1, 64)]
IMPLEMENTATIONS = ("zcode_fused", "zcode_grouped", "grouped_mm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", help="tokens,experts; default: the eight of the record")
    parser.add_argument("--implementations", nargs="+", default=IMPLEMENTATIONS)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--ffn-dim", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--plot", type=Path, help="PNG, time against tokens and experts")
    args = parser.parse_args()
    sizes = SIZES if args.sizes is None else [tuple(map(int, size.split(","))) for size in args.sizes]

    rows = []
    for num_tokens, num_experts in sizes:
        rows.append(measure(num_tokens, num_experts, args))
        print(json.dumps(rows[-1]), flush=True)
    Console(width=160).print(table(rows, args.implementations))
    if args.output:
        setting = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": args.dtype}
        args.output.write_text(json.dumps(setting | {"rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.implementations, args.plot)


def measure(num_tokens: int, num_experts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds and MiB of each implementation for one size."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    config = ZCodeM3Config(
        vocab_size=8, d_model=args.d_model, encoder_ffn_dim=args.ffn_dim, encoder_layers=2, encoder_sparse_step=2,
        decoder_layers=1, decoder_sparse_step=0, num_experts=num_experts, num_experts_per_tok=1,
        activation_dropout=0.0, capacity_factor=None, router_noise_policy=None,
    )  # fmt: skip
    hidden = torch.randn(1, num_tokens, args.d_model, device="cuda", dtype=dtype, requires_grad=True)
    cotangent = torch.randn_like(hidden)
    row: dict[str, Any] = {"tokens": num_tokens, "experts": num_experts}
    with torch.device("cuda"):
        model = ZCodeM3Model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.03)
    dense, layer = (layer.ffn for layer in model.to(dtype).encoder.layers)
    row["dense"] = timed(dense, hidden, cotangent)
    for name in args.implementations:
        model.set_experts_implementation(name)
        row[name] = timed(layer, hidden, cotangent)
    return row


def timed(module: nn.Module, hidden: Tensor, cotangent: Tensor) -> dict[str, float]:
    """Milliseconds without gradients and of forward and backward, eager and as CUDA graphs; peak MiB of a step."""

    @torch.no_grad()
    def forward() -> None:
        module(hidden)

    step = step_of(module, hidden, cotangent)
    step()
    hidden.grad = None
    module.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "forward": milliseconds(forward),
        "step": milliseconds(step),
        "graph_forward": milliseconds(captured(forward)),
        "graph_step": milliseconds(captured(step)),
        "peak_mib": peak / 2**20,
    }


def step_of(module: nn.Module, hidden: Tensor, cotangent: Tensor) -> Callable[[], None]:
    """Forward and backward, of a sparse layer, which returns its routing too, or of a dense one."""

    def step() -> None:
        hidden.grad = None
        module.zero_grad()
        output = module(hidden)
        (output[0] if isinstance(output, tuple) else output).backward(cotangent)

    return step


def milliseconds(function: Callable[[], None]) -> float:
    return do_bench(function, warmup=20, rep=100, return_mode="median")


def captured(function: Callable[[], None]) -> Callable[[], None]:
    """The function as a CUDA graph, or itself if it cannot be one."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        return function
    return graph.replay


def table(rows: list[dict[str, Any]], implementations: tuple[str, ...]) -> Table:
    result = Table(title="milliseconds of forward / forward and backward, and their ratios to dense")
    for column in ("tokens", "experts", "dense", *implementations, "peak MiB, dense and these"):
        result.add_column(column, justify="right")
    for row in rows:
        dense = row["dense"]
        cells = [f"{dense['forward']:.3f} / {dense['step']:.3f}"]
        for name in implementations:
            one = row[name]
            cells.append(
                f"{one['forward']:.3f} / {one['step']:.3f}  "
                f"({one['forward'] / dense['forward']:.2f} / {one['step'] / dense['step']:.2f}; "
                f"graphs {one['graph_forward'] / dense['graph_forward']:.2f} / "
                f"{one['graph_step'] / dense['graph_step']:.2f})"
            )
        cells.append(", ".join(f"{row[name]['peak_mib']:,.0f}" for name in ("dense", *implementations)))
        result.add_row(f"{row['tokens']:,}", str(row["experts"]), *cells)
    return result


def plot(rows: list[dict[str, Any]], implementations: tuple[str, ...], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for axis, kind, title in zip(axes, ("forward", "step"), ("forward", "forward and backward"), strict=True):
        for num_experts, style in zip(sorted({row["experts"] for row in rows}), ("-", "--", ":"), strict=False):
            chosen = sorted((row for row in rows if row["experts"] == num_experts), key=lambda row: row["tokens"])
            tokens = [row["tokens"] for row in chosen]
            for color, name in enumerate(("dense", *implementations)):
                label = f"{name}, {num_experts} experts"
                axis.plot(
                    tokens, [row[name][kind] for row in chosen], style, color=f"C{color}", marker=".", label=label
                )
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
