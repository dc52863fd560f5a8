"""Training speed and memory of ZCodeM3 on several GPUs, layout by layout, beside transformers' own and DeepSpeed.

    python examples/benchmarks/bench_ted.py --suite two --output ted.json

Runs the cases of a suite that the GPUs of this machine allow, one `torchrun` per number of GPUs, and prints a table.
Each result is printed and written to `ted.jsonl` when it is there; a case that fails, or takes longer than
`--case_limit_s`, is a line with its error, and the others go on in a new `torchrun`. Models have random weights, made
in place on the devices, and batches without padding. Every case reports the mean of ten steps (`--steps`), what the
collectives of one step move by kind, and the time they take on the device, from a profile. In cases with `graph` the
whole step, collectives and optimizer included, is one CUDA graph.

    python examples/benchmarks/bench_ted.py --suite skewed_four --pair en-de

Plain and least-loaded expert parallelism, forward and training, where experts get the shares of tokens that those of
the shipped model get of a language pair; a second table has the ratios.

Two GPUs of one machine, and as if of two; then peak memory by layout:

    python examples/benchmarks/bench_ted.py --suite across
    python examples/benchmarks/bench_ted.py --suite across --nodes 2
    python examples/benchmarks/bench_ted.py --suite memory --steps 2

Across machines:

    python examples/benchmarks/bench_ted.py --suite nodes --nodes 2
    torchrun --nnodes 2 --nproc_per_node 8 ... examples/benchmarks/bench_ted.py --suite nodes --systems ours

The first, as above, emulates machines on this host (machines.py), and says so. The second takes those of the launcher,
on which DeepSpeed, which keeps its groups in globals, needs a launch of its own (`--systems deepspeed`).

With nvidia-ml-py (`pip install nvidia-ml-py`) each case has joules of all GPUs per step and watts of a GPU, by NVML's
counter of energy, and watts of a GPU that waits. `idle_power` of the planner (planning/constants.py) is the latter, and
`busy_power` the watts of a case that waits for nothing, as shares of what the data sheet has.
"""

import argparse
import gc
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from collectives_profile import CollectiveBytes, collectives_of
from energy_meter import EnergyMeter
from least_loaded import print_ratios, route_as
from machines import Machines, check_ranks, emulate, machines_of
from rich.console import Console
from rich.table import Table
from ted_launches import Limits, launch, results_in
from ted_suites import BASES, OF_TWO, SKEWED, Case, suite_of
from transformers import AutoModelForSeq2SeqLM, M2M100Config
from transformers import initialization as init
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import initialize_distributed_mesh

from hf_moe_ted import TedPlugin, ZCodeM3Config, ZCodeM3ForConditionalGeneration, bounded_expert_load

WARMUP_STEPS = 3
HOPPER_PEAK_TFLOPS = 989  # dense bfloat16 of H100 and H200 as SXM modules, from NVIDIA's data sheets


# ---- one case, in every process ----


@dataclass(frozen=True)
class Measured:
    """What is measured of a case.

    Attributes:
        step: gives its loss.
        num_batches: that all processes take in it.
        collective_bytes: of a captured step, whose replays Python does not see, by kind.
        load: of `bounded_expert_load`, the largest load of a rank in parts of the rows there were for it.
    """

    step: Callable[[], Any]
    num_batches: int
    collective_bytes: dict[str, int] | None = None
    load: Callable[[], float] | None = None


def run_case(case: Case, num_steps: int, energy_s: float) -> dict[str, Any]:
    """Build, train some steps, profile one.

    Args:
        energy_s: that steps run at least while their energy is measured; 0 to leave it out.
    """
    torch.manual_seed(0)
    meter = EnergyMeter.of_current_gpu() if energy_s else None
    idle_w = meter.idle_watts() if meter is not None else None
    measured = deepspeed_step(case) if case.system == "deepspeed" else torch_step(case)
    step = measured.step
    for _ in range(WARMUP_STEPS):
        loss = step()
    sync()
    if not case.graph:
        reset_peak()
    start = time.perf_counter()
    for _ in range(num_steps):
        loss = step()
    sync()
    step_s = (time.perf_counter() - start) / num_steps
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
    tokens = 2 * case.batch_size * case.length * measured.num_batches
    tflops_per_gpu = (2 if case.forward else 6) * active_parameters(case) * tokens / 2 / step_s / case.num_gpus / 1e12
    result = {
        "step_ms": step_s * 1e3,
        "tokens_per_s": tokens / step_s,
        "tflops_per_gpu": tflops_per_gpu,
        "peak_gib": peak_gib,
        "loss": float(loss),
    }
    if meter is not None:
        result |= {"idle_w": idle_w, **energy_of(step, max(num_steps, math.ceil(energy_s / step_s)), meter)}
    if measured.load is not None:
        result["load"] = measured.load()
    if torch.cuda.is_available() and any(name in torch.cuda.get_device_name() for name in ("H100", "H200")):
        result["mfu"] = tflops_per_gpu / HOPPER_PEAK_TFLOPS
    if case.system != "deepspeed":
        result |= collectives_of(step, counts_bytes=not case.graph)
    if measured.collective_bytes is not None:
        result["collective_mb"] = {kind: size / 1e6 for kind, size in measured.collective_bytes.items()}
    if case.routing is not None:
        result |= of_all_ranks(result)
    return result


def of_all_ranks(result: dict[str, Any]) -> dict[str, float]:
    """Where loads differ, rank 0 stands for no other: the largest peak, and what all give to all-to-alls."""
    own = result["peak_gib"], result["collective_mb"].get("all_to_all", 0.0)
    by_rank = [own] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    peaks, exchanged = zip(*by_rank, strict=True)
    return {"largest_peak_gib": max(peaks), "all_to_all_mb_of_all": sum(exchanged)}


def energy_of(step: Callable[[], Any], num_steps: int, meter: EnergyMeter) -> dict[str, float]:
    """Joules of a step of all GPUs, and watts of one; all ranks take as many steps."""
    count = torch.tensor(num_steps, device=current_device())
    if dist.is_initialized():
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
    spent = meter.of_calls(step, int(count), sync)
    both = torch.tensor([spent.joules, spent.watts], dtype=torch.float64, device=current_device())
    if dist.is_initialized():
        dist.all_reduce(both)
    joules, watts = both.tolist()
    return {"joules_per_step": joules, "gpu_w": watts / (dist.get_world_size() if dist.is_initialized() else 1)}


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def deepspeed_step(case: Case) -> Measured:
    """As `torch_step`, by DeepSpeed."""
    import deepspeed_peers  # here, as only these cases need DeepSpeed

    with current_device():
        model = dense_model(case, torch.bfloat16)
    step, num_batches = deepspeed_peers.deepspeed_step(
        model,
        num_experts=case.num_experts,
        tensor_parallel_size=case.layout.get("tp", 1),
        expert_parallel_size=case.layout["ep"],
        checkpointing=case.checkpointing is not None,
        batch_size=case.batch_size,
        length=case.length,
    )
    return Measured(step, num_batches)


def torch_step(case: Case) -> Measured:
    """A training step in bfloat16."""
    device = current_device()
    plugin = TedPlugin(**(case.layout if case.system == "ours" else {}))
    if case.system == "dense":
        model = dense_model(case).to(device)
        num_batches = 1
    else:
        distributed_config = plugin.distributed_config
        if case.system == "transformers":
            distributed_config = (
                DistributedConfig(ep_implementation="all_to_all", **case.layout) if case.layout else None
            )
        model = sharded_model(case, distributed_config, device)
        num_batches = distributed_config.dp_size if distributed_config is not None else 1
    model.train(not case.forward)
    if case.checkpointing is not None:
        kwargs = plugin.activation_checkpointing_kwargs if case.checkpointing != "full" else {"use_reentrant": False}
        model.activation_checkpointing_enable(kwargs)
    if case.optimizer == "fused":
        # float32 masters are what the tiled optimizer keeps; torch's fused one steps bfloat16 weights as they are
        on_gpu = torch.cuda.is_available()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu, capturable=on_gpu)
    else:
        optimizer_class, kwargs = plugin.tiled_adamw(lr=1e-4, capturable=case.graph)
        optimizer = optimizer_class(model.parameters(), **kwargs)
    tp_size = plugin.tp_size if case.system == "ours" else 1
    batch = dist.get_rank() // tp_size if dist.is_initialized() else 0
    if case.routing is not None:
        route_as(model, case.routing, seed=batch)
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(10, model.config.vocab_size, (case.batch_size, case.length), generator=generator).to(device)
    # in a capture transformers cannot see that a mask hides nothing, and attention with one is slower
    mask = None if case.graph else torch.ones_like(ids)
    autocast = torch.autocast(device.type, torch.bfloat16) if case.system == "dense" else nullcontext()

    peaks: list[torch.Tensor] = []  # of the last step; that of a graph stands in the same tensor

    def step() -> torch.Tensor:
        with bounded_expert_load(model, case.load_bound) if case.load_bound else nullcontext() as overflow:
            for micro_batch in range(case.accumulation):
                if case.accumulation > 1:
                    defer(model, case, is_last=micro_batch == case.accumulation - 1)
                with autocast, torch.set_grad_enabled(not case.forward):
                    loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
                if not case.forward:
                    loss.backward()
            if overflow is not None:
                peaks[:] = [overflow.peak()]
        if not case.forward:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    num_batches *= case.accumulation
    load = (lambda: float(peaks[0])) if case.load_bound else None
    if not case.graph:
        return Measured(step, num_batches, load=load)
    torch.cuda.manual_seed(batch)  # replays go on from here: ranks that share a batch must draw the same
    replay, collective_bytes = captured(step)
    return Measured(replay, num_batches, collective_bytes, load)


def defer(model: Any, case: Case, *, is_last: bool) -> None:
    """Have FSDP2 reduce gradients with the last micro-batch, and keep until then what it has gathered, unless not."""
    model.set_requires_gradient_sync(is_last)
    model.set_reshard_after_backward(is_last or case.gathers_again)


def captured(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], torch.Tensor], dict[str, int]]:
    """The step as one CUDA graph, whose loss stands in the same tensor after every replay, and its collectives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):  # they make what is made once: optimizer states, communicators, kernels
            with CollectiveBytes() as counter:
                step()
    torch.cuda.current_stream().wait_stream(stream)
    sync()
    reset_peak()  # replays allocate nothing: the capture counts
    gc.collect()
    gc.disable()  # nothing that a graph or a stream belongs to may go away in the middle of a capture
    graph = torch.cuda.CUDAGraph()
    try:
        # NCCL's watchdog, a thread of its own, queries events meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            loss = step()
    finally:
        gc.enable()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay, counter.bytes


def config_of(case: Case) -> ZCodeM3Config:
    d_model, encoder_layers, decoder_layers, num_heads = BASES[case.base]
    return ZCodeM3Config(
        vocab_size=128_000 if case.base != "tiny" else 1024, d_model=d_model, encoder_layers=encoder_layers,
        decoder_layers=decoder_layers, encoder_ffn_dim=4 * d_model, decoder_ffn_dim=4 * d_model,
        encoder_attention_heads=num_heads, decoder_attention_heads=num_heads, num_experts=case.num_experts,
        num_experts_per_tok=1, encoder_sparse_step=2, decoder_sparse_step=2, dropout=0.1,
        capacity_factor=case.capacity_factor,
        attention_dropout=0.0, activation_dropout=0.0, max_position_embeddings=max(512, case.length),
    )  # fmt: skip


def active_parameters(case: Case) -> float:
    """Parameters that a pair of source and target token goes through, one expert per sparse layer, with the head."""
    config = config_of(case)
    d = config.d_model
    return config.encoder_layers * 12 * d * d + config.decoder_layers * 16 * d * d + config.vocab_size * d


def dense_model(case: Case, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    config = config_of(case)
    names = ("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim")
    names += ("encoder_attention_heads", "decoder_attention_heads", "max_position_embeddings", "dropout")
    fields = {name: getattr(config, name) for name in names}
    fields |= {"attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    return AutoModelForSeq2SeqLM.from_config(M2M100Config(**fields), dtype=dtype)


def sharded_model(case: Case, distributed_config: Any, device: torch.device) -> Any:
    """As `from_pretrained(distributed_config=...)`, with random weights in place of a checkpoint's."""
    with torch.device("meta"), init.no_tie_weights():
        model: Any = ZCodeM3ForConditionalGeneration(config_of(case)).to(torch.bfloat16)
    if case.experts_implementation is not None or torch.cuda.is_available():
        model.set_experts_implementation(case.experts_implementation or "zcode_fused")
    model.config.distributed_config = distributed_config
    if distributed_config is not None:
        _, meshes = initialize_distributed_mesh(distributed_config)
        model = type(model).maybe_distribute_model(model, distributed_config, meshes)
    model.to_empty(device=device)
    model.tie_weights(recompute_mapping=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if name.endswith("bias"):
                local.zero_()
            elif "layer_norm" in name:
                local.fill_(1.0)
            else:
                local.normal_(std=0.02)
        for module in model.modules():
            if hasattr(module, "table"):
                module.weights.copy_(module.table())
    if case.layout.get("offload"):
        distributed_config.finish_loading(model)
    return model


# ---- the driver ----


def worker(path: Path) -> None:
    """Run the cases of a file in this process of a `torchrun`; rank 0 adds a line to the output for each."""
    job = json.loads(path.read_text())
    if job["emulated_nodes"] > 1:
        emulate(job["emulated_nodes"])
    try:
        cases = [Case(**fields) for fields in job["cases"]]
        run_cases(cases, Path(job["output"]), job["num_steps"], job["energy_s"])
    except Exception as error:
        # the other ranks may wait for this one for ever: let torchrun end them all, with the first error kept
        with suppress(FileExistsError), open(job["error"], "x", encoding="utf-8") as file:
            file.write(described(error))
        raise


def run_cases(cases: list[Case], output: Path, num_steps: int, energy_s: float) -> None:
    """In every process of a launcher."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    for case in cases:
        result = run_case(case, num_steps, energy_s)
        if int(os.environ["RANK"]) == 0:
            with open(output, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"name": case.name, **asdict(case), **result}) + "\n")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def described(error: BaseException) -> str:
    """With what it came from: the end of a capture fails, too, if something in it has."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    return ", then ".join(f"{type(e).__name__}: {str(e)[:200]}" for e in dict.fromkeys((first, error)))


def print_table(results: list[dict[str, Any]], machines: Machines) -> None:
    columns = ("case", "GPUs", "ms/step", "tokens/s", "TFLOP/s/GPU", "MFU", "peak GiB")
    columns += ("collectives ms", "all-to-all MB", "other MB", "J/step", "W/GPU", "idle W")
    table = Table(*columns, title=str(machines))
    for result in results:
        if "error" in result:
            table.add_row(result["name"], str(result["num_gpus"]), result["error"], *[""] * 10)
            continue
        device_ms = result.get("device_ms", {})
        collectives = sum(spent for kind, spent in device_ms.items() if kind != "compute")
        sent = result.get("collective_mb")
        exchanged = sent.get("all_to_all", 0.0) if sent is not None else 0.0
        name = result["name"]
        if result.get("load", 0.0) > 1.0:
            name += f": too many tokens for a rank, {result['load']:.2f} of its rows"
        table.add_row(
            name, str(result["num_gpus"]), f"{result['step_ms']:.1f}", f"{result['tokens_per_s']:,.0f}",
            f"{result['tflops_per_gpu']:.0f}", f"{result['mfu']:.1%}" if "mfu" in result else "",
            f"{result['peak_gib']:.1f}", f"{collectives:.1f}",
            *((f"{exchanged:.1f}", f"{sum(sent.values()) - exchanged:.1f}") if sent is not None else ("", "")),
            *(f"{result[name]:.0f}" if name in result else "" for name in ("joules_per_step", "gpu_w", "idle_w")),
        )  # fmt: skip
    Console(width=200).print(table)


def cases_of(arguments: argparse.Namespace, machines: Machines) -> list[Case]:
    """Those that are asked for, and that the machines can be divided between.

    Raises:
        ValueError: there are none, or a launcher has started processes that cannot run all of them.
    """
    systems, only = arguments.systems, arguments.only
    num_gpus = arguments.gpus or machines.world_size or torch.cuda.device_count()
    if arguments.suite == "nodes":
        if num_gpus == 0:
            raise ValueError("--suite nodes needs GPUs, and this machine has none")
        check_ranks(num_gpus, machines)
    cases = [
        case
        for case in suite_of(arguments.suite, num_gpus, machines.number, arguments.shapes, arguments.pair)
        if (not systems or case.system in systems)
        and (not only or any(text in case.name for text in only))
        and case.num_gpus % machines.number == 0
        and case.num_gpus == (machines.world_size or case.num_gpus)
    ]
    if not cases:
        raise ValueError(f"--suite {arguments.suite} has no such case for {machines}: leave --systems and --only out")
    if machines.world_size is not None and len({processes_of(case) for case in cases}) > 1:
        raise ValueError(
            "one launch runs either one case of DeepSpeed or cases without it: give --systems ours, or --systems "
            "deepspeed with --only"
        )
    return cases


def processes_of(case: Case) -> tuple[int, str]:
    """Neighbours in a suite that agree in this share processes: DeepSpeed, which keeps its groups in globals, never."""
    return case.num_gpus, case.name if case.system == "deepspeed" else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite", choices=["tiny", "one", "two", "four", "eight", *OF_TWO, "nodes", *SKEWED], default="one"
    )
    parser.add_argument("--pair", default="en-de", help="of the skewed suites: en-XX or XX-en")
    parser.add_argument("--nodes", type=int, help="emulate so many machines on this host; a launcher has its own")
    parser.add_argument(
        "--shapes", nargs="+", default=["1.3Bx16"], help="of the suites nodes and across, such as 6.7Bx8"
    )
    parser.add_argument("--gpus", type=int, help="of the suite nodes, of all machines; default: all")
    parser.add_argument("--systems", nargs="*", help="only these, such as ours deepspeed")
    parser.add_argument("--only", nargs="+", metavar="SUBSTRING", help="only cases whose name has one of these")
    parser.add_argument("--output", type=Path, default=Path("ted.json"))
    parser.add_argument(
        "--time_limit_s", type=float, default=Limits.launch_s, help="per launch and what it starts anew"
    )
    parser.add_argument(
        "--case_limit_s", type=float, default=Limits.case_s, help="then the next cases go on without it"
    )
    parser.add_argument("--steps", type=int, default=Limits.num_steps, help="that are timed")
    parser.add_argument(
        "--energy_s", type=float, default=Limits.energy_s, help="of steps whose energy is measured; or 0"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker)
        return
    machines = machines_of(arguments.nodes)
    if machines.is_emulated and not torch.cuda.is_available():
        raise ValueError(f"--nodes ({machines.number}) needs GPUs: NCCL is what takes one host for several machines")
    cases = cases_of(arguments, machines)
    limits = Limits(arguments.time_limit_s, arguments.case_limit_s, arguments.steps, arguments.energy_s)
    lines = arguments.output.with_suffix(".jsonl")
    if int(os.environ.get("RANK", "0")) == 0:
        lines.unlink(missing_ok=True)
        print(f"{len(cases)} cases on {machines}", flush=True)
    if machines.world_size is not None:
        run_cases(cases, lines, arguments.steps, arguments.energy_s)
        if int(os.environ["RANK"]) > 0:
            return
    else:
        for _, group in itertools.groupby(cases, key=processes_of):
            launch(list(group), lines, limits, machines)
    results = results_in(lines)
    versions = {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    record = {"versions": versions, "machines": asdict(machines), "results": results}
    arguments.output.write_text(json.dumps(record, indent=1))
    print_table(results, machines)
    print_ratios(results)


if __name__ == "__main__":
    main()
