"""Find layouts that train a model on given GPUs, with their speed, duration and energy."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..distributed.layout import Layout, sizes_of_axes
from ..distributed.layout_check import check_model
from ..models.configuration_zcode_m3 import ZCodeM3Config
from .constants import MEMORY, POWER, TIME, origins
from .gpus import GIB, Gpu, gpu_of, usable_bytes
from .memory import Memory, memory_of_rank
from .memory_picture import write_memory_picture
from .model_config import stored_bits
from .parameters import SIDES, RankParameters, num_parameters, parameters_of_rank
from .step_time import StepTime, time_of_step, watts
from .workload import Checkpointing, Workload, check_counts

CHECKPOINTING: tuple[Checkpointing | None, ...] = (None, "full", "communication-aware")


@dataclass(frozen=True)
class PlannedLayout:
    """A layout that fits.

    Attributes:
        layout, workload: settings for [`TedPlugin`] and the Trainer.
        parameters, memory, step: numbers of one rank.
        tokens_per_s: source and target tokens per second of all GPUs.
        hours, kwh: duration and energy of the whole training.
    """

    layout: Layout
    workload: Workload
    parameters: RankParameters
    memory: Memory
    step: StepTime
    tokens_per_s: float
    hours: float
    kwh: float

    @property
    def plugin(self) -> str:
        """The line of code that makes the plugin."""
        layout = self.layout
        given: dict[str, Any] = {}
        for name in ("tensor_parallel_size", "expert_parallel_size"):
            if getattr(layout, name) > 1:
                given[name] = getattr(layout, name)
        if layout.expert_tensor_parallel_size != layout.tensor_parallel_size:
            given["expert_tensor_parallel_size"] = layout.expert_tensor_parallel_size
        if layout.dp_replicate_size > 1:
            given["dp_replicate_size"] = layout.dp_replicate_size
        if layout.zero_stage > 1:
            given["zero_stage"] = layout.zero_stage
        if layout.offload:
            given["offload"] = layout.offload
        if not layout.duplicate_token_dropping:
            given["duplicate_token_dropping"] = False
        if self.workload.checkpointing == "full":
            given["communication_aware_checkpointing"] = False
        return f"TedPlugin({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    @property
    def arguments(self) -> str:
        """Arguments of `TrainingArguments` besides `parallelism_config=plugin`."""
        given = [f"per_device_train_batch_size={self.workload.batch_size}"]
        if self.workload.accumulation > 1:
            given.append(f"gradient_accumulation_steps={self.workload.accumulation}")
        if self.workload.checkpointing is not None:
            given.append("activation_checkpointing=True")
            given.append("activation_checkpointing_kwargs=plugin.activation_checkpointing_kwargs")
        return ", ".join(given)

    @property
    def name(self) -> str:
        """Sizes of the axes and options, in words."""
        layout = self.layout
        parts = [
            f"tp {layout.tensor_parallel_size} x ep {layout.expert_parallel_size}, ZeRO {layout.zero_stage}",
            "" if layout.expert_tensor_parallel_size == layout.tensor_parallel_size or layout.expert_parallel_size == 1
            else f"etp {layout.expert_tensor_parallel_size}",
            "offload" if layout.offload else "",
            "" if layout.duplicate_token_dropping else "duplicates sent",
            f"checkpointing {self.workload.checkpointing}" if self.workload.checkpointing else "",
        ]  # fmt: skip
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class ImpossibleLayout:
    """An impossible layout, and the reason.

    Attributes:
        sizes, reason: sizes and reason in words.
        least_bytes: lowest memory of a GPU over all options, if memory is the reason; `None` if sizes are.
    """

    sizes: str
    reason: str
    least_bytes: float | None = None


@dataclass(frozen=True)
class TrainingPlan:
    """
    Attributes:
        gpu, num_gpus, gpus_per_node: the GPUs of the plan.
        num_parameters: number of parameters of the model.
        batch_tokens, sequence_length, total_tokens: the requested numbers.
        layouts: layouts that fit, the fastest first.
        impossible: layouts that do not fit.
    """

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    num_parameters: int
    batch_tokens: int
    sequence_length: int
    total_tokens: int
    layouts: tuple[PlannedLayout, ...]
    impossible: tuple[ImpossibleLayout, ...]

    @property
    def best(self) -> PlannedLayout:
        """
        Raises:
            ValueError: no layout fits.
        """
        if self.layouts:
            return self.layouts[0]
        nearest = sorted(self.impossible, key=lambda layout: layout.least_bytes or math.inf)
        reasons = "; ".join(f"{layout.sizes}: {layout.reason}" for layout in nearest[:2])
        raise ValueError(
            f"no layout of {self.num_gpus} x {self.gpu.name} trains {self.num_parameters:,} parameters with "
            f"{self.batch_tokens:,} tokens per step: use more or larger GPUs, or another batch ({reasons})"
        )

    def write_picture(self, path: str | Path, num_layouts: int = 5) -> None:
        """Write a PNG file with bars of a GPU's memory use in the best layouts.

        Args:
            path: ends with .png; an earlier picture of a plan is replaced.
            num_layouts: number of bars, at most 20.

        Raises:
            ValueError: no layout fits, another file exists at `path`, or matplotlib is not installed.
        """
        bars = {f"{i + 1}. {p.name}": p.memory for i, p in enumerate(self.layouts[:num_layouts])} if self.best else {}
        title = f"{self.num_parameters / 1e9:,.1f} B parameters, trained on {self.num_gpus} x {self.gpu.name}"
        write_memory_picture(path, bars, usable_bytes(self.gpu), title)

    def as_dict(self, num_layouts: int = 10) -> dict[str, Any]:
        """The plan as plain values for JSON, with the best layouts."""
        fields = {name: value for name, value in vars(self).items() if name not in ("gpu", "layouts", "impossible")}
        return {
            "gpu": asdict(self.gpu),
            **fields,
            "layouts": [
                {
                    "plugin": layout.plugin,
                    "training_arguments": layout.arguments,
                    **asdict(layout),
                    "peak_bytes": layout.memory.peak,
                    "step_s": layout.step.total,
                }
                for layout in self.layouts[:num_layouts]
            ],
            "impossible": [asdict(layout) for layout in self.impossible],
            "constants": origins(TIME) | origins(POWER) | origins(MEMORY),
        }


def plan_training(
    config: ZCodeM3Config,
    *,
    num_gpus: int,
    gpu: str | Gpu,
    gpus_per_node: int = 8,
    batch_tokens: int = 2**20,
    sequence_length: int | None = None,
    total_tokens: int = 10**9,
    dtype: str = "bfloat16",
    optimizer: str = "tiled_adamw",
    host_gib_per_gpu: float = MEMORY.host_gib_per_gpu,
) -> TrainingPlan:
    """Try layouts, ZeRO stages, activation checkpointing, offload and micro-batches, and rank those that fit.

    Args:
        num_gpus: number of all GPUs, in machines of `gpus_per_node`.
        gpu: a name of `planning.gpus.GPUS`, a YAML file, or a [`Gpu`].
        batch_tokens: source and target tokens per step, over all GPUs.
        sequence_length: tokens of a source, and as many of a target; by default 512, or the largest power of two that
            the model's positions allow.
        total_tokens: source and target tokens of the whole training.
        dtype: dtype of the weights, "bfloat16" or "float32".
        optimizer: a key of `planning.workload.BYTES_OF_STATES`.
        host_gib_per_gpu: GiB of main memory per GPU; it limits `offload`.

    Raises:
        ValueError: a number is not whole or below 1; GPUs do not fill their machines; the batch is not a whole number
            of sentence pairs; a sequence is longer than the model's positions; the GPU is unknown; or the model is
            quantized and cannot be trained.
    """
    gpu = gpu_of(gpu)
    if sequence_length is None:
        sequence_length = min(512, 1 << (config.max_position_embeddings.bit_length() - 1))
    numbers = {
        "num_gpus": num_gpus, "gpus_per_node": gpus_per_node, "batch_tokens": batch_tokens,
        "sequence_length": sequence_length, "total_tokens": total_tokens,
    }  # fmt: skip
    _check_numbers(config, numbers)
    Workload(1, 1, 1, dtype=dtype, optimizer=optimizer)  # checks the names
    _check_trains(config, host_gib_per_gpu)
    gpus_per_node = min(gpus_per_node, num_gpus)
    batch = _Batch(batch_tokens // (2 * sequence_length), sequence_length, total_tokens)
    machine = _Machine(gpu, num_gpus, gpus_per_node, host_gib_per_gpu)
    layouts: list[PlannedLayout] = []
    impossible: list[ImpossibleLayout] = []
    for sizes in _sizes(config, num_gpus, gpus_per_node):
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
        try:
            found = [*_fitting(config, machine, batch, sizes, dtype, optimizer)]
        except _TooSmall as error:
            impossible.append(ImpossibleLayout(shown, str(error), error.least_bytes))
        except ValueError as error:
            impossible.append(ImpossibleLayout(shown, str(error)))
        else:
            layouts += found
    layouts.sort(key=lambda layout: (-layout.tokens_per_s, layout.memory.peak))
    return TrainingPlan(
        gpu=gpu, num_gpus=num_gpus, gpus_per_node=gpus_per_node, num_parameters=num_parameters(config),
        batch_tokens=batch_tokens, sequence_length=sequence_length, total_tokens=total_tokens,
        layouts=tuple(layouts), impossible=tuple(impossible),
    )  # fmt: skip


class _TooSmall(ValueError):
    """A layout needs at least `least_bytes` of a GPU, with any batch, offloaded or not."""

    def __init__(self, message: str, least_bytes: float):
        super().__init__(message)
        self.least_bytes = least_bytes


@dataclass(frozen=True)
class _Batch:
    num_pairs: int  # sentence pairs of a step, over all GPUs
    length: int
    total_tokens: int


@dataclass(frozen=True)
class _Machine:
    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    host_gib_per_gpu: float


def _check_numbers(config: ZCodeM3Config, numbers: Mapping[str, int]) -> None:
    check_counts(numbers)
    num_gpus, per_node = numbers["num_gpus"], numbers["gpus_per_node"]
    if num_gpus > per_node and num_gpus % per_node:
        raise ValueError(f"num_gpus ({num_gpus}) must be a multiple of gpus_per_node ({per_node})")
    length, batch_tokens = numbers["sequence_length"], numbers["batch_tokens"]
    if length > config.max_position_embeddings:
        raise ValueError(
            f"sequence_length ({length}) must be at most the model's max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    if batch_tokens % (2 * length):
        raise ValueError(
            f"batch_tokens ({batch_tokens}) must be a multiple of {2 * length}, the tokens of two sequences of "
            f"sequence_length ({length})"
        )


def _check_trains(config: ZCodeM3Config, host_gib_per_gpu: float) -> None:
    if (stored := stored_bits(config)) is not None:
        raise ValueError(
            f"the model is quantized ({stored.bits} bits) and cannot be trained: plan for the model from which it was "
            "made, or for translation (--serve, plan_serving)"
        )
    if not 0 <= host_gib_per_gpu < math.inf:
        raise ValueError(f"host_gib_per_gpu ({host_gib_per_gpu}) must be 0 or a positive number")


def _sizes(config: ZCodeM3Config, num_gpus: int, gpus_per_node: int) -> Iterator[dict[str, int]]:
    """Sizes of tp, ep and etp to try; tp stays inside a machine, because its sums do not overlap with computation."""
    counts = [count for side in SIDES for count in config.num_experts_per_layer(side).values()]
    expert_sizes = _divisors(math.gcd(*counts)) if counts and num_gpus > 1 else [1]
    for tp in _divisors(num_gpus):
        if tp > gpus_per_node:
            continue
        for ep in expert_sizes:
            for etp in [size for size in _divisors(tp) if ep > 1 or size == tp]:
                yield {"tp": tp, "ep": ep, "etp": etp}


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _fitting(
    config: ZCodeM3Config,
    machine: _Machine,
    batch: _Batch,
    sizes: Mapping[str, int],
    dtype: str,
    optimizer: str,
) -> list[PlannedLayout]:
    """All layouts with one set of sizes that fit.

    Raises:
        ValueError: none fits; the message says why.
    """
    tp, ep, etp, dp = sizes_of_axes(machine.num_gpus, sizes["tp"], sizes["ep"], sizes["etp"], None)
    base = Layout(tp, dp, ep, etp)
    check_model(config, base)
    if batch.num_pairs % dp:
        raise ValueError(f"{batch.num_pairs} sentence pairs of a step must be divisible by data_parallel_size ({dp})")
    found, least = [], math.inf
    for layout in _options(base, machine.num_gpus // machine.gpus_per_node):
        for checkpointing in CHECKPOINTING:
            if checkpointing == "communication-aware" and tp == ep == 1:
                continue  # no collective in a layer
            planned, peak = _largest_micro_batch(config, machine, batch, layout, (checkpointing, dtype, optimizer))
            least = min(least, peak)
            if planned is not None:
                found.append(planned)
    if not found:
        offloaded = None if dp == 1 else memory_of_rank(config, replace(base, offload="cpu"), Workload(1, 1, 1)).host
        raise _too_small(machine, least, offloaded)
    return found


def _too_small(machine: _Machine, least: float, offloaded: int | None) -> _TooSmall:
    """Why nothing fits; `offloaded` is the main memory per GPU that offload takes, or `None` without offload."""
    usable, of_host = usable_bytes(machine.gpu) / GIB, ""
    if offloaded is not None and offloaded > machine.host_gib_per_gpu * GIB:
        of_host = f"; offload takes {offloaded / GIB:,.1f} GiB of the host per GPU, which has "
        of_host += f"{machine.host_gib_per_gpu:,g}"
    return _TooSmall(
        f"it takes at least {least / GIB:,.1f} GiB per GPU, but {usable:,.1f} GiB can be used{of_host}", least
    )


def _options(base: Layout, num_nodes: int) -> Iterator[Layout]:
    stages = (1, 2, 3) if base.data_parallel_size > 1 else (1,)
    offloads = (None, "cpu") if base.data_parallel_size > 1 else (None,)
    has_duplicates = base.expert_parallel_size > 1 and base.expert_tensor_parallel_size > 1
    for layout, stage, offload in itertools.product(_with_replicas(base, num_nodes), stages, offloads):
        for drops in (True, False) if has_duplicates else (True,):
            yield replace(layout, zero_stage=stage, offload=offload, duplicate_token_dropping=drops)


def _with_replicas(base: Layout, num_nodes: int) -> list[Layout]:
    """The layout itself, and with one replica per machine if sizes allow it."""
    if num_nodes == 1:
        return [base]
    try:
        return [base, replace(base, dp_replicate_size=num_nodes)]
    except ValueError:
        return [base]


def _largest_micro_batch(
    config: ZCodeM3Config,
    machine: _Machine,
    batch: _Batch,
    layout: Layout,
    options: tuple[Checkpointing | None, str, str],
) -> tuple[PlannedLayout | None, float]:
    """The workload with the fewest micro-batches that fits, and the smallest peak that was found."""
    checkpointing, dtype, optimizer = options
    pairs = batch.num_pairs // layout.data_parallel_size
    limit, least = usable_bytes(machine.gpu), math.inf
    for accumulation in _divisors(pairs):
        if layout.zero_stage == 2 and accumulation == 1:
            continue  # then stage 1 is the same
        workload = Workload(
            pairs // accumulation, batch.length, batch.length, accumulation, dtype, optimizer, checkpointing
        )
        memory = memory_of_rank(config, layout, workload)
        if memory.host <= machine.host_gib_per_gpu * GIB:
            least = min(least, memory.peak)
            if memory.peak <= limit:
                return _planned(config, machine, batch, layout, workload, memory), least
    return None, least


def _planned(
    config: ZCodeM3Config, machine: _Machine, batch: _Batch, layout: Layout, workload: Workload, memory: Memory
) -> PlannedLayout:
    step = time_of_step(config, layout, workload, machine.gpu, machine.gpus_per_node)
    tokens_per_s = 2 * batch.length * batch.num_pairs / step.total
    hours = batch.total_tokens / tokens_per_s / 3600
    return PlannedLayout(
        layout=layout, workload=workload, parameters=parameters_of_rank(config, layout), memory=memory, step=step,
        tokens_per_s=tokens_per_s, hours=hours,
        kwh=hours * machine.num_gpus * watts(step.busy_share, machine.gpu) / 1000,
    )  # fmt: skip


__all__ = [
    "ImpossibleLayout",
    "PlannedLayout",
    "TrainingPlan",
    "plan_training",
]
