"""Times of the kernels of quantized experts with each of some tiles, on the GPU that is there.

`python tune_quantized.py` prints a line of JSON for each tile: milliseconds of both matrices of experts of d_model 1024
and of NLLB-MoE, within CUDA graphs of calls with other routings. Several processes compile before.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from hf_moe_ted.kernels.quantized_many_slots import ManySlotsTile, gather_planes, quantized_grouped_linear
from hf_moe_ted.kernels.quantized_small_batch import SmallBatchTile, plan_tiles, small_batch_quantized_linear
from hf_moe_ted.kernels.row_plan import RowPlan, plan_rows

FORMATS = {"int4": (4, 128), "int4_64": (4, 64), "int4_32": (4, 32), "int4_rows": (4, None), "int8": (8, None)}
SHAPES = {"1024": (1024, 4096, 16), "nllb": (2048, 8192, 128)}  # d_model, inner width, experts
TOP_K = 2
# shape, slots, format, arguments of tiles
FEW: list[tuple[Any, ...]] = [
    ("nllb", (2, 8, 64), "int4", (32, 64, 4, 4), (16, 64, 4, 4), (32, 64, 2, 4), (32, 64, 1, 4), (32, 64, 1, 6),
     (16, 64, 4, 6), (32, 32, 4, 6), (64, 64, 1, 4)),
    ("nllb", (8, 64), "int8", (32, 64, 4, 4), (32, 64, 2, 4), (32, 64, 1, 5), (16, 64, 4, 4), (32, 128, 2, 4)),
    ("1024", (2, 8, 64), "int4", (32, 64, 4, 4), (16, 64, 4, 4), (32, 64, 2, 4), (32, 64, 1, 5), (16, 64, 8, 3)),
    ("nllb", (64,), "int4_32", (32, 16, 4, 4), (32, 16, 4, 6), (64, 16, 4, 5)),
]  # fmt: skip
MANY: list[tuple[Any, ...]] = [
    ("nllb", (32768,), "int4", (128, 128, 64, 8, 3, 1), (128, 128, 32, 8, 4, 1), (128, 64, 64, 4, 3, 2)),
    ("nllb", (32768,), "int8", (128, 128, 64, 8, 4, 2), (128, 128, 64, 8, 4, 1), (256, 128, 64, 8, 4, 1),
     (128, 256, 64, 8, 4, 1)),
    ("nllb", (4096,), "int4", (64, 128, 64, 8, 4, 1), (64, 64, 64, 4, 4, 2), (64, 128, 64, 8, 3, 2)),
    ("nllb", (512,), "int4", (16, 64, 64, 4, 5, 3), (16, 128, 64, 4, 4, 3), (16, 64, 64, 4, 5, 5)),
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    shape: str
    num_slots: int
    format: str
    tile: tuple[Any, ...]
    is_few: bool


def matrices(job: Job, name: str, num_experts: int | None = None) -> list[list[Tensor]]:
    """Packed weights, scales and biases, random; of several layers where a cache would hold one."""
    d_model, ffn_dim, num_all = SHAPES[job.shape]
    bits, group = FORMATS[job.format]
    num_experts = num_experts or num_all
    rows, depth = (ffn_dim, d_model) if name == "up" else (d_model, ffn_dim)
    dtype = torch.int8 if bits == 8 else torch.uint8
    result = []
    for _ in range(4 if job.shape == "1024" and job.is_few else 1):
        packed = torch.empty(num_experts, rows, depth * bits // 8, dtype=dtype, device="cuda")
        packed.view(torch.uint8).random_(0, 256)
        scale = torch.rand(num_experts, rows, depth // (group or depth), device="cuda").bfloat16() * 0.01
        result.append([packed, scale, torch.rand(num_experts, rows, device="cuda").bfloat16()])
    return result


def routing(num_slots: int, num_experts: int) -> Tensor:
    return torch.rand(num_slots // TOP_K, num_experts, device="cuda").topk(TOP_K).indices


def few_calls(job: Job, name: str, layers: list[list[Tensor]], count: int) -> Callable[[], None]:
    d_model, ffn_dim, _ = SHAPES[job.shape]
    is_up, planes = name == "up", FORMATS[job.format][0] == 4
    tile = SmallBatchTile(*job.tile)
    num_experts = layers[0][0].shape[0]
    all_ids = [routing(job.num_slots, num_experts) for _ in range(count)]
    all_tiles = [plan_tiles(ids, num_experts) for ids in all_ids]
    inputs = torch.randn(
        job.num_slots // TOP_K if is_up else job.num_slots, d_model if is_up else ffn_dim, device="cuda"
    )
    inputs = inputs.bfloat16()
    weights = None if is_up else torch.rand(job.num_slots, device="cuda").bfloat16()

    def calls() -> None:
        for index, (ids, tiles) in enumerate(zip(all_ids, all_tiles, strict=True)):
            small_batch_quantized_linear(
                inputs, ids, weights, *layers[index % len(layers)], tiles,
                in_planes=not is_up and planes, out_planes=is_up and planes, relu=is_up, tile=tile,
            )  # fmt: skip

    return calls


def many_calls(job: Job, name: str, layers: list[list[Tensor]], num_slots: int) -> Callable[[], None]:
    d_model, ffn_dim, _ = SHAPES[job.shape]
    is_up, planes = name == "up", 2 if FORMATS[job.format][0] == 4 else 1
    tile, num_experts = ManySlotsTile(*job.tile), layers[0][0].shape[0]
    ids = routing(num_slots, num_experts)
    plan = RowPlan.of(plan_rows(ids, num_experts, tile.block_m), num_slots, num_experts, tile.block_m)
    tokens = torch.randn(num_slots // TOP_K, d_model, device="cuda").bfloat16()
    rows = gather_planes(tokens, plan, TOP_K, planes) if is_up else tokens.new_ones(num_slots, ffn_dim)
    weights = None if is_up else torch.rand(num_slots, device="cuda").bfloat16()

    def calls() -> None:
        quantized_grouped_linear(
            rows, plan, weights, *layers[0], out_planes=is_up and planes == 2, relu=is_up, tile=tile
        )

    return calls


def graph_ms(calls: Callable[[], None], count: int) -> float:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    graph.replay()
    times = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / count)
    return sorted(times)[1]


def compile_job(job: Job) -> None:
    for name in ("up", "down"):
        layers = matrices(job, name, 16)  # Triton specializes for multiples of 16 only
        try:
            few_calls(job, name, layers[:1], 1)() if job.is_few else many_calls(job, name, layers, 128)()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{job}: {repr(error)[:200]}", flush=True)


def measured(jobs: list[Job]) -> Iterator[dict[str, Any]]:
    layers: dict[Any, list[list[Tensor]]] = {}
    for job in jobs:
        row: dict[str, Any] = {"shape": job.shape, "slots": job.num_slots, "format": job.format, "tile": job.tile}
        for name in ("up", "down"):
            key = job.shape, job.format, name, job.is_few
            if key not in layers:
                layers = {other: value for other, value in layers.items() if other[:2] == key[:2]}
                layers[key] = matrices(job, name)
            count = 16 if job.is_few else 1
            try:
                if job.is_few:
                    calls = few_calls(job, name, layers[key], count)
                else:
                    calls = many_calls(job, name, layers[key], job.num_slots)
                row[name] = round(graph_ms(calls, count), 5)
            except Exception as error:  # a tile that does not fit is a result, too
                row[name] = repr(error)[:80]
        yield row


def main() -> None:
    jobs = []
    for is_few, table in ((True, FEW), (False, MANY)):
        for shape, all_slots, name, *tiles in table:
            jobs += [Job(shape, num_slots, name, tile, is_few) for tile in tiles for num_slots in all_slots]
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_job, {(j.shape, j.format, j.tile, j.is_few, j.num_slots > 16): j for j in jobs}.values()))
    for row in measured(jobs):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
