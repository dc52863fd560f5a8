"""Memory of a GPU that translates, term by term: weights in their stored form, keys and values, and activations.

Letters: B sentences, N beams of each, S tokens of a source, T of a translation, D model width, F inner width, E experts
of a layer, K experts per token, b bytes of an activation.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..expert_memory.residence_plan import LayerSize, ResidencePlan, plan_residence
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.graph_store import power_of_two, rung
from .model_config import StoredBits
from .parameters import SIDES, ParameterShape, parameter_shapes
from .workload import BYTES_OF_DTYPE, check_counts

FLOAT32 = 4
LEAST_LENGTH = 32  # tokens for which captured searches keep memory
MAX_GROUP_SIZE = 128  # of `quantize_experts` with 4 bits


@dataclass(frozen=True)
class ServingWorkload:
    """The work of a GPU, or of the GPUs that share a model, at one time.

    Attributes:
        batch_size: number of sentences.
        num_beams: 1 is greedy search.
        source_length, target_length: tokens of each, with padding.
        dtype: dtype of activations and of weights that are not quantized: "bfloat16" or "float32".
        cuda_graphs: whether steps are captured if the model allows it; `generate(cuda_graphs=False)` turns it off.
        zipf: exponent of Zipf's law for the choice of experts by tokens; 0 is even. For one language pair the shipped
            model has about 1.1 in its encoder and 2.0 in its decoder. Rows of a step are at the same place of their
            sentences and choose less evenly: as many experts as with 2.3 to 3.9.

    Raises:
        ValueError: a number is below 1, the dtype is unknown, or the exponent is negative or not a number.
    """

    batch_size: int = 1
    num_beams: int = 4
    source_length: int = 64
    target_length: int = 64
    dtype: str = "bfloat16"
    cuda_graphs: bool = True
    zipf: float = 0.0

    def __post_init__(self) -> None:
        check_counts({name: getattr(self, name) for name in _COUNTS})
        if self.dtype not in BYTES_OF_DTYPE:
            raise ValueError(f"dtype ({self.dtype!r}) must be one of {[*BYTES_OF_DTYPE]}")
        if not 0 <= self.zipf < math.inf:
            raise ValueError(f"zipf ({self.zipf}) must be 0 or a positive number")

    @property
    def num_rows(self) -> int:
        """Beams of all sentences, that is, tokens that a step computes."""
        return self.batch_size * self.num_beams

    @property
    def element_bytes(self) -> int:
        """Bytes per element of activations and of weights that are not quantized."""
        return BYTES_OF_DTYPE[self.dtype]


_COUNTS = ("batch_size", "num_beams", "source_length", "target_length")


@dataclass(frozen=True)
class ServingMemory:
    """Bytes of one GPU; if several GPUs share a model, for its share of the layers.

    Attributes:
        dense: attention, dense feed-forward, routers, LayerNorms and positions.
        embedding: parameters with a row per word.
        experts: all experts on the GPU, or the slots of the expert memory.
        own_keys: keys and values of self-attention, for all beams.
        source_keys: keys and values of attention to the source, once for all beams of a sentence.
        logits: logits of a step, and their float32 copy.
        activations: the larger of an encoder layer's activations and weights that become floats.
        host: experts in main memory.
    """

    dense: int
    embedding: int
    experts: int
    own_keys: int
    source_keys: int
    logits: int
    activations: int
    host: int

    @property
    def peak(self) -> int:
        """Sum of all terms without the host."""
        return sum(value for name, value in vars(self).items() if name != "host")


def stored_bytes(shape: ParameterShape, stored: StoredBits | None, element_bytes: int, is_rounded: bool) -> int:
    """Bytes of a parameter: integers and scales if it is rounded, else floats of `element_bytes`.

    Args:
        shape: shape in the whole model, or [..., O, I] of the stored part.
        stored: how weights are stored; `None` for floats.
        is_rounded: whether the parameter is rounded; parameters of experts have `stored.bits` bits and others 8.
    """
    if stored is None or not is_rounded:
        return element_bytes * shape.numel
    bits = stored.bits if shape.kind == "expert" else 8
    group = stored.group_size if shape.kind == "expert" else None
    num_scales = shape.numel // (group or shape.shape[-1])
    return shape.numel * bits // 8 + element_bytes * num_scales


def is_rounded(shape: ParameterShape, stored: StoredBits | None, is_tied: bool = True) -> bool:
    """Whether `quantize_experts` rounds a parameter: matrices of experts and, with "all", of layers and words."""
    if stored is None:
        return False
    if shape.kind == "expert":
        return len(shape.shape) == 3
    if stored.what != "all":
        return False
    return is_tied if shape.kind == "embedding" else is_large_matrix(shape)


def is_large_matrix(shape: ParameterShape) -> bool:
    """Whether it is a matrix of attention or of a dense feed-forward, which tensor parallelism would divide."""
    return shape.kind == "dense" and len(shape.shape) == 2 and shape.split_dim is not None and shape.layer is not None


def default_bits(config: ZCodeM3Config, bits: int, what: str) -> StoredBits:
    """Storage of `quantize_experts(bits=bits, what=what)`: groups for 4 bits, rows for 8.

    Raises:
        ValueError: an unknown value of `bits` or `what`.
    """
    widths = [shape.shape[-1] for shape in parameter_shapes(config) if is_rounded(shape, StoredBits(8))]
    group = math.gcd(MAX_GROUP_SIZE, *widths) if bits == 4 else None
    return StoredBits(bits, group, what)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights of a whole model in their stored form.

    Attributes:
        dense, embedding: bytes, as in [`ServingMemory`].
        head: the part of `embedding` that the projection to the vocabulary reads.
        layers: name of each MoE layer -> bytes of its experts.
        largest_layer: bytes of the largest layer, with its experts.
    """

    dense: int
    embedding: int
    head: int
    layers: Mapping[str, LayerSize]
    largest_layer: int

    @property
    def experts(self) -> int:
        """Bytes of all experts."""
        return sum(layer.num_experts * layer.slot_bytes for layer in self.layers.values())

    @property
    def total(self) -> int:
        """Bytes of the model."""
        return self.dense + self.embedding + self.experts


def weight_bytes(config: ZCodeM3Config, stored: StoredBits | None, dtype: str = "bfloat16") -> WeightBytes:
    """Exact bytes of the weights of a model.

    Args:
        config: of the model.
        stored: how experts, and possibly other weights, are rounded; `None` for floats.
        dtype: dtype of weights that are not rounded, and of scales: "bfloat16" or "float32".
    """
    element_bytes = BYTES_OF_DTYPE[dtype]
    of_layer: dict[tuple[str, int], dict[str, int]] = {}
    dense = embedding = head = 0
    for shape in parameter_shapes(config):
        is_head = shape.kind == "embedding"  # the last of several is
        rounded = is_rounded(shape, stored, config.tie_word_embeddings)
        num_bytes = stored_bytes(shape, stored, element_bytes, rounded)
        if is_head:
            embedding, head = embedding + num_bytes, num_bytes
            continue
        if shape.layer is not None:
            sums = of_layer.setdefault(shape.layer, {"dense": 0, "expert": 0})
            sums[shape.kind] += num_bytes
        dense += num_bytes if shape.kind == "dense" else 0
    if not config.tie_word_embeddings and stored is not None and stored.what == "all":
        rounded_head = stored_bytes(ParameterShape((config.vocab_size, config.d_model)), stored, element_bytes, True)
        embedding, head = embedding - head + rounded_head, rounded_head
    layers: dict[str, LayerSize] = {}
    kinds: dict[int, int] = {}
    for side in SIDES:
        for layer, num_experts in config.num_experts_per_layer(side).items():
            slot = of_layer[side, layer]["expert"] // num_experts
            kind = kinds.setdefault(slot, len(kinds))
            layers[f"model.{side}.layers.{layer}.ffn"] = LayerSize(num_experts, slot, kind)
    largest = max(sum(sums.values()) for sums in of_layer.values())
    return WeightBytes(dense, embedding, head, layers, largest)


def resident_experts(weights: WeightBytes, max_bytes: int | None) -> ResidencePlan | None:
    """The experts that `ExpertMemory(max_bytes)` keeps on the GPU without statistics; `None` without a bound.

    Raises:
        ValueError: two experts of each size do not fit.
    """
    return None if max_bytes is None else plan_residence(weights.layers, max_bytes, None)


def resident_bytes(weights: WeightBytes, plan: ResidencePlan | None) -> int:
    """Bytes of experts on the GPU, with the stages through which experts pass."""
    if plan is None:
        return weights.experts
    slots = sum(count * weights.layers[name].slot_bytes for name, count in plan.num_slots.items())
    bytes_of_kind = {layer.kind: layer.slot_bytes for layer in weights.layers.values()}
    return slots + sum(2 * count * bytes_of_kind[kind] for kind, count in plan.stage_slots.items())


def memory_of_serving(
    config: ZCodeM3Config,
    workload: ServingWorkload,
    stored: StoredBits | None = None,
    *,
    expert_memory: int | None = None,
    experts_in_files: bool = False,
    num_shares: int = 1,
) -> ServingMemory:
    """Memory of the GPU that needs the most.

    Args:
        config, workload: the model and its work.
        stored: how weights are rounded; `None` for floats.
        expert_memory: bytes of experts on the GPU; by default all experts.
        experts_in_files: whether the other experts stay in files instead of main memory.
        num_shares: GPUs that share the layers of a model (`device="auto"`).

    Raises:
        ValueError: two experts of each size do not fit.
    """
    weights = weight_bytes(config, stored, workload.dtype)
    plan = resident_experts(weights, expert_memory)
    width, element = config.d_model, workload.element_bytes
    of_key = 2 * width * element * config.decoder_layers
    in_host = plan is not None and any(plan.stage_slots.values()) and not experts_in_files
    dense, experts, embedding = weights.dense, resident_bytes(weights, plan), weights.embedding
    if num_shares > 1:  # GPUs have whole layers, so one GPU may have one more than its share
        share = -(-(dense + experts) // num_shares)
        dense = min(dense + experts, share + weights.largest_layer)
        experts = 0
    return ServingMemory(
        dense=dense, embedding=embedding, experts=experts,
        own_keys=-(-of_key * workload.num_beams * _kept_tokens(workload) // num_shares),
        source_keys=-(-of_key * workload.batch_size * workload.source_length // num_shares),
        logits=workload.num_rows * config.vocab_size * (element + FLOAT32),
        activations=max(_encoder_layer(config, workload), _floats_of_rounded(config, stored, element)),
        host=weights.experts if in_host else 0,
    )  # fmt: skip


def _kept_tokens(workload: ServingWorkload) -> int:
    """Tokens of all sentences, for one beam; captured searches keep memory for powers of two and all shorter ones."""
    if not workload.cuda_graphs:
        return workload.batch_size * workload.target_length
    longest = power_of_two(workload.target_length, LEAST_LENGTH)
    lengths = [longest]
    while lengths[-1] > LEAST_LENGTH:
        lengths.append(lengths[-1] // 2)
    return rung(workload.batch_size) * sum(lengths)


def _encoder_layer(config: ZCodeM3Config, workload: ServingWorkload) -> int:
    """Activations of one encoder layer: its input, its LayerNorm, and the larger of attention and feed-forward."""
    tokens, width = workload.batch_size * workload.source_length, config.d_model
    dense = config.encoder_ffn_dim + width
    experts = config.num_experts_per_tok * (config.encoder_ffn_dim + 2 * width)
    inner = max(4 * width, experts if config.num_experts_per_layer("encoder") else dense)
    return tokens * (2 * width + inner) * workload.element_bytes


def _floats_of_rounded(config: ZCodeM3Config, stored: StoredBits | None, element_bytes: int) -> int:
    """Floats of the largest matrix that is dequantized, before and after its scale: an expert's, or the embedding."""
    if stored is None:
        return 0
    largest = 0
    for shape in parameter_shapes(config):
        if shape.kind == "expert" and len(shape.shape) == 3:
            largest = max(largest, shape.numel // shape.shape[0])
        elif stored.what == "all" and (shape.kind == "embedding" or is_large_matrix(shape)):
            largest = max(largest, shape.numel)
    return 2 * element_bytes * largest


__all__ = [
    "ServingMemory",
    "ServingWorkload",
    "WeightBytes",
    "default_bits",
    "is_large_matrix",
    "is_rounded",
    "memory_of_serving",
    "resident_bytes",
    "resident_experts",
    "weight_bytes",
]
