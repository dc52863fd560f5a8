"""A layout: numbers and switches that say how ranks share a model and its batches."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.utils import logging

from .least_loaded import LEAST_LOADED, LEAST_LOADED_BOUND, LEAST_LOADED_MIN_TOKENS, check_least_loaded

logger = logging.get_logger(__name__)

# Number of layers whose parameters ZeRO-1 and 2 gather together, and whose gradients they reduce together. They stay
# gathered anyway. Each unit costs the host about two milliseconds per step, longer than a small layer computes.
LAYERS_PER_UNIT = 6


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes (mesh.py), and how the ranks of an axis work together; [`TedPlugin`] explains them.

    Attributes:
        dp_replicate_size: replicas, each of which has everything that ZeRO shards; `data_parallel_size` counts the
            ranks of all replicas.
        mixed_precision: whether FSDP2 computes in bfloat16.
        ep_implementation: name, in the registry of transformers, of the class that exchanges tokens.

    Raises:
        ValueError: the layout is impossible.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    dp_replicate_size: int = 1
    zero_stage: int = 1
    offload: str | None = None
    mixed_precision: bool = False
    duplicate_token_dropping: bool = True
    overlap_chunks: int = 1
    pad_expert_input_to_capacity: bool = False
    ep_implementation: str = "ted"
    least_loaded_bound: float = LEAST_LOADED_BOUND
    least_loaded_min_tokens: int = LEAST_LOADED_MIN_TOKENS

    def __post_init__(self) -> None:
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage ({self.zero_stage!r}) must be 1, 2 or 3")
        if self.offload not in (None, "cpu"):
            raise ValueError(f"offload ({self.offload!r}) must be None or 'cpu'")
        if self.overlap_chunks < 1:
            raise ValueError(f"overlap_chunks ({self.overlap_chunks}) must be at least 1")
        if self.pad_expert_input_to_capacity and self.overlap_chunks > 1:
            raise ValueError(f"overlap_chunks ({self.overlap_chunks}) must be 1 with pad_expert_input_to_capacity")
        if self.moves_experts:
            self._check_moving()
        if self.offload and self.data_parallel_size == 1:
            tp = self.tensor_parallel_size
            raise ValueError(
                f"offload='cpu' moves the shards of data parallelism, but data_parallel_size is 1 (world {tp} / "
                f"tensor_parallel_size {tp}); lower tensor_parallel_size"
            )
        if self.dp_replicate_size != 1:
            self._check_replicas()

    def _check_moving(self) -> None:
        check_least_loaded(self.least_loaded_bound, self.least_loaded_min_tokens)
        if self.overlap_chunks > 1:
            raise ValueError(f"overlap_chunks ({self.overlap_chunks}) must be 1 with least_loaded_experts")
        if self.pad_expert_input_to_capacity:
            raise ValueError(
                "pad_expert_input_to_capacity (True) does not work with least_loaded_experts (True): it sends rows "
                "by the routing, but a padded exchange must not depend on the routing; leave one of them False"
            )

    @property
    def moves_experts(self) -> bool:
        """Whether ranks with few tokens compute experts of ranks with many."""
        return self.ep_implementation == LEAST_LOADED

    def _check_replicas(self) -> None:
        replicas, dp, tp = self.dp_replicate_size, self.data_parallel_size, self.tensor_parallel_size
        if replicas < 1:
            raise ValueError(f"dp_replicate_size ({replicas}) must be at least 1")
        if dp % replicas:
            raise ValueError(
                f"dp_replicate_size ({replicas}) must divide data_parallel_size ({dp}): each replica has the same "
                "number of data-parallel ranks"
            )
        if replicas == dp:
            raise ValueError(
                f"dp_replicate_size ({replicas}) must be less than data_parallel_size ({dp}): with one data-parallel "
                "rank per replica ZeRO cannot shard; leave dp_replicate_size out: that takes less memory and, in "
                "stages 1 and 2, sends the same bytes between machines"
            )
        ranks, num_expert_ranks = self.ranks_per_replica, self.expert_parallel_size * self.expert_tensor_parallel_size
        if ranks % num_expert_ranks and num_expert_ranks % ranks:
            raise ValueError(
                f"expert_parallel_size ({self.expert_parallel_size}) x expert_tensor_parallel_size "
                f"({self.expert_tensor_parallel_size}) = {num_expert_ranks} must divide the {ranks} ranks of a replica "
                f"(tensor_parallel_size {tp} x data_parallel_size {dp} / dp_replicate_size {replicas}), or be a "
                "multiple of them; change expert_parallel_size or dp_replicate_size"
            )

    @property
    def ranks_per_replica(self) -> int:
        return self.tensor_parallel_size * self.data_parallel_size // self.dp_replicate_size

    @property
    def zero_size(self) -> int:
        """Ranks over which ZeRO shards weights outside of experts."""
        return self.data_parallel_size // self.dp_replicate_size

    @property
    def layers_per_unit(self) -> int:
        """Number of layers whose parameters ZeRO gathers together, and whose gradients it reduces together."""
        return 1 if self.zero_stage == 3 else LAYERS_PER_UNIT

    @property
    def expert_data_parallel_size(self) -> int:
        """Ranks that hold the same slices of the same experts."""
        num_ranks = self.tensor_parallel_size * self.data_parallel_size
        return num_ranks // (self.expert_parallel_size * self.expert_tensor_parallel_size)

    @property
    def expert_dp_replicate_size(self) -> int:
        """Replicas of experts: as many as of the other weights if each replica has all experts.

        If experts are spread over several replicas, no replica has two copies of an expert. Then ZeRO shards an expert
        over all of its copies, as without replicas: replicas of experts would cost memory and save nothing.
        """
        num_expert_ranks = self.expert_parallel_size * self.expert_tensor_parallel_size
        return self.dp_replicate_size if self.ranks_per_replica % num_expert_ranks == 0 else 1

    @property
    def expert_zero_size(self) -> int:
        """Ranks over which ZeRO shards experts."""
        return self.expert_data_parallel_size // self.expert_dp_replicate_size

    @property
    def experts_are_spread(self) -> bool:
        return self.expert_parallel_size * self.expert_tensor_parallel_size > 1

    @property
    def wraps_experts_in_fsdp(self) -> bool:
        """Whether FSDP manages ZCodeM3's experts: to shard them, or for features that only FSDP has."""
        return self.expert_data_parallel_size > 1 or self.offload is not None or self.mixed_precision


def layout_of(module: nn.Module) -> Layout | None:
    """The layout with which a model, or the model of these experts, is loaded; `None` without a [`TedConfig`]."""
    config: Any = getattr(getattr(module, "config", None), "distributed_config", None)
    layout = getattr(config, "layout", None)
    return layout if isinstance(layout, Layout) else None


def sizes_of_axes(world_size: int, tp: int, ep: int, etp: int | None, dp: int | None) -> tuple[int, int, int, int]:
    """Sizes of the tensor, expert, expert-tensor and data axes; on one process all are 1.

    Raises:
        ValueError: the sizes do not fit each other or the world size.
    """
    sizes = {
        "tensor_parallel_size": tp,
        "expert_parallel_size": ep,
        "expert_tensor_parallel_size": 1 if etp is None else etp,
        "data_parallel_size": 1 if dp is None else dp,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} ({size}) must be at least 1")
    if world_size == 1:
        if max(sizes.values()) > 1:
            logger.warning(f"only one process: {sizes} are all taken as 1; start several with torchrun")
        return 1, 1, 1, 1
    etp, dp = tp if etp is None else etp, world_size // tp if dp is None else dp
    _check_sizes(world_size, tp, ep, etp, dp)
    return tp, ep, etp, dp


def replicas_of(world_size: int, dp_replicate_size: int) -> int:
    """The number of replicas; on one process it is 1, whatever value is given.

    Raises:
        ValueError: it is less than 1.
    """
    if dp_replicate_size < 1:
        raise ValueError(f"dp_replicate_size ({dp_replicate_size}) must be at least 1")
    if world_size == 1 and dp_replicate_size > 1:
        logger.warning(f"only one process: dp_replicate_size ({dp_replicate_size}) is taken as 1; start several")
        return 1
    return dp_replicate_size


def _check_sizes(world_size: int, tp: int, ep: int, etp: int, dp: int) -> None:
    if world_size % tp:
        raise ValueError(f"the world size ({world_size} processes) must be divisible by tensor_parallel_size ({tp})")
    if tp * dp != world_size:
        raise ValueError(
            f"tensor_parallel_size ({tp}) x data_parallel_size ({dp}) = {tp * dp} must be the world size ({world_size})"
        )
    if tp % etp:
        raise ValueError(f"expert_tensor_parallel_size ({etp}) must divide tensor_parallel_size ({tp})")
    experts = f"expert_parallel_size ({ep}) x expert_tensor_parallel_size ({etp}) = {ep * etp}"
    if world_size % (ep * etp):
        raise ValueError(f"{experts} must divide the world size ({world_size} processes)")
    if (ep * etp) % tp:
        raise ValueError(
            f"{experts} must be a multiple of tensor_parallel_size ({tp}): the ranks of a tensor-parallel group hold "
            "the same tokens, so they must split experts or hold different ones"
        )


__all__ = ["LAYERS_PER_UNIT", "Layout", "layout_of", "replicas_of", "sizes_of_axes"]
