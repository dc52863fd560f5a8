"""The command that says what a training needs and what it costs."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import naming

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
GIB = 2**30


def plan(
    model: Annotated[Path, typer.Argument(help="config.json of ZCodeM3, or a folder with one.")],
    gpus: Annotated[int, typer.Option(help="All of them.")],
    gpu: Annotated[str, typer.Option(help="Such as h100-80gb, or a YAML file with the fields of a GPU.")],
    gpus_per_node: Annotated[int, typer.Option(help="Of one machine, joined by NVLink.")] = 8,
    tokens: Annotated[str, typer.Option(help="Source and target tokens of the whole training, such as 30B.")] = "1B",
    batch_tokens: Annotated[int, typer.Option(help="Source and target tokens of a step, over all GPUs.")] = 2**20,
    sequence: Annotated[int, typer.Option(help="Tokens of a source, and of a target.")] = 512,
    layouts: Annotated[int, typer.Option(help="How many of the best to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the layouts that cannot be.")] = False,
) -> None:
    """The best layouts to train a model on GPUs: memory by term, tokens per second, hours, energy."""
    from .. import ZCodeM3Config, plan_training

    with naming("MODEL"):
        if not model.exists():
            raise ValueError(f"{model} does not exist; give a config.json, or a folder with one")
        config = ZCodeM3Config.from_pretrained(model)
    found = plan_training(
        config,
        num_gpus=gpus,
        gpu=gpu,
        gpus_per_node=gpus_per_node,
        batch_tokens=batch_tokens,
        sequence_length=sequence,
        total_tokens=_count(tokens),
    )
    if as_json:
        print(json.dumps(found.as_dict(layouts), indent=2))
        return
    best = found.best
    print(f"{found.num_parameters:,} parameters on {gpus} x {found.gpu.name}; per GPU and micro-batch "
          f"{best.workload.batch_size} pairs of {sequence} + {sequence} tokens")  # fmt: skip
    print(best.plugin)
    _print_table(found.layouts[:layouts])
    if found.impossible:
        print(f"{len(found.impossible)} combinations of tp, ep and etp cannot be; --json has the reasons")


def _count(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"--tokens ({text!r}) must be a number, maybe with K, M, B or T behind it, such as 30B")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _print_table(layouts: Any) -> None:
    header = ["tp", "ep", "etp", "dp", "replicas", "ZeRO", "offload", "checkpointing", "pairs", "times", "weights",
              "optimizer", "gathered", "logits", "activations", "peak GiB", "ms", "tokens/s", "hours",
              "kWh"]  # fmt: skip
    rows = [header]
    for planned in layouts:
        layout, workload, memory = planned.layout, planned.workload, planned.memory
        sizes = (layout.tensor_parallel_size, layout.expert_parallel_size, layout.expert_tensor_parallel_size,
                 layout.data_parallel_size, layout.dp_replicate_size)  # fmt: skip
        of_activations = memory.activations + memory.exchange
        gathered, logits = memory.gathered + memory.whole_gradients, memory.logits + memory.loss
        terms = (memory.weights, memory.optimizer, gathered, logits, of_activations, memory.peak)
        rows.append([
            *map(str, (*sizes, layout.zero_stage)), layout.offload or "",
            workload.checkpointing or "none", str(workload.batch_size), str(workload.accumulation),
            *(f"{term / GIB:.1f}" for term in terms), f"{planned.step.total * 1e3:,.0f}",
            f"{planned.tokens_per_s:,.0f}", f"{planned.hours:,.1f}", f"{planned.kwh:,.0f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
