"""The time per token when a GPU translates: a model of the bytes that a step of decoding reads.

Between two tokens a step reads the decoder's weights, the weights of all chosen experts, the head, and all keys and
values once. Small batches wait for these reads and for the start of kernels; only large ones wait for matrix products.
Rows of a step are assumed to choose experts independently: beams of a sentence are not more similar than different
sentences. Rows at the same place are similar, and `zipf` covers this (docs/benchmarks/count_experts_cpu_2026-11-30.md).

Letters: R rows, that is, beams of all sentences; E experts of a layer, K experts per token.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..expert_memory.residence_plan import ResidencePlan
from ..models.configuration_zcode_m3 import ZCodeM3Config
from .constants import SERVING, TIME, ServingConstants, TimeConstants
from .gpus import Gpu
from .model_config import StoredBits
from .parameters import parameter_shapes
from .serving_memory import ServingWorkload, WeightBytes, is_large_matrix, is_rounded, stored_bytes

LARGEST_LOG = 40.0  # exp of it is more than any time that is looked for, and can be computed
LARGEST_ZIPF = 10.0  # all tokens choose the same


@dataclass(frozen=True)
class DecodingTime:
    """Seconds of one step of decoding, which adds a token to each beam of each sentence.

    Attributes:
        weights: time to read attention, dense feed-forward, routers and the head.
        experts: time to read the experts that rows chose.
        keys: time to read keys and values.
        matmul: time of matrix products; they run while weights are read, so the larger of the two counts.
        kernels: time to start kernels in a CUDA graph, or from the host without one. In the latter case the device
            works at the same time, so the larger counts.
        loop: time of the host to go through quantized experts one after the other, if no kernel computes them; the
            device mostly waits.
        missing: time to load experts that are not on the GPU.
        is_captured: whether the step is a CUDA graph.
        bytes_read: bytes read from the GPU's memory.
        experts_used: mean number of different experts of an MoE layer of the decoder that a step computes.
    """

    weights: float
    experts: float
    keys: float
    matmul: float
    kernels: float
    loop: float
    missing: float
    is_captured: bool
    bytes_read: float
    experts_used: float

    @property
    def device(self) -> float:
        """Seconds in which the GPU reads or computes."""
        return max(self.weights + self.experts + self.keys, self.matmul)

    @property
    def total(self) -> float:
        """Seconds from a token to the next."""
        if self.is_captured:
            return self.device + self.kernels + self.missing
        return max(self.device, self.kernels) + self.loop + self.missing

    @property
    def busy_share(self) -> float:
        """Share of the step in which the GPU reads or computes."""
        return min(1.0, self.device / self.total)


def chosen_experts(num_experts: int, top_k: int, num_rows: int, zipf: float = 0.0) -> list[float]:
    """For each expert, the most popular first, the probability that any of `num_rows` independent tokens chose it.

    Args:
        num_experts, top_k: numbers of the layer.
        num_rows: number of tokens.
        zipf: exponent of the popularity; with 0 all are equal.
    """
    return [1 - (1 - share) ** num_rows for share in _shares_of_tokens(num_experts, min(top_k, num_experts), zipf)]


@functools.lru_cache(maxsize=64)
def _shares_of_tokens(num_experts: int, top_k: int, zipf: float) -> tuple[float, ...]:
    """Share of tokens that choose each expert; shares sum to `top_k`, because a token chooses an expert at most once.

    With one expert per token it is the popularity. Several are drawn without replacement: as if expert e arrived at a
    random time with rate p_e, and the first `top_k` were taken. The share is close to 1 - exp(-t p_e), the probability
    of arrival before t, where t is chosen so that `top_k` arrive on average (Rosén, 1972).
    """
    if top_k == 1:
        popularity = [(rank + 1) ** -zipf for rank in range(num_experts)]
        return tuple(each / sum(popularity) for each in popularity)
    if top_k == num_experts:
        return (1.0,) * num_experts
    logs = [-zipf * math.log(rank + 1) for rank in range(num_experts)]

    def came(log_t: float) -> list[float]:
        return [-math.expm1(-math.exp(min(log_t + log_p, LARGEST_LOG))) for log_p in logs]

    return tuple(came(_root(lambda log_t: sum(came(log_t)) - top_k, -LARGEST_LOG, LARGEST_LOG - logs[-1])))


def zipf_of_experts(num_experts: int, top_k: int, num_rows: int, num_used: float) -> float:
    """The exponent with which independent tokens choose `num_used` different experts, from counts of a model.

    Args:
        num_experts, top_k: numbers of the layer.
        num_rows: number of tokens.
        num_used: mean number of different experts.

    Returns:
        0 to 10; 0 if tokens chose more experts than independent, even choices would give.
    """

    def missing(zipf: float) -> float:
        return num_used - sum(chosen_experts(num_experts, top_k, num_rows, zipf))

    return 0.0 if missing(0.0) >= 0 else _root(missing, 0.0, LARGEST_ZIPF)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """The zero of an increasing function, by bisection; `high` if the function is below 0 there."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return high


def captured_why_not(
    stored: StoredBits | None, has_expert_memory: bool, num_shares: int, quantized_kernels: bool = True
) -> str | None:
    """Why steps of a model cannot be CUDA graphs, or `None`; arguments as in [`time_of_token`]."""
    reasons = {
        "quantized layers": stored is not None and stored.what == "all",
        "quantized experts in a loop": stored is not None and not quantized_kernels,
        "experts that are not all on the GPU": has_expert_memory,
        "layers on several GPUs": num_shares > 1,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def time_of_token(
    config: ZCodeM3Config,
    workload: ServingWorkload,
    gpu: Gpu,
    weights: WeightBytes,
    stored: StoredBits | None = None,
    *,
    residence: ResidencePlan | None = None,
    experts_in_files: bool = False,
    quantized_kernels: bool = True,
    num_shares: int = 1,
    constants: ServingConstants = SERVING,
    time: TimeConstants = TIME,
) -> DecodingTime:
    """Time of a step in the middle of a translation, with half of its keys.

    Args:
        config, workload: the model, and what it translates.
        gpu: the GPU that runs it.
        weights: result of `weight_bytes` for the model.
        stored: how weights are rounded; `None` for floats.
        residence: experts on the GPU; `None` for all.
        experts_in_files: whether the others are read from files instead of main memory.
        quantized_kernels: whether Triton kernels compute quantized experts, not a loop (before compute capability 8.0,
            or with `HF_MOE_TED_QUANTIZED_KERNELS=0`).
        num_shares: number of GPUs that share the layers and work one after the other.
        constants, time: constants of the time model.
    """
    rate = gpu.memory_gbs * 1e9 * time.memory_efficiency
    rows, element = workload.num_rows, workload.element_bytes
    why_not = captured_why_not(stored, residence is not None, num_shares, quantized_kernels)
    is_captured = workload.cuda_graphs and why_not is None
    dense_bytes = _decoder_bytes(config, stored, element, constants)
    head_bytes = float(weights.head)
    if stored is not None and stored.what == "all":
        head_bytes = constants.dequantized_bytes * config.vocab_size * config.d_model
    key_bytes = 2.0 * config.d_model * element * config.decoder_layers
    key_bytes *= rows * workload.target_length / 2 + workload.batch_size * workload.source_length
    experts = _Experts(config, weights, workload, residence)
    used = [sum(chosen) for _, _, chosen in experts.of_side("decoder", rows)]
    expert_bytes = sum(sum(chosen) * slot for slot, _, chosen in experts.of_side("decoder", rows))
    missing_bytes = sum(sum(chosen[count:]) * slot for slot, count, chosen in experts.of_side("decoder", rows))
    in_loop = stored is not None and not quantized_kernels
    return DecodingTime(
        weights=(dense_bytes + head_bytes) / rate,
        experts=_expert_seconds(stored, in_loop, expert_bytes / rate, len(used), constants),
        keys=key_bytes / rate,
        matmul=_flops_of_rows(config, rows) / (gpu.tflops * 1e12 * time.matmul_efficiency),
        kernels=config.decoder_layers * (constants.captured_layer_s if is_captured else constants.eager_layer_s),
        loop=sum(used) * _loop_s(stored, constants) if in_loop else 0.0,
        missing=missing_bytes / (1e9 * (constants.disk_gbs if experts_in_files else time.pcie_gbs)),
        is_captured=is_captured,
        bytes_read=dense_bytes + head_bytes + expert_bytes + key_bytes,
        experts_used=sum(used) / len(used) if used else 0.0,
    )


def time_of_source(
    config: ZCodeM3Config,
    workload: ServingWorkload,
    gpu: Gpu,
    weights: WeightBytes,
    stored: StoredBits | None = None,
    *,
    residence: ResidencePlan | None = None,
    experts_in_files: bool = False,
    quantized_kernels: bool = True,
    constants: ServingConstants = SERVING,
    time: TimeConstants = TIME,
) -> float:
    """Seconds of the encoder, before the first token; arguments as in [`time_of_token`]."""
    rate = gpu.memory_gbs * 1e9 * time.memory_efficiency
    tokens, length = workload.batch_size * workload.source_length, workload.source_length
    experts = _Experts(config, weights, workload, residence)
    found = [*experts.of_side("encoder", tokens)]
    used = sum(sum(chosen) for _, _, chosen in found)
    read = sum(sum(chosen) * slot for slot, _, chosen in found)
    missing = sum(sum(chosen[count:]) * slot for slot, count, chosen in found)
    in_loop = stored is not None and not quantized_kernels
    expert_s = _expert_seconds(stored, in_loop, read / rate, len(found), constants)
    loop_s = used * _loop_s(stored, constants) if in_loop else 0.0
    width, ffn_dim, layers = config.d_model, config.encoder_ffn_dim, config.encoder_layers
    num_ffns = layers + len(found) * (config.num_experts_per_tok - 1 + config.use_residual)
    attention = layers * (8 * width**2 + 4 * length * width)
    flops = tokens * (attention + num_ffns * 4 * width * ffn_dim)
    device = max(expert_s, flops / (gpu.tflops * 1e12 * time.matmul_efficiency))
    is_captured = workload.cuda_graphs and captured_why_not(stored, residence is not None, 1, quantized_kernels) is None
    layer_s = constants.captured_layer_s if is_captured else constants.eager_layer_s
    missing_s = missing / (1e9 * (constants.disk_gbs if experts_in_files else time.pcie_gbs))
    return max(device, layers * layer_s) + loop_s + missing_s


@dataclass(frozen=True)
class _Experts:
    config: ZCodeM3Config
    weights: WeightBytes
    workload: ServingWorkload
    residence: ResidencePlan | None

    def of_side(self, side: str, num_rows: int) -> Iterator[tuple[int, int, Sequence[float]]]:
        """For each MoE layer: bytes of an expert, number of experts on the GPU, and `chosen_experts`.

        Experts on the GPU are assumed to be the most popular, because the GPU keeps those that were used last.
        """
        for name, layer in self.weights.layers.items():
            if f".{side}." in name:
                count = layer.num_experts if self.residence is None else self.residence.num_slots[name]
                top_k, zipf = self.config.num_experts_per_tok, self.workload.zipf
                yield layer.slot_bytes, count, chosen_experts(layer.num_experts, top_k, num_rows, zipf)


def _expert_seconds(
    stored: StoredBits | None, in_loop: bool, read_s: float, num_layers: int, constants: ServingConstants
) -> float:
    """Seconds of the device to read experts; in a loop they are read while the host goes through it."""
    if in_loop:
        return read_s
    bits = None if stored is None else stored.bits
    efficiency = {
        None: constants.expert_floats_efficiency,
        8: constants.expert_int8_efficiency,
        4: constants.expert_int4_efficiency,
    }[bits]
    return read_s / efficiency + num_layers * constants.expert_kernel_s


def _loop_s(stored: StoredBits | None, constants: ServingConstants) -> float:
    """Seconds of each expert in the loop."""
    is_int4 = stored is not None and stored.bits == 4
    return constants.loop_expert_int4_s if is_int4 else constants.loop_expert_int8_s


def _decoder_bytes(
    config: ZCodeM3Config, stored: StoredBits | None, element_bytes: int, constants: ServingConstants
) -> float:
    """Bytes of the decoder's layers without experts; keys and values of the source exist already."""
    total = 0.0
    for shape in parameter_shapes(config):
        if shape.layer is None or shape.layer[0] != "decoder" or shape.kind != "dense":
            continue
        if is_large_matrix(shape) and is_rounded(shape, stored):
            total += constants.dequantized_bytes * shape.numel
        else:
            total += stored_bytes(shape, stored, element_bytes, False)
    is_all = stored is not None and stored.what == "all"
    of_source = 2 * config.d_model**2 * config.decoder_layers
    return total - of_source * (constants.dequantized_bytes if is_all else element_bytes)


def _flops_of_rows(config: ZCodeM3Config, num_rows: int) -> float:
    """Operations of a step: two per multiply-add. Attention to keys is left out, because its reads take longer."""
    width, layers = config.d_model, config.decoder_layers
    sparse = len(config.num_experts_per_layer("decoder"))
    num_ffns = layers + sparse * (config.num_experts_per_tok - 1 + config.use_residual)
    weights = layers * 6 * width**2 + num_ffns * 2 * width * config.decoder_ffn_dim + width * config.vocab_size
    return 2 * num_rows * weights


__all__ = ["DecodingTime", "captured_why_not", "chosen_experts", "time_of_source", "time_of_token", "zipf_of_experts"]
