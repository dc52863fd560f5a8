"""Constants that turn data sheets into time, memory and energy, each with its origin.

A constant is *measured* (read from an instrument), *fitted* (chosen so that formulas agree with measured lines;
agreement with those lines is then no proof) or *assumed* (not measured here).
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

Origin = Literal["measured", "fitted", "assumed"]


def _constant(value: float, origin: Origin, note: str = "") -> Any:
    return field(default=value, metadata={"origin": origin, "note": note})


def origins(constants: Any) -> dict[str, dict[str, Any]]:
    """Name of each constant -> `value`, `origin` and `note`, for one of the classes below or an instance."""
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
    """Constants of a training step.

    Attributes:
        matmul_efficiency: share of the peak of matrix products.
        passes_of_kept: how often the operations other than matrix products move the bytes that a layer keeps for
            backward.
        memory_efficiency: share of the memory bandwidth.
        nvlink_efficiency: share of the bandwidth of links inside a machine, in collectives.
        network_efficiency: the same for links between machines.
        collective_s: seconds of each collective in addition to the time of its bytes.
        zero_overlap: share of the computation with which gathers and reductions of ZeRO overlap. It is small, because
            they shared the slow link with the exchange in the measurement.
        pcie_gbs, host_memory_gbs: GB/s per GPU, for `offload` and for experts in main memory.
    """

    matmul_efficiency: float = _constant(0.8, "assumed")
    passes_of_kept: float = _constant(16.6, "fitted", _STEPS)
    memory_efficiency: float = _constant(0.8, "assumed")
    nvlink_efficiency: float = _constant(0.51, "fitted", _STEPS)
    network_efficiency: float = _constant(0.7, "assumed")
    collective_s: float = _constant(54e-6, "fitted", _STEPS)
    zero_overlap: float = _constant(0.08, "fitted", _STEPS)
    pcie_gbs: float = _constant(25.0, "assumed", "PCIe 4 x16; PCIe 5 has twice as much")
    host_memory_gbs: float = _constant(25.0, "assumed", "an eighth of a machine's bandwidth")


@dataclass(frozen=True)
class PowerConstants:
    """Constants of energy. `bench_ted.py` prints joules per step and idle watts from NVML's energy counter.

    Attributes:
        idle_power: share of a GPU's `power_w` while it waits.
        busy_power: share while it computes.
        host_power_w: watts of CPUs, memory and adapters, per GPU; NVML does not measure them.
        cooling: energy of the building per energy of its machines (PUE).
    """

    idle_power: float = _constant(0.2, "assumed", "idle W of bench_ted.py / power_w")
    busy_power: float = _constant(1.0, "assumed", "W/GPU of bench_ted.py in cases that hardly wait / power_w")
    host_power_w: float = _constant(300.0, "assumed", "an eighth of a machine's power besides its GPUs")
    cooling: float = _constant(1.2, "assumed", "the building's PUE")


@dataclass(frozen=True)
class ServingConstants:
    """Constants of a step of decoding, between two tokens.

    Attributes:
        captured_layer_s: seconds of a decoder layer's kernels in a CUDA graph, in addition to the time of their reads.
        eager_layer_s: seconds of the host for a layer, without CUDA graphs.
        loop_expert_int8_s, loop_expert_int4_s: seconds per expert in the loop that computes quantized experts without a
            kernel; the host waits for the device at each.
        expert_kernel_s: seconds of the two kernels of a layer's experts, in addition to the time of their reads.
        expert_floats_efficiency, expert_int8_efficiency, expert_int4_efficiency: speed at which these kernels read
            expert weights, packed or not, as a share of the speed for other weights.
        dequantized_bytes: bytes moved for an 8-bit weight outside of experts, which becomes a float in each call: 1 is
            read, 2 are written, read, scaled and written, and read by the product.
        disk_gbs: GB/s of files, for `experts_in="files"`.
    """

    captured_layer_s: float = _constant(87e-6, "fitted", _SEARCHES)
    eager_layer_s: float = _constant(
        1.36e-3, "fitted", "the mean of six lines that differ by a factor of two; it depends on the host"
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
    """Constants of the available memory.

    Attributes:
        usable_share: usable share of a GPU's memory; the rest is for the CUDA context, communicators and fragmentation.
        host_gib_per_gpu: GiB of main memory per GPU.
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
