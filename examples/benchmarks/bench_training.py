"""Training steps of a whole model on one GPU: experts implementations beside the dense model of the same active size.

    python examples/benchmarks/bench_training.py --output training.json

Random weights and batches without padding, AdamW. For each peer the median step, the time of the host alone (steps that
nothing waits for, so the longer of host and device), the sum of all kernels of one step, and its largest kernels. With
"graph" the whole step, optimizer included, is one CUDA graph: what is left when the host has nothing to do.
`bench_ted.py` has the peers on several GPUs, and DeepSpeed.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_ted import reset_peak, sync, torch_step
from collectives_profile import collectives_of
from rich.console import Console
from rich.table import Table
from ted_suites import BASES, Case

PEERS = ("dense", "grouped_mm", "zcode_grouped", "zcode_fused", "zcode_fused tiled", "dense graph", "zcode_fused graph")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers",
        nargs="+",
        default=PEERS,
        help="'tiled' for TiledAdamW, else torch's fused; 'graph' for CUDA graphs",
    )
    parser.add_argument("--base", choices=BASES, default="0.6B")
    parser.add_argument("--num_experts", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--warmup_steps", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()

    results = []
    for peer in arguments.peers:
        measured = measure(case_of(peer, arguments), arguments.warmup_steps, arguments.steps)
        results.append({"peer": peer} | measured)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    Console(width=140).print(table(results))
    if arguments.output:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        setting = {"device": device, "torch": torch.__version__, "arguments": vars(arguments) | {"output": None}}
        arguments.output.write_text(json.dumps(setting | {"results": results}, indent=1) + "\n")


def case_of(peer: str, arguments: argparse.Namespace) -> Case:
    name, *options = peer.split()
    return Case(
        system="dense" if name == "dense" else "ours",
        num_gpus=1,
        base=arguments.base,
        num_experts=arguments.num_experts,
        optimizer="tiled" if "tiled" in options else "fused",
        experts_implementation=None if name == "dense" else name,
        batch_size=arguments.batch_size,
        length=arguments.length,
        graph="graph" in options,
    )


def measure(case: Case, num_warmup_steps: int, num_steps: int) -> dict[str, Any]:
    """Milliseconds of a step, tokens of source and target per second, peak GiB, and what kernels take."""
    torch.manual_seed(0)
    step = torch_step(case).step
    for _ in range(num_warmup_steps):
        step()
    if not case.graph:
        reset_peak()
    step_ms = statistics.median(timed(step) for _ in range(num_steps))
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    host_ms = (time.perf_counter() - start) / num_steps * 1e3
    sync()
    profile = collectives_of(step, counts_bytes=False)
    return {
        "step_ms": step_ms,
        "host_ms": host_ms,
        "device_ms": profile.get("device_ms", {}).get("compute"),
        "tokens_per_s": 2e3 * case.batch_size * case.length / step_ms,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "top_kernels_ms": profile.get("top_kernels_ms"),
    }


def timed(step: Callable[[], Any]) -> float:
    """Milliseconds until the device is done."""
    sync()
    start = time.perf_counter()
    step()
    sync()
    return (time.perf_counter() - start) * 1e3


def table(results: list[dict[str, Any]]) -> Table:
    result = Table("peer", "ms/step", "tokens/s", "/ first", "ms host or device", "ms of kernels", "peak GiB")
    for row in results:
        numbers = [row[key] for key in ("host_ms", "device_ms", "peak_gib")]
        result.add_row(
            row["peer"],
            f"{row['step_ms']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / results[0]['tokens_per_s']:.2f}",
            *("" if number is None else f"{number:.1f}" for number in numbers),
        )
    return result


if __name__ == "__main__":
    main()
