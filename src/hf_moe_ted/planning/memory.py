"""Memory of a rank, term by term: the formulas of docs/ted.md in bytes.

Letters as there: N tokens of source or target of a rank's batch, D model width, V vocabulary, b bytes of an activation,
P parameters, G parameters that ZeRO 1 and 2 keep gathered.
"""

import functools
import math
from dataclasses import dataclass

from ..distributed.layout import Layout
from ..models.configuration_zcode_m3 import ZCodeM3Config
from .communication import exchange_of
from .parameters import (
    HashableConfig,
    RankParameters,
    gathered_shape,
    is_spread_expert,
    layer_groups,
    parameter_shapes,
    parameters_of_rank,
)
from .workload import Workload

FLOAT32 = 4
MIN_TILE_NUMEL, TILES = 2**24, 40  # of TiledAdamW on GPUs
LOSS_CHUNK_NUMEL = 2**26  # logits of `losses.row_chunks`, three float32 tensors of which exist at once


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. The peak is at the loss or in the optimizer's step, whichever is larger.

    Attributes:
        weights, optimizer: shards of weights and of optimizer states.
        gradients: shards that exist at the end of backward.
        gathered: parameters that ZeRO keeps gathered at the loss.
        logits: logits and their gradient.
        loss: float32 rows of the loss if tensor parallelism splits the logits.
        activations: tensors that layers keep for backward.
        exchange: inputs and outputs of experts in one sparse layer; part of `activations` unless these are recomputed.
        optimizer_tiles: memory that the step needs besides its states.
        whole_gradients: whole gradients that stages 1 and 3 keep between micro-batches.
        host: offloaded shards, in main memory.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    logits: int
    loss: int
    activations: int
    exchange: int
    optimizer_tiles: int
    whole_gradients: int
    host: int

    @property
    def at_loss(self) -> int:
        shards = self.weights + self.optimizer + self.whole_gradients
        return shards + self.gathered + self.logits + self.loss + self.activations + self.exchange

    @property
    def at_step(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.optimizer_tiles

    @property
    def peak(self) -> int:
        return max(self.at_loss, self.at_step)


def memory_of_rank(config: ZCodeM3Config, layout: Layout, workload: Workload) -> Memory:
    """Memory of the rank that needs the most."""
    parameters = parameters_of_rank(config, layout)
    element = workload.element_bytes
    is_offloaded = layout.offload is not None
    shards = {
        "weights": element * parameters.total,
        "gradients": element * parameters.total,
        "optimizer": workload.state_bytes * parameters.total,
    }
    gathered = element * _gathered_numel(config, layout, parameters)
    holds_whole_gradients = workload.accumulation > 1 and layout.zero_stage != 2
    logits = workload.num_tokens("decoder") * config.vocab_size // layout.tensor_parallel_size
    is_split = layout.tensor_parallel_size > 1
    return Memory(
        **({name: 0 for name in shards} if is_offloaded else shards),
        gathered=gathered,
        whole_gradients=element * _whole_gradients_numel(layout, parameters) if holds_whole_gradients else 0,
        logits=2 * element * logits,
        loss=3 * FLOAT32 * min(logits, LOSS_CHUNK_NUMEL) if is_split else 0,
        activations=_activations(config, layout, workload),
        exchange=_exchange_buffers(config, layout, workload),
        optimizer_tiles=0 if is_offloaded else _tile_bytes(workload, parameters.total),
        host=sum(shards.values()) if is_offloaded else 0,
    )


def _tile_bytes(workload: Workload, num_local: int) -> int:
    if workload.optimizer == "tiled_adamw":
        return FLOAT32 * min(num_local, max(MIN_TILE_NUMEL, num_local // TILES))
    return workload.element_bytes * num_local if workload.optimizer == "adamw" else 0


def _gathered_numel(config: ZCodeM3Config, layout: Layout, parameters: RankParameters) -> int:
    """Elements of parameters that are gathered at the loss; in stage 3 only two units and the embeddings."""
    if layout.data_parallel_size == 1:
        return 0
    if layout.zero_stage < 3:
        return _shared_numel(layout, parameters)
    return _numel_of_two_units(HashableConfig.of(config), layout)


@functools.lru_cache(maxsize=4096)
def _numel_of_two_units(hashable: HashableConfig, layout: Layout) -> int:
    largest: dict[object, int] = {}
    for parameter in parameter_shapes(hashable.config):
        is_alone = is_spread_expert(parameter, layout) and not layout.wraps_experts_in_fsdp
        if not is_alone:
            numel = math.prod(gathered_shape(parameter, layout))
            unit = (
                None if parameter.layer is None else (parameter.layer[0], parameter.layer[1] // layout.layers_per_unit)
            )
            largest[unit] = largest.get(unit, 0) + numel
    outside_of_layers = largest.pop(None)  # embeddings and head, which the loss needs
    return outside_of_layers + sum(sorted(largest.values())[-2:])


def _shared_numel(layout: Layout, parameters: RankParameters) -> int:
    dense = parameters.gathered_dense + parameters.gathered_embedding
    is_shared = layout.wraps_experts_in_fsdp if layout.experts_are_spread else True
    return dense + (parameters.gathered_expert if is_shared else 0)


def _whole_gradients_numel(layout: Layout, parameters: RankParameters) -> int:
    if layout.data_parallel_size == 1:
        return parameters.total  # they stay from one forward to the next
    dense = parameters.gathered_dense + parameters.gathered_embedding
    return dense + parameters.gathered_expert


# ---- activations ----


def _activations(config: ZCodeM3Config, layout: Layout, workload: Workload) -> int:
    """Bytes that all layers keep from forward to backward."""
    total = 0
    for side, num_experts, count in layer_groups(config):
        if workload.checkpointing is None:
            total += count * kept_of_layer(config, layout, workload, side, num_experts)
        else:
            total += count * workload.num_tokens(side) * config.d_model * workload.element_bytes
        if workload.checkpointing == "communication-aware":
            total += count * _kept_of_collectives(config, layout, workload, side, num_experts)
    return total


def kept_of_layer(config: ZCodeM3Config, layout: Layout, workload: Workload, side: str, num_experts: int | None) -> int:
    """Without checkpointing: bytes that autograd saves for a layer whose attention keeps no scores.

    For each block: input and output of its LayerNorm (its projections read the output), and a dropout mask. For
    attention: queries, keys, values and output; for a feed-forward: the activation. Tensor parallelism divides these.
    """
    tp, num_tokens, width = layout.tensor_parallel_size, workload.num_tokens(side), config.d_model
    num_blocks = 2 if side == "encoder" else 3
    mask_bytes = num_tokens * width if config.dropout > 0 else 0
    block = 2 * num_tokens * width * workload.element_bytes + mask_bytes
    attention = 4 * num_tokens * width
    if side == "decoder":
        attention += 2 * num_tokens * width + 2 * workload.num_tokens("encoder") * width
    ffn_dim = getattr(config, f"{side}_ffn_dim")
    inner = num_tokens * ffn_dim // tp
    if num_experts is not None:
        rows, inner = _rows_of_experts(config, layout, num_tokens, num_experts), 0
        etp = layout.expert_tensor_parallel_size
        inner += rows * (ffn_dim // etp) + (rows * 2 * width if layout.expert_parallel_size > 1 else 0)
        inner += num_tokens * ffn_dim // tp if config.use_residual else 0
    return num_blocks * block + (attention // tp + inner) * workload.element_bytes


def _rows_of_experts(config: ZCodeM3Config, layout: Layout, num_tokens: int, num_experts: int) -> int:
    """Rows that a rank's experts compute in a layer."""
    if layout.expert_parallel_size == 1:
        return num_tokens * config.num_experts_per_tok
    return exchange_of(config, layout, num_tokens, num_experts).computed_rows(layout)


def _kept_of_collectives(
    config: ZCodeM3Config, layout: Layout, workload: Workload, side: str, num_experts: int | None
) -> int:
    """Results of collectives: sums of blocks, and rows that experts received and gave back."""
    num_tokens, tp = workload.num_tokens(side), layout.tensor_parallel_size
    states = num_tokens * config.d_model * workload.element_bytes
    num_sums = (1 if side == "encoder" else 2) + (num_experts is None) if tp > 1 else 0
    total = num_sums * states
    if num_experts is None:
        return total
    if layout.expert_parallel_size == 1:
        return total + (states if layout.expert_tensor_parallel_size > 1 else 0)
    exchange = exchange_of(config, layout, num_tokens, num_experts)
    rows = 2 * exchange.num_rows
    if exchange.drops_duplicates:
        rows += exchange.computed_rows(layout) + exchange.num_rows
    elif layout.expert_tensor_parallel_size > 1:
        rows += exchange.num_rows
    joined = exchange.joined_rows * exchange.num_shares if exchange.num_shares > 1 else 0
    return total + (rows + joined) * config.d_model * workload.element_bytes


def _exchange_buffers(config: ZCodeM3Config, layout: Layout, workload: Workload) -> int:
    """With checkpointing, rows of the one sparse layer that is being computed: sent, received and returned."""
    if layout.expert_parallel_size == 1 or workload.checkpointing is None:
        return 0
    row = config.d_model * workload.element_bytes
    largest = 0
    for side, num_experts, _ in layer_groups(config):
        if num_experts is not None:
            exchange = exchange_of(config, layout, workload.num_tokens(side), num_experts)
            largest = max(largest, (2 * exchange.num_rows + exchange.computed_rows(layout)) * row)
    return largest


__all__ = ["Memory", "kept_of_layer", "memory_of_rank"]
