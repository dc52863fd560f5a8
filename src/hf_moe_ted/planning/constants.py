"""The constants that turn data sheets into time, memory and energy, each with where it comes from.

A constant is *measured* (a number that was read off an instrument), *fitted* (chosen so that formulas agree with
measured lines, so that agreement with those is no proof) or *assumed* (nobody measured it here).
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

Origin = Literal["measured", "fitted", "assumed"]


def _constant(value: float, origin: Origin, note: str = "") -> Any:
    return field(default=value, metadata={"origin": origin, "note": note})


def origins(constants: Any) -> dict[str, dict[str, Any]]:
    """Name of each constant -> `value`, `origin` and `note`, of one of the classes below or an instance."""
    return {
        constant.name: {"value": getattr(constants, constant.name), **constant.metadata}
        for constant in fields(constants)
    }


_STEPS = "on 25 training steps as CUDA graphs on H200 (tests/planning/validation.py leaves groups of them out)"
_SEARCHES = "on steps of captured searches on H200 (docs/benchmarks/translation_speed_h200_2026-11-30.md)"
_LOOPS = "on loops over quantized experts on H200 (docs/benchmarks/quantized_experts_h200_2026-11-30.md)"
_KERNELS = "on kernels of experts with at most 8 slots, of the same record"


@dataclass(frozen=True)
class TimeConstants:
    """Of a training step.

    Attributes:
        matmul_efficiency: share of the peak of matrix products.
        passes_of_kept: how often all but matrix products moves the bytes that a layer keeps for backward.
        memory_efficiency: share of the bandwidth of memory.
        nvlink_efficiency: share of the bandwidth of the links in a machine, in collectives.
        network_efficiency: the same between machines.
        collective_s: seconds of each collective, besides its bytes.
        zero_overlap: share of computation beside which gathers and reductions of ZeRO run. Small, as they and the
            exchange share the slow link where they were measured.
        pcie_gbs, host_memory_gbs: GB/s of a GPU's share, for `offload` and for experts in the host's memory.
    """

    matmul_efficiency: float = _constant(0.8, "assumed")
    passes_of_kept: float = _constant(16.6, "fitted", _STEPS)
    memory_efficiency: float = _constant(0.8, "assumed")
    nvlink_efficiency: float = _constant(0.51, "fitted", _STEPS)
    network_efficiency: float = _constant(0.7, "assumed")
    collective_s: float = _constant(54e-6, "fitted", _STEPS)
    zero_overlap: float = _constant(0.08, "fitted", _STEPS)
    pcie_gbs: float = _constant(25.0, "assumed", "PCIe 4 x16; PCIe 5 has twice as much")
    host_memory_gbs: float = _constant(25.0, "assumed", "an eighth of a machine's")


@dataclass(frozen=True)
class PowerConstants:
    """Of energy. `bench_ted.py` prints joules per step and watts while idle, from NVML's counter of energy.

    Attributes:
        idle_power: share of a GPU's `power_w` that it takes while it waits.
        busy_power: share that it takes while it computes.
        host_power_w: watts of CPUs, memory and adapters, per GPU; NVML does not see them.
        cooling: energy of the building per energy of its machines (PUE).
    """

    idle_power: float = _constant(0.2, "assumed", "idle W of bench_ted.py / power_w")
    busy_power: float = _constant(1.0, "assumed", "W/GPU of bench_ted.py in cases that hardly wait / power_w")
    host_power_w: float = _constant(300.0, "assumed", "an eighth of what a machine takes besides its GPUs")
    cooling: float = _constant(1.2, "assumed", "the building's PUE")


@dataclass(frozen=True)
class ServingConstants:
    """Of a step of decoding, between two tokens.

    Attributes:
        captured_layer_s: seconds of the kernels of a decoder layer besides what they read, within a CUDA graph.
        eager_layer_s: seconds that the host takes for a layer, step by step.
        loop_expert_int8_s, loop_expert_int4_s: seconds of each expert in the loop that computes quantized experts
            where no kernel does; the host waits for the device at each.
        expert_kernel_s: seconds of the two kernels of a layer's experts besides what they read.
        expert_floats_efficiency, expert_int8_efficiency, expert_int4_efficiency: of what other weights are read at, the
            share at which these kernels read those of experts, packed or not.
        dequantized_bytes: bytes that are moved for a weight in 8 bits outside of experts, which becomes a float in each
            call: 1 is read, 2 are written, read, scaled and written, and read by the product.
        disk_gbs: GB/s of files, for `experts_in="files"`.
    """

    captured_layer_s: float = _constant(87e-6, "fitted", _SEARCHES)
    eager_layer_s: float = _constant(
        1.36e-3, "fitted", "the mean of six lines that differ by a factor of two; the host's"
    )
    loop_expert_int8_s: float = _constant(0.40e-3, "fitted", _LOOPS)
    loop_expert_int4_s: float = _constant(0.58e-3, "fitted", _LOOPS)
    expert_kernel_s: float = _constant(12e-6, "fitted", _KERNELS)
    expert_floats_efficiency: float = _constant(0.84, "fitted", _KERNELS)
    expert_int8_efficiency: float = _constant(0.89, "fitted", _KERNELS)
    expert_int4_efficiency: float = _constant(0.69, "fitted", _KERNELS)
    dequantized_bytes: float = _constant(9.0, "assumed", "for bfloat16, without fusion")
    disk_gbs: float = _constant(3.0, "assumed", "one NVMe disk")


@dataclass(frozen=True)
class MemoryConstants:
    """Of what there is.

    Attributes:
        usable_share: of a GPU's memory; the rest is for the CUDA context, communicators and fragmentation.
        host_gib_per_gpu: GiB of the host's memory for each GPU.
    """

    usable_share: float = _constant(0.92, "assumed")
    host_gib_per_gpu: float = _constant(128.0, "assumed", "machines of eight GPUs have one to two TB")


TIME = TimeConstants()
POWER = PowerConstants()
SERVING = ServingConstants()
MEMORY = MemoryConstants()

__all__ = [
    "MEMORY",
    "POWER",
    "SERVING",
    "TIME",
    "MemoryConstants",
    "Origin",
    "PowerConstants",
    "ServingConstants",
    "TimeConstants",
    "origins",
]
