"""The command that predicts what a training or a translation needs and costs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
GIB = 2**30
_TRAINING, _SERVING = "Training", "Translation (--serve)"


def plan(
    model: Annotated[
        Path, typer.Argument(help="config.json of ZCodeM3 or NLLB-MoE, or a folder with one; weights are not read.")
    ],
    gpus: Annotated[int, typer.Option(help="Number of GPUs, of all machines together.")],
    gpu: Annotated[
        str,
        typer.Option(
            help="v100-32gb, a100-40gb, a100-80gb, h100-80gb, h200-141gb, or a YAML file: see docs/planning.md."
        ),
    ],
    serve: Annotated[bool, typer.Option("--serve", help="Plan translation with the model, not its training.")] = False,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of one machine, joined by NVLink.")] = 8,
    host_memory: Annotated[float, typer.Option(help="GiB of main memory that a machine has per GPU.")] = 128,
    sequence: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a source, and as many of a target; default: at most 512 to train, 64 to translate."
        ),
    ] = None,
    layouts: Annotated[int, typer.Option(min=1, help="How many layouts to show, the best first.")] = 5,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON with all terms and with the layouts that are impossible.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="PNG file with bars that show what fills a GPU's memory; needs matplotlib.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Source and target tokens of the whole training, such as 30B; default: 1B.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Source and target tokens per step, over all GPUs; default: 1048576.", rich_help_panel=_TRAINING
        ),
    ] = None,
    sentences: Annotated[
        int | None,
        typer.Option(help="Sentences that a GPU translates at once; default: 16.", rich_help_panel=_SERVING),
    ] = None,
    beams: Annotated[
        int | None, typer.Option(help="Beams of the search; 1 is greedy; default: 4.", rich_help_panel=_SERVING)
    ] = None,
    expert_memory: Annotated[
        str | None,
        typer.Option(
            help="Size of the experts that are on a GPU at once, such as 8GB; default: all, or as many as fit.",
            rich_help_panel=_SERVING,
        ),
    ] = None,
    zipf: Annotated[
        float | None,
        typer.Option(
            help="Zipf exponent of how unevenly tokens choose experts; default: 0, evenly. One pair of languages has "
            "2 to 4.",
            rich_help_panel=_SERVING,
        ),
    ] = None,
    cuda_graphs: Annotated[
        bool | None, typer.Option(help="Run steps as CUDA graphs where that is possible.", rich_help_panel=_SERVING)
    ] = None,
    quantized_kernels: Annotated[
        bool | None,
        typer.Option(
            help="Compute quantized experts in Triton kernels, not in a loop; default: yes, but not on V100.",
            rich_help_panel=_SERVING,
        ),
    ] = None,
) -> None:
    """Show which layouts to train a model fit on GPUs, best first, with memory, tokens per second, hours and energy.

    With --serve: show ways to translate with the model, with memory and milliseconds per token.
    """
    from .. import read_planned_config

    config = read_planned_config(model)
    machines: dict[str, Any] = {
        "num_gpus": gpus, "gpu": gpu, "gpus_per_node": gpus_per_node, "host_gib_per_gpu": host_memory,
    }  # fmt: skip
    training = {"batch_tokens": batch_tokens, "sequence_length": sequence}
    serving = {"batch_size": sentences, "num_beams": beams, "zipf": zipf}
    if serve:
        _refuse(
            {"--tokens": tokens, "--batch-tokens": batch_tokens},
            "is for training, but --serve plans translation; leave one of them out",
        )
        options = _given(serving | {"source_length": sequence, "target_length": sequence})
        flags = {"cuda_graphs": cuda_graphs, "quantized_kernels": quantized_kernels}
        found = _plan_serving(config, machines | options | _given(flags | {"expert_memory": _size(expert_memory)}))
    else:
        flags = {"--cuda-graphs": cuda_graphs, "--quantized-kernels": quantized_kernels}
        named: dict[str, Any] = {
            "--sentences": sentences,
            "--beams": beams,
            "--zipf": zipf,
            "--expert-memory": expert_memory,
        }
        _refuse(named | flags, "is for translation: give --serve, too")
        total = {} if tokens is None else {"total_tokens": _count(tokens)}
        found = _plan_training(config, machines | _given(training) | total)
    if picture is not None:
        found.write_picture(picture, layouts)
    if as_json:
        print(json.dumps(found.as_dict(layouts), indent=2))
    elif serve:
        _show_serving(found, model, layouts)
    else:
        _show_training(found, layouts)


def _plan_training(config: Any, options: dict[str, Any]) -> Any:
    from .. import plan_training

    return plan_training(config, **options)


def _plan_serving(config: Any, options: dict[str, Any]) -> Any:
    from .. import plan_serving

    return plan_serving(config, **options)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(options: dict[str, Any], why: str) -> None:
    for name, value in _given(options).items():
        raise ValueError(f"{name} ({value}) {why}")


def _size(text: str | None) -> int | None:
    from .. import ExpertMemory

    return None if text is None else ExpertMemory(text).num_bytes


def _count(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"--tokens ({text!r}) must be a number, with or without K, M, B or T behind it, such as 30B")
    return int(float(match[1]) * _UNITS[match[2].upper()])


# ---- tables ----


def _show_training(found: Any, num_layouts: int) -> None:
    best = found.best
    print(f"{found.num_parameters:,} parameters in {best.workload.dtype} on {found.num_gpus} x {found.gpu.name}; per "
          f"GPU and micro-batch {best.workload.batch_size} pairs of {found.sequence_length} + {found.sequence_length} "
          "tokens")  # fmt: skip
    print(best.plugin)
    print(f"TrainingArguments: {best.arguments}")
    _print_training(found.layouts[:num_layouts])
    print("GiB: of a GPU at its peak; host: GiB of the machine's memory per GPU; ms: milliseconds of a step")
    if found.impossible:
        print(f"{len(found.impossible)} combinations of tp, ep and etp are impossible; --json has the reasons")


def _print_training(layouts: Sequence[Any]) -> None:
    rows = [["tp", "ep", "etp", "dp", "replicas", "ZeRO", "offload", "checkpointing", "pairs", "times", "weights",
             "optimizer", "gathered", "logits", "activations", "peak GiB", "host", "ms", "tokens/s", "hours",
             "kWh"]]  # fmt: skip
    for planned in layouts:
        layout, workload, memory = planned.layout, planned.workload, planned.memory
        sizes = (layout.tensor_parallel_size, layout.expert_parallel_size, layout.expert_tensor_parallel_size,
                 layout.data_parallel_size, layout.dp_replicate_size)  # fmt: skip
        of_activations = memory.activations + memory.exchange
        gathered, logits = memory.gathered + memory.whole_gradients, memory.logits + memory.loss
        terms = (memory.weights, memory.optimizer, gathered, logits, of_activations, memory.peak, memory.host)
        rows.append([
            *map(str, (*sizes, layout.zero_stage)), layout.offload or "",
            workload.checkpointing or "none", str(workload.batch_size), str(workload.accumulation),
            *(f"{term / GIB:.1f}" for term in terms), f"{planned.step.total * 1e3:,.0f}",
            f"{planned.tokens_per_s:,.0f}", f"{planned.hours:,.1f}", f"{planned.kwh:,.0f}",
        ])  # fmt: skip
    _print_table(rows)


def _show_serving(found: Any, model: Path, num_ways: int) -> None:
    workload, best = found.workload, found.best
    at_once = f"{workload.batch_size} sentences at once with {workload.num_beams} beams"
    lengths = f"{workload.source_length} tokens to {workload.target_length}"
    print(f"{found.num_parameters:,} parameters on {found.num_gpus} x {found.gpu.name}; {at_once}, {lengths}")
    for line in found.commands(str(model)):
        print(line)
    if best.num_copies > 1:
        print(f"once for each of {best.num_copies} copies, each with its own GPUs and its own --port")
    if not workload.cuda_graphs:
        print("and, to turn CUDA graphs off, save the model with model.generation_config.cuda_graphs = False")
    _print_serving(found.ways[:num_ways])
    print(
        "GiB: of a GPU; host: GiB of main memory that a copy's experts take; ms: milliseconds from a token to the next"
    )
    print("8 and 4 bits change translations: measure them before you choose")
    for way in found.impossible:
        print(f"impossible with {way.weights}: {way.reason}")


def _print_serving(ways: Sequence[Any]) -> None:
    rows = [["weights", "GPUs each", "copies", "expert memory", "dense", "words", "experts", "keys", "logits",
             "activations", "GiB", "host", "source ms", "ms", "captured", "tokens/s", "kWh/M tokens"]]  # fmt: skip
    for way in ways:
        memory, size = way.memory, "all" if way.expert_memory is None else f"{way.expert_memory / 10**9:g} GB"
        keys = memory.own_keys + memory.source_keys
        terms = (memory.dense, memory.embedding, memory.experts, keys, memory.logits, memory.activations, memory.peak)
        host = "files" if way.experts_in_files else f"{memory.host / GIB:.1f}"
        rows.append([
            way.weights, str(way.num_gpus), str(way.num_copies), size, *(f"{term / GIB:.1f}" for term in terms), host,
            f"{way.source_s * 1e3:,.0f}", f"{way.token.total * 1e3:,.1f}", "yes" if way.token.is_captured else "no",
            f"{way.tokens_per_s:,.0f}", f"{way.kwh_per_million_tokens:,.3f}",
        ])  # fmt: skip
    _print_table(rows)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
