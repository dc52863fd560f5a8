"""Time and energy of a training step: a model with few constants.

It is for a step that the device limits (`pad_expert_input_to_capacity` and a CUDA graph, or large layers): with small
layers, the host is slower when it runs from Python. Experts are assumed to be evenly loaded.
"""

from dataclasses import dataclass

from ..distributed.layout import Layout
from ..models.configuration_zcode_m3 import ZCodeM3Config
from .communication import LinkBytes, bytes_over_links, collectives_of_step
from .constants import POWER, TIME, PowerConstants, TimeConstants
from .gpus import Gpu
from .memory import kept_of_layer
from .parameters import SIDES, layer_groups, parameters_of_rank
from .workload import Workload


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of a rank.

    Attributes:
        matmul: matrix products, with recomputation.
        elementwise: all other computation of layers and the loss.
        optimizer: the optimizer's step.
        communication: exchange and tensor parallelism, which do not overlap with computation.
        exposed_zero: the part of ZeRO's gathers and reductions that does not overlap with computation.
        offload: copies between GPU and host.
        model_flops: operations of one rank, without recomputation.
        fast_bytes, slow_bytes: bytes that a rank sends by kind of collective, inside and outside of its machine.
    """

    matmul: float
    elementwise: float
    optimizer: float
    communication: float
    exposed_zero: float
    offload: float
    model_flops: float
    fast_bytes: dict[str, float]
    slow_bytes: dict[str, float]

    @property
    def total(self) -> float:
        waiting = self.communication + self.exposed_zero + self.offload
        return self.matmul + self.elementwise + self.optimizer + waiting

    @property
    def busy_share(self) -> float:
        """Share of the step in which the GPU computes."""
        return (self.matmul + self.elementwise + self.optimizer) / self.total


def time_of_step(
    config: ZCodeM3Config,
    layout: Layout,
    workload: Workload,
    gpu: Gpu,
    gpus_per_node: int = 8,
    constants: TimeConstants = TIME,
) -> StepTime:
    """Time of one optimizer step, with all its forwards and backwards.

    Args:
        config, layout, workload: the model, how ranks share it, and the work of a rank in a step.
        gpu: GPU of the ranks.
        gpus_per_node: GPUs of one machine, joined by NVLink; the network connects machines.
        constants: constants of the time model.
    """
    in_layers, in_head = forward_flops(config, layout, workload)
    recomputes = workload.checkpointing is not None
    flops = (4 if recomputes else 3) * in_layers + 3 * in_head
    matmul = workload.accumulation * flops / (gpu.tflops * 1e12 * constants.matmul_efficiency)
    memory_rate = gpu.memory_gbs * 1e9 * constants.memory_efficiency
    moved = constants.passes_of_kept * _kept_bytes(config, layout, workload) * (4 / 3 if recomputes else 1)
    elementwise = workload.accumulation * moved / memory_rate
    optimizer, offload = _optimizer_times(config, layout, workload, memory_rate, constants)
    communication = zero = 0.0
    fast: dict[str, float] = {}
    slow: dict[str, float] = {}
    for collective in collectives_of_step(config, layout, workload):
        links = bytes_over_links(collective, layout, gpus_per_node)
        seconds = collective.count * (constants.collective_s + _seconds(links, gpu, constants))
        for by_kind, sent in ((fast, links.fast), (slow, links.slow)):
            by_kind[collective.operation] = by_kind.get(collective.operation, 0.0) + collective.count * sent
        if collective.is_zero:
            zero += seconds
        else:
            communication += seconds
    exposed = max(0.0, zero - constants.zero_overlap * (matmul + elementwise))
    model_flops = 3 * workload.accumulation * (in_layers + in_head)
    return StepTime(matmul, elementwise, optimizer, communication, exposed, offload, model_flops, fast, slow)


def forward_flops(config: ZCodeM3Config, layout: Layout, workload: Workload) -> tuple[float, float]:
    """Floating-point operations of one rank in one forward, for layers and head: two per multiply-add."""
    width, top_k = config.d_model, config.num_experts_per_tok
    source, target = workload.num_tokens("encoder"), workload.num_tokens("decoder")
    total = 0.0
    for side in SIDES:
        num_tokens, length = workload.num_tokens(side), workload.source_length
        sparse = config.num_experts_per_layer(side)
        num_layers, ffn_dim = getattr(config, f"{side}_layers"), getattr(config, f"{side}_ffn_dim")
        ffn = 4 * width * ffn_dim * num_tokens
        num_ffns = num_layers + len(sparse) * (top_k - 1 + config.use_residual)
        attention = 8 * width**2 * num_tokens + 4 * length * width * num_tokens
        if side == "decoder":  # causal attention, and attention to the source
            attention = 8 * width**2 * num_tokens + 2 * workload.target_length * width * num_tokens
            attention += 4 * width**2 * (source + target) + 4 * workload.source_length * width * num_tokens
        total += num_layers * attention + num_ffns * ffn
    tp = layout.tensor_parallel_size
    return total / tp, 2 * width * config.vocab_size * target / tp


def gpu_watts(busy_share: float, gpu: Gpu, power: PowerConstants = POWER) -> float:
    """Mean power of one GPU in watts, as NVML measures it; `busy_share` is the share of time in which it computes."""
    return gpu.power_w * (power.idle_power + (power.busy_power - power.idle_power) * busy_share)


def watts(busy_share: float, gpu: Gpu, power: PowerConstants = POWER) -> float:
    """Mean power of the building in watts per GPU, with its part of the host and the cooling."""
    return power.cooling * (gpu_watts(busy_share, gpu, power) + power.host_power_w)


def _kept_bytes(config: ZCodeM3Config, layout: Layout, workload: Workload) -> int:
    """Bytes that layers and loss keep for backward without checkpointing, as a measure of the bytes that they move."""
    total = 2 * workload.element_bytes * workload.num_tokens("decoder") * config.vocab_size
    total //= layout.tensor_parallel_size * 4  # one pass over logits, but several over tensors of layers
    for side, num_experts, count in layer_groups(config):
        total += count * kept_of_layer(config, layout, workload, side, num_experts)
    return total


def _optimizer_times(
    config: ZCodeM3Config, layout: Layout, workload: Workload, memory_rate: float, constants: TimeConstants
) -> tuple[float, float]:
    """Times of the optimizer's step and of copies of offloaded shards."""
    num_local = parameters_of_rank(config, layout).total
    moved = (2 * workload.state_bytes + 2 * workload.element_bytes) * num_local
    if layout.offload is None:
        return moved / memory_rate, 0.0
    num_gathers = 2 * workload.accumulation if layout.zero_stage == 3 else 1
    num_reductions = workload.accumulation if layout.zero_stage == 2 else 1
    copied = (num_gathers + num_reductions) * workload.element_bytes * num_local
    return 0.0, moved / (constants.host_memory_gbs * 1e9) + copied / (constants.pcie_gbs * 1e9)


def _seconds(links: LinkBytes, gpu: Gpu, constants: TimeConstants) -> float:
    """Both links work at the same time."""
    fast = links.fast / (gpu.nvlink_gbs * 1e9 * constants.nvlink_efficiency)
    slow = links.slow / (gpu.network_gbs * 1e9 * constants.network_efficiency)
    return max(fast, slow)


__all__ = ["StepTime", "forward_flops", "gpu_watts", "time_of_step", "watts"]
