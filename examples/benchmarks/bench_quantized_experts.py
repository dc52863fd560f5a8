"""Time of quantized experts beside experts in bfloat16, and beside a loop over the experts, on one GPU.

    python examples/benchmarks/bench_quantized_experts.py --output quantized_experts.json

Random weights, tokens and top-2 routing; ungated ReLU experts with biases, 16 of d_model 1024 and NLLB-MoE's 128 of
2048. Each format is compared with its weights in float32 before. Times are those of CUDA graphs of several calls, each
with another routing and, where a cache would hold all experts, other weights; the loop, which waits for the device at
each expert, runs eagerly. Speeds are packed bytes of the experts that a call needs, each once, beside those of a copy.
Kernels are compiled by several processes before.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ["HF_MOE_TED_QUANTIZED_KERNELS"] = "1"  # read by the import

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, quantize_experts

TOP_K = 2
SLOTS = (2, 8, 64, 512, 4096, 32768)
FORMATS: dict[str, tuple[int, int | None]] = {"int4": (4, None), "int8": (8, None)}  # int4: 128 weights share a scale
LARGEST_ERROR = 0.01  # of bfloat16, which the output of the inner layer and the result are rounded to


@dataclass(frozen=True)
class Shape:
    """Of experts, and how many layers of them a cache does not hold."""

    d_model: int
    ffn_dim: int
    num_experts: int
    num_layers: int


SHAPES = (Shape(1024, 4096, 16, 4), Shape(2048, 8192, 128, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON, written anew after each row")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1), help="that compile")
    args = parser.parse_args()
    started = time.perf_counter()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        jobs = [(shape, name) for shape in SHAPES for name in (*FORMATS, "bfloat16")]
        list(pool.map(compile_kernels, *zip(*jobs, strict=True)))
    results |= {"seconds_compiling": time.perf_counter() - started, "copy_gb_per_s": copy_speed()}
    print(json.dumps(results), flush=True)
    for shape in SHAPES:
        for row in compared(shape, results["copy_gb_per_s"]):
            results["rows"].append(row)
            results["seconds"] = time.perf_counter() - started
            print(json.dumps(row), flush=True)
            if args.output:
                args.output.write_text(json.dumps(results, indent=1) + "\n")


def compared(shape: Shape, copy_gb_per_s: float) -> Iterator[dict[str, Any]]:
    """A row for the errors of each format, and one for each number of slots."""
    exact = random_model(shape)
    quantized = {name: quantize_experts(exact, *FORMATS[name]) for name in FORMATS}
    for name, model in quantized.items():
        yield {"shape": asdict(shape), "format": name, "relative_errors": errors(layers(model)[0], shape)}
    for num_slots in SLOTS:
        row: dict[str, Any] = {"shape": asdict(shape), "slots": num_slots}
        inputs = [random_inputs(shape, num_slots) for _ in range(24 if num_slots <= 64 else 4)]
        row["bfloat16"] = {"ms": graph_ms(layers(exact), inputs), "eager_ms": eager_ms(layers(exact), inputs)}
        for name, model in quantized.items():
            experts = layers(model)
            ms = graph_ms(experts, inputs)
            speed = sum(needed_bytes(experts[0], ids) for _, ids, _ in inputs) / len(inputs) / ms / 1e6
            row[name] = {
                "ms": ms,
                "eager_ms": eager_ms(experts, inputs),
                "of_bfloat16": ms / row["bfloat16"]["ms"],
                "gb_per_s": speed,
                "of_copy": speed / copy_gb_per_s,
            }
            model.set_experts_implementation("eager")
            row[name]["loop_ms"] = eager_ms(experts, inputs[:2])
            model.set_experts_implementation("zcode_fused")
        yield row


def random_model(shape: Shape) -> ZCodeM3ForConditionalGeneration:
    config = ZCodeM3Config(
        vocab_size=8, d_model=shape.d_model, encoder_ffn_dim=shape.ffn_dim, decoder_ffn_dim=8,
        encoder_layers=shape.num_layers, encoder_sparse_step=1, decoder_layers=1, decoder_sparse_step=0,
        num_experts=shape.num_experts, num_experts_per_tok=TOP_K, activation_dropout=0.0,
    )  # fmt: skip
    with torch.device("meta"):
        model = ZCodeM3ForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device="cuda").eval().requires_grad_(False)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(
            std=0.3 if parameter.dim() < 2 or name.endswith("_bias") else parameter.shape[-1] ** -0.5
        )
    model.set_experts_implementation("zcode_fused")
    return model


def layers(model: Any) -> list[Any]:
    return [layer.ffn.experts for layer in model.model.encoder.layers]


def random_inputs(shape: Shape, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens = num_slots // TOP_K
    hidden = torch.randn(num_tokens, shape.d_model, device="cuda", dtype=torch.bfloat16)
    ids = torch.rand(num_tokens, shape.num_experts, device="cuda").topk(TOP_K).indices
    return hidden, ids, torch.rand(num_tokens, TOP_K, device="cuda", dtype=torch.bfloat16)


def needed_bytes(experts: Any, ids: Tensor) -> float:
    """Of packed weights and scales of the experts that have a slot."""
    of_all = sum(parameter.nbytes for name, parameter in experts.named_parameters() if not name.endswith("bias"))
    return of_all / experts.num_experts * len(ids.unique())


@torch.no_grad()
def errors(experts: Any, shape: Shape) -> dict[int, float]:
    """By number of slots, `||output - exact|| / ||exact||`, exact in float32 with the same rounded weights."""
    result = {}
    for num_slots in (2, 8, 64, 512, 4096):
        hidden, ids, weights = random_inputs(shape, num_slots)
        exact = torch.zeros_like(hidden, dtype=torch.float32)
        for expert in ids.unique().tolist():
            token, slot = torch.where(ids == expert)
            inner = hidden[token].float() @ float32(experts, "up_proj", expert).T
            inner = (inner + experts.up_proj_bias[expert].float()).relu()
            outer = inner @ float32(experts, "down_proj", expert).T + experts.down_proj_bias[expert].float()
            exact.index_add_(0, token, outer * weights[token, slot, None].float())
        output = experts(hidden, ids, weights).float()
        result[num_slots] = ((output - exact).norm() / exact.norm()).item()
        if not result[num_slots] < LARGEST_ERROR:
            print(f"WRONG: {experts} with {num_slots} slots, relative error {result[num_slots]:.1e}", flush=True)
    return result


def float32(experts: Any, name: str, expert: int) -> Tensor:
    """The weights [O, I] of one expert."""
    packed = experts.get_parameter(f"{name}_packed")[expert]
    scale = experts.get_parameter(f"{name}_scale")[expert].float()
    integers = packed if experts.bits == 8 else torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).int() - 8
    return (integers.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


@torch.no_grad()
def graph_ms(experts: list[Any], inputs: list[Any]) -> float:
    """Of one call, within a CUDA graph of a call for each of the inputs."""

    def calls() -> None:
        for index, one in enumerate(inputs):
            experts[index % len(experts)](*one)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return median_ms(graph.replay, 5) / len(inputs)


@torch.no_grad()
def eager_ms(experts: list[Any], inputs: list[Any]) -> float:
    """Of one call, host included."""

    def calls() -> None:
        for index, one in enumerate(inputs):
            experts[index % len(experts)](*one)

    return median_ms(calls, 3) / len(inputs)


def median_ms(function: Callable[[], Any], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def copy_speed() -> float:
    """GB per second, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), 5) / 1e6


@torch.no_grad()
def compile_kernels(shape: Shape, name: str) -> None:
    """Those of one format into Triton's cache on disk, which the measurements read."""
    small = replace(shape, num_experts=16, num_layers=1)  # Triton specializes for multiples of 16 only
    model = random_model(small)
    experts = layers(model if name == "bfloat16" else quantize_experts(model, *FORMATS[name]))[0]
    for num_slots in SLOTS:
        # as many for each expert, and by the same kernels
        as_many = max(min(num_slots, 66), num_slots * small.num_experts // shape.num_experts)
        experts(*random_inputs(small, as_many))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
