"""How a model can translate on given GPUs: which ways to store it fit, and the time per token of each."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..models.configuration_zcode_m3 import ZCodeM3Config
from .constants import MEMORY, POWER, SERVING, TIME, origins
from .gpus import GIB, Gpu, gpu_of, usable_bytes
from .memory_picture import write_memory_picture
from .model_config import StoredBits, stored_bits
from .parameters import num_parameters
from .serving_memory import (
    ServingMemory,
    ServingWorkload,
    default_bits,
    memory_of_serving,
    resident_bytes,
    resident_experts,
    weight_bytes,
)
from .serving_time import DecodingTime, captured_why_not, time_of_source, time_of_token
from .step_time import watts
from .workload import check_counts

GB = 10**9
WITHOUT_KERNELS = ("v100-32gb",)  # has no kernels for quantized experts: compute capability 7.0


@dataclass(frozen=True)
class PlannedServing:
    """A way to serve that fits.

    Attributes:
        stored: how weights are rounded; `None` for floats.
        expert_memory: bytes of experts on the GPU, *optional*: `ExpertMemory(expert_memory)`.
        experts_in_files: whether its other experts stay in files, because main memory is too small.
        num_gpus: GPUs that share a model.
        num_copies: copies of the model on all GPUs together.
        memory: memory of one GPU.
        token: time from a token to the next.
        source_s: seconds of the encoder, before the first token.
        tokens_per_s: target tokens per second of all copies, with the encoder's time.
        kwh_per_million_tokens: kWh for a million target tokens.
    """

    stored: StoredBits | None
    expert_memory: int | None
    experts_in_files: bool
    num_gpus: int
    num_copies: int
    memory: ServingMemory
    token: DecodingTime
    source_s: float
    tokens_per_s: float
    kwh_per_million_tokens: float

    @property
    def weights(self) -> str:
        """How weights are stored, in words."""
        if self.stored is None:
            return "floats"
        return f"int{self.stored.bits} {self.stored.what}"

    @property
    def options(self) -> str:
        """Options of `hf-moe-ted serve` and `translate`."""
        found = []
        if self.expert_memory is not None:
            found.append(f"--expert-memory {_size(self.expert_memory)}")
        if self.experts_in_files:
            found.append("--experts-in files")
        if self.num_gpus > 1:
            found.append("--device auto")
        return " ".join(found)


@dataclass(frozen=True)
class ImpossibleServing:
    """A way to serve that does not fit, and the reason."""

    weights: str
    reason: str


@dataclass(frozen=True)
class ServingPlan:
    """
    Attributes:
        gpu, num_gpus: the GPUs of the plan.
        num_parameters: number of parameters of the model.
        workload: work of each copy of the model at one time.
        is_quantized: whether the folder is quantized.
        ways: ways that fit, the fastest first; among ways within one percent the least rounded comes first.
        impossible: ways that do not fit.
    """

    gpu: Gpu
    num_gpus: int
    num_parameters: int
    workload: ServingWorkload
    is_quantized: bool
    ways: tuple[PlannedServing, ...]
    impossible: tuple[ImpossibleServing, ...]

    @property
    def best(self) -> PlannedServing:
        """
        Raises:
            ValueError: nothing fits.
        """
        if self.ways:
            return self.ways[0]
        reasons = "; ".join(f"{way.weights}: {way.reason}" for way in self.impossible)
        raise ValueError(
            f"{self.num_parameters:,} parameters cannot translate {self.workload.batch_size} sentences with "
            f"{self.workload.num_beams} beams on {self.num_gpus} x {self.gpu.name}: take more or larger GPUs, or a "
            f"smaller batch ({reasons})"
        )

    def commands(self, model: str, way: PlannedServing | None = None) -> list[str]:
        """The command lines of a way; by default of the best.

        Args:
            model: the folder, or the config.json in it.
            way: one of `ways`.
        """
        way = way or self.best
        model, lines = _folder(model), []
        if way.stored is not None and not self.is_quantized:
            target = f"{model}-int{way.stored.bits}{'-all' if way.stored.what == 'all' else ''}"
            what = " --what all" if way.stored.what == "all" else ""
            dtype = self.workload.dtype
            lines.append(
                f"hf-moe-ted quantize {model} --bits {way.stored.bits}{what} --dtype {dtype} --output {target}"
            )
            model = target
        size = self.workload.batch_size * self.workload.source_length
        shown = ",".join(map(str, range(way.num_gpus)))
        visible = f"CUDA_VISIBLE_DEVICES={shown} " if way.num_gpus < self.num_gpus else ""
        parts = [f"{visible}hf-moe-ted serve {model} --dtype {self.workload.dtype} --beams {self.workload.num_beams}"]
        parts += [f"--batch-tokens {size}", way.options]
        lines.append(" ".join(part for part in parts if part))
        return lines

    def write_picture(self, path: str | Path, num_ways: int = 5) -> None:
        """Write a PNG file with bars of a GPU's memory use in the best ways.

        Args:
            path: ends with .png; an earlier picture of a plan is replaced.
            num_ways: number of bars, at most 20.

        Raises:
            ValueError: nothing fits, another file exists at `path`, or matplotlib is not installed.
        """
        ways = enumerate(self.ways[:num_ways]) if self.best else ()
        bars = {f"{i + 1}. {way.weights} {way.options}".strip(): way.memory for i, way in ways}
        title = f"{self.num_parameters / 1e9:,.1f} B parameters, translating on {self.num_gpus} x {self.gpu.name}"
        write_memory_picture(path, bars, usable_bytes(self.gpu), title)

    def as_dict(self, num_ways: int = 10) -> dict[str, Any]:
        """The plan as plain values for JSON, with the best ways, and the origin of all constants."""
        return {
            "gpu": asdict(self.gpu),
            "num_gpus": self.num_gpus,
            "num_parameters": self.num_parameters,
            "workload": asdict(self.workload),
            "ways": [
                {
                    "weights": way.weights,
                    **asdict(way),
                    "peak_bytes": way.memory.peak,
                    "ms_per_token": way.token.total * 1e3,
                }
                for way in self.ways[:num_ways]
            ],
            "impossible": [asdict(way) for way in self.impossible],
            "constants": origins(SERVING) | origins(TIME) | origins(POWER) | origins(MEMORY),
        }


def plan_serving(
    config: ZCodeM3Config,
    *,
    gpu: str | Gpu,
    num_gpus: int = 1,
    gpus_per_node: int = 8,
    batch_size: int = 16,
    num_beams: int = 4,
    source_length: int = 64,
    target_length: int = 64,
    dtype: str = "bfloat16",
    expert_memory: int | None = None,
    cuda_graphs: bool = True,
    quantized_kernels: bool | None = None,
    zipf: float = 0.0,
    host_gib_per_gpu: float = MEMORY.host_gib_per_gpu,
) -> ServingPlan:
    """Ways to translate with a model: floats, 8 or 4 bits, all experts on the GPU or some, one GPU or several.

    A model that fits on one GPU has a copy on each. A larger model keeps some experts on the GPU and the others in main
    memory ([`ExpertMemory`]), or spreads its layers over as few GPUs as possible. Ways that fit are ranked by target
    tokens per second. Quantization changes translations a little; a plan does not predict that.

    Args:
        config: config of the model. A quantized model is planned as it is stored.
        gpu: a name of `planning.gpus.GPUS`, a YAML file, or a [`Gpu`].
        num_gpus: number of all GPUs, in machines of `gpus_per_node`.
        batch_size: sentences that a copy of the model translates at once.
        num_beams: 1 is greedy search.
        source_length, target_length: lengths in tokens.
        dtype: dtype of activations and of weights that are not quantized, "bfloat16" or "float32".
        expert_memory: bytes of experts on a GPU, as in [`ExpertMemory`]; by default all experts, or as many as fit.
        cuda_graphs: whether `generate` captures its steps if possible, which is its default.
        quantized_kernels: whether Triton kernels compute quantized experts, not a loop; by default on all GPUs except
            V100, whose compute capability is below 8.0.
        zipf: how unevenly tokens choose experts, see [`ServingWorkload`].
        host_gib_per_gpu: GiB of main memory per GPU.

    Raises:
        ValueError: a number is not whole or below 1; GPUs do not fill their machines; sequences are longer than the
            model's positions; the GPU or dtype is unknown; or another package quantized the model.
    """
    gpu = gpu_of(gpu)
    check_counts({"num_gpus": num_gpus, "gpus_per_node": gpus_per_node})
    if expert_memory is not None:
        check_counts({"expert_memory": expert_memory})
    if num_gpus > gpus_per_node and num_gpus % gpus_per_node:
        raise ValueError(f"num_gpus ({num_gpus}) must be a multiple of gpus_per_node ({gpus_per_node})")
    if not 0 <= host_gib_per_gpu < math.inf:
        raise ValueError(f"host_gib_per_gpu ({host_gib_per_gpu}) must be 0 or a positive number")
    workload = ServingWorkload(batch_size, num_beams, source_length, target_length, dtype, cuda_graphs, zipf)
    _check_lengths(config, workload)
    kernels = gpu.name not in WITHOUT_KERNELS if quantized_kernels is None else quantized_kernels
    machine = _Machine(gpu, num_gpus, min(gpus_per_node, num_gpus), host_gib_per_gpu * GIB, kernels)
    ways: list[PlannedServing] = []
    impossible: list[ImpossibleServing] = []
    for stored in _formats(config):
        try:
            ways += _fitting(config, workload, machine, stored, expert_memory)
        except ValueError as error:
            name = "floats" if stored is None else f"int{stored.bits} {stored.what}"
            impossible.append(ImpossibleServing(name, str(error)))
    ways.sort(key=_worth)
    return ServingPlan(
        gpu=gpu, num_gpus=num_gpus, num_parameters=num_parameters(config), workload=workload,
        is_quantized=stored_bits(config) is not None, ways=tuple(ways), impossible=tuple(impossible),
    )  # fmt: skip


def _size(num_bytes: int) -> str:
    """A size for `--expert-memory`: whole GB, or bytes."""
    return str(num_bytes) if num_bytes % GB else f"{num_bytes // GB}GB"


def _folder(model: str) -> str:
    """A folder, quoted for a shell."""
    path = Path(model)
    return shlex.quote(str(path.parent if path.suffix == ".json" else path))


def _worth(way: PlannedServing) -> tuple[int, int, int]:
    """Sort key: the fastest first; among ways within one percent, the least rounded, then the smallest."""
    bits = 16 if way.stored is None else way.stored.bits
    rounded = 2 * (16 - bits) + (way.stored is not None and way.stored.what == "all")
    return -round(100 * math.log(way.tokens_per_s)), rounded, way.memory.peak


@dataclass(frozen=True)
class _Machine:
    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    host_bytes_per_gpu: float
    quantized_kernels: bool

    @property
    def usable(self) -> float:
        return usable_bytes(self.gpu)


def _check_lengths(config: ZCodeM3Config, workload: ServingWorkload) -> None:
    for name in ("source_length", "target_length"):
        if getattr(workload, name) > config.max_position_embeddings:
            raise ValueError(
                f"{name} ({getattr(workload, name)}) must be at most the model's max_position_embeddings "
                f"({config.max_position_embeddings})"
            )


def _formats(config: ZCodeM3Config) -> Sequence[StoredBits | None]:
    found = stored_bits(config)
    if found is not None:
        return [found]
    if not any(config.num_experts_per_layer(side) for side in ("encoder", "decoder")):
        return [None]  # `quantize_experts` needs experts
    return [None, *(default_bits(config, bits, what) for bits in (8, 4) for what in ("experts", "all"))]


def _fitting(
    config: ZCodeM3Config,
    workload: ServingWorkload,
    machine: _Machine,
    stored: StoredBits | None,
    expert_memory: int | None,
) -> Iterator[PlannedServing]:
    """Ways with all experts on as few GPUs as possible, and with some experts on one GPU.

    Raises:
        ValueError: neither fits; the message says why.
    """
    whole = None
    if expert_memory is None:
        for num_shares in _shares(machine, config):
            as_run = _as_run(workload, machine, stored, False, num_shares)
            memory = memory_of_serving(config, as_run, stored, num_shares=num_shares)
            if memory.peak <= machine.usable:
                whole = _planned(config, workload, machine, stored, None, num_shares)
                yield whole
                break
        if whole is not None and whole.num_gpus == 1:
            return
    try:
        size = _room_for_experts(config, workload, machine, stored) if expert_memory is None else expert_memory
        planned = _planned(config, workload, machine, stored, size, 1)
        _check_room(planned.memory, machine)
    except ValueError:
        if whole is None:
            raise
    else:
        yield planned


def _shares(machine: _Machine, config: ZCodeM3Config) -> list[int]:
    """Numbers of GPUs of one machine that may share a model: they divide the machine, and each has a layer."""
    layers = config.encoder_layers + config.decoder_layers
    return [
        size for size in range(1, machine.gpus_per_node + 1) if machine.gpus_per_node % size == 0 and size <= layers
    ]


def _room_for_experts(
    config: ZCodeM3Config, workload: ServingWorkload, machine: _Machine, stored: StoredBits | None
) -> int:
    """Whole GB that are left for experts on a GPU that holds everything else.

    Raises:
        ValueError: less than one is left.
    """
    weights = weight_bytes(config, stored, workload.dtype)
    memory = memory_of_serving(config, _as_run(workload, machine, stored, True, 1), stored)
    others = memory.peak - memory.experts
    size = int((machine.usable - others) // GB) * GB
    if size < GB or not weights.experts:
        raise ValueError(
            f"everything except the experts takes {others / GIB:,.1f} GiB, but {machine.usable / GIB:,.1f} GiB of a "
            "GPU can be used"
        )
    return size


def _as_run(
    workload: ServingWorkload, machine: _Machine, stored: StoredBits | None, has_expert_memory: bool, num_shares: int
) -> ServingWorkload:
    """The workload, without CUDA graphs if there can be none."""
    why_not = captured_why_not(stored, has_expert_memory, num_shares, machine.quantized_kernels)
    return replace(workload, cuda_graphs=workload.cuda_graphs and why_not is None)


def _check_room(memory: ServingMemory, machine: _Machine) -> None:
    if memory.peak > machine.usable:
        raise ValueError(
            f"it takes {memory.peak / GIB:,.1f} GiB, but {machine.usable / GIB:,.1f} GiB of a GPU can be used"
        )


def _planned(
    config: ZCodeM3Config,
    workload: ServingWorkload,
    machine: _Machine,
    stored: StoredBits | None,
    expert_memory: int | None,
    num_shares: int,
) -> PlannedServing:
    weights = weight_bytes(config, stored, workload.dtype)
    residence = resident_experts(weights, expert_memory)
    in_files = weights.experts > machine.host_bytes_per_gpu and expert_memory is not None
    as_run = _as_run(workload, machine, stored, expert_memory is not None, num_shares)
    memory = memory_of_serving(
        config, as_run, stored, expert_memory=expert_memory, experts_in_files=in_files, num_shares=num_shares
    )
    where: dict[str, Any] = {
        "residence": residence if resident_bytes(weights, residence) < weights.experts else None,
        "experts_in_files": in_files,
        "quantized_kernels": machine.quantized_kernels,
    }
    token = time_of_token(config, as_run, machine.gpu, weights, stored, **where, num_shares=num_shares)
    source_s = time_of_source(config, as_run, machine.gpu, weights, stored, **where)
    num_copies = machine.num_gpus // num_shares
    seconds = source_s + workload.target_length * token.total
    tokens_per_s = num_copies * workload.batch_size * workload.target_length / seconds
    busy_share = token.busy_share / num_shares  # the GPUs of a copy work in turns
    joules = machine.num_gpus * watts(busy_share, machine.gpu) / tokens_per_s
    return PlannedServing(
        stored=stored, expert_memory=expert_memory, experts_in_files=in_files, num_gpus=num_shares,
        num_copies=num_copies, memory=memory, token=token, source_s=source_s, tokens_per_s=tokens_per_s,
        kwh_per_million_tokens=joules * 1e6 / 3.6e6,
    )  # fmt: skip


__all__ = ["ImpossibleServing", "PlannedServing", "ServingPlan", "plan_serving"]
