"""What clipping and AdamW cost together, beside torch's fused AdamW alone, on one GPU.

    python examples/benchmarks/bench_optimizer.py --output optimizer.json

The parameters of a whole model, without the model: random numbers for weights, gradients and moments, and the two
groups of a Trainer. All peers of a dtype step the same tensors in turn, so that their ratios can be compared where
their milliseconds cannot. Bytes are those that a peer cannot do without.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_ted import config_of
from rich.console import Console
from rich.table import Table
from ted_suites import BASES, Case
from torch import Tensor, nn

from hf_moe_ted import ClippedAdamW, ZCodeM3ForConditionalGeneration

Peer = Callable[[], Any]
DTYPES = ("bfloat16", "float32")
NUM_WARMUP_ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="0.6B")
    parser.add_argument("--num_experts", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures kernels on a CUDA GPU, and there is none")

    shapes = shapes_of(Case("ours", 1, base=arguments.base, num_experts=arguments.num_experts))
    numel = sum(shape.numel() for shape in shapes)
    results = []
    for dtype in arguments.dtypes:
        results += measured(shapes, getattr(torch, dtype), arguments.rounds)
        gc.collect()
        torch.cuda.empty_cache()
    Console(width=130).print(table(results, f"{len(shapes)} tensors of {numel:,} parameters"))
    if arguments.output:
        setting = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "parameters": numel}
        setting |= {"arguments": vars(arguments) | {"output": None}}
        arguments.output.write_text(json.dumps(setting | {"results": results}, indent=1) + "\n")


def shapes_of(case: Case) -> list[torch.Size]:
    with torch.device("meta"):
        model = ZCodeM3ForConditionalGeneration(config_of(case))
    return [parameter.shape for parameter in model.parameters()]


def measured(shapes: list[torch.Size], dtype: torch.dtype, num_rounds: int) -> list[dict[str, Any]]:
    """A row for each peer: milliseconds on the device and of the host, bytes per second, and the ratio to the first."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype) * 0.03) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    bytes_of_all = sum(parameter.numel() for parameter in parameters) * dtype.itemsize
    peers = peers_of(parameters)
    rounds = [timed_in_turn([peer for peer, _ in peers.values()]) for _ in range(NUM_WARMUP_ROUNDS + num_rounds)]
    rows: list[dict[str, Any]] = []
    for index, (name, (_, num_passes)) in enumerate(peers.items()):
        times = [row[index] for row in rounds[NUM_WARMUP_ROUNDS:]]
        device_ms, host_ms = map(statistics.median, zip(*times, strict=True))
        row = {"dtype": str(dtype).removeprefix("torch."), "peer": name, "ms": device_ms, "host_ms": host_ms}
        row["terabytes_per_s"] = num_passes * bytes_of_all / device_ms / 1e9
        row["ratio"] = device_ms / rows[0]["ms"] if rows else 1.0
        rows.append(row)
    return rows


def peers_of(parameters: list[Tensor]) -> dict[str, tuple[Peer, int]]:
    """What is measured, and how often it has to read or write as many bytes as there are of parameters."""
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": 0.01},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = torch.optim.AdamW([dict(group) for group in groups], lr=1e-5, fused=True)
    clipped = ClippedAdamW(groups, lr=1e-5)
    fused.step()
    clipped.state = fused.state  # so that there is memory for large models

    def clip_and_step() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        fused.step()

    def clip_in_step() -> None:
        clipped.clip_grad_norm_(1.0)
        clipped.step()

    return {
        "torch's fused AdamW": (fused.step, 7),
        "torch's clip_grad_norm_ and fused AdamW": (clip_and_step, 10),
        "ClippedAdamW, clipping": (clip_in_step, 8),
        "ClippedAdamW, norm only": (lambda: clipped.clip_grad_norm_(1.0), 1),
        "ClippedAdamW, step only": (clipped.step, 7),
    }


def timed_in_turn(peers: list[Peer]) -> list[tuple[float, float]]:
    """Milliseconds of device and host for each peer. The host is ahead, so that the device never waits for it."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(peers) + 1)]
    host_ms = []
    torch.cuda._sleep(20_000_000)  # cycles, about 10 ms, in which the host gets ahead
    events[0].record()
    for peer, end in zip(peers, events[1:], strict=True):
        start = time.perf_counter()
        peer()
        host_ms.append((time.perf_counter() - start) * 1e3)
        end.record()
    torch.cuda.synchronize()
    device_ms = [first.elapsed_time(second) for first, second in itertools.pairwise(events)]
    return list(zip(device_ms, host_ms, strict=True))


def table(results: list[dict[str, Any]], title: str) -> Table:
    result = Table("dtype", "", "ms", "TB/s", "/ AdamW alone", "ms of the host", title=title)
    for row in results:
        numbers = [f"{row['ms']:.2f}", f"{row['terabytes_per_s']:.2f}", f"{row['ratio']:.3f}", f"{row['host_ms']:.2f}"]
        result.add_row(row["dtype"], row["peer"], *numbers)
    return result


if __name__ == "__main__":
    main()
