"""TedConfig: transformers' DistributedConfig and what TED adds to it."""

from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from .adapters import expect_adapters
from .checkpoint import save_pretrained
from .layout import Layout
from .layout_check import check_model
from .least_loaded import LEAST_LOADED_BOUND, LEAST_LOADED_MIN_TOKENS
from .parallelize import offload_parameters, parallelize


@dataclass(repr=False)
class TedConfig(DistributedConfig):
    """The layout for `from_pretrained(distributed_config=...)`. [`TedPlugin`] makes it.

    Attributes:
        tp_size: ranks that share a batch and split each dense layer.
        dp_replicate_size: replicas of the model, each sharded over `fsdp_size` x `tp_size` ranks (HSDP).
        fsdp_size: data-parallel ranks of a replica, of `tp_size` each.
        ep_size: ranks that together hold all experts once: expert-parallel times expert-tensor-parallel size.
        expert_tensor_parallel_size: ranks that split an expert; divides `tp_size`.
        dense_replicate_size: replicas of weights outside of experts within each of the `dp_replicate_size`. It is for
            experts that are spread over replicas, which the meshes of transformers do not support.
        zero_stage: 1 and 2 keep parameters gathered from forward to backward, 3 does not; 2 reduces gradients after
            every micro-batch, 1 at the end of an accumulation.
        duplicate_token_dropping: whether each rank of a tensor-parallel group, whose ranks hold the same tokens, sends
            only its share of them to the experts.
        overlap_chunks: number of parts of a batch; the exchange of one overlaps with the experts' work on another. 1 is
            no overlap.
        pad_expert_input_to_capacity: whether ranks exchange as many rows as the capacity allows, independent of the
            routing.
        ep_implementation: `"ted"`, or `"ted_least_loaded"`: ranks with few tokens compute experts of others.
        least_loaded_bound, least_loaded_min_tokens: its options; see [`TedPlugin`].
    """

    expert_tensor_parallel_size: int = 1
    dense_replicate_size: int = 1
    zero_stage: int = 1
    duplicate_token_dropping: bool = True
    overlap_chunks: int = 1
    pad_expert_input_to_capacity: bool = False
    ep_implementation: str = "ted"
    least_loaded_bound: float = LEAST_LOADED_BOUND
    least_loaded_min_tokens: int = LEAST_LOADED_MIN_TOKENS

    @classmethod
    def of_layout(cls, layout: Layout) -> "TedConfig":
        """The config of a [`Layout`]."""
        return cls(
            tp_size=layout.tensor_parallel_size,
            fsdp_size=layout.data_parallel_size // layout.expert_dp_replicate_size,
            dp_replicate_size=layout.expert_dp_replicate_size,
            dense_replicate_size=layout.dp_replicate_size // layout.expert_dp_replicate_size,
            ep_size=layout.expert_parallel_size * layout.expert_tensor_parallel_size,
            fsdp_cpu_offload=layout.offload is not None,
            fsdp_mixed_precision=layout.mixed_precision,
            **{name: getattr(layout, name) for name in _SHARED_FIELDS},
        )

    @property
    def layout(self) -> Layout:
        """The checked [`Layout`] of this config.

        Raises:
            ValueError: the layout is impossible.
        """
        sizes: Any = self  # none of them is None after the parent's __post_init__
        return Layout(
            tensor_parallel_size=sizes.tp_size,
            data_parallel_size=sizes.dp_size,
            dp_replicate_size=sizes.dp_replicate_size * self.dense_replicate_size,
            expert_parallel_size=sizes.ep_size // self.expert_tensor_parallel_size,
            offload="cpu" if self.fsdp_cpu_offload and self.dp_size > 1 else None,
            mixed_precision=self.fsdp_mixed_precision,
            **{name: getattr(self, name) for name in _SHARED_FIELDS},
        )

    def distribute(self, model: PreTrainedModel, mesh_manager: Any) -> PreTrainedModel:
        """Shard a model before its weights are loaded; ZCodeM3 calls it instead of transformers' own function."""
        check_model(model.config, self.layout)
        expert_plan = dict(model.ep_plan or {})
        super()._validate_resolved_ep_plan(expert_plan)
        _take_ted_experts(expert_plan)
        return parallelize(model, self.layout, mesh_manager, expert_plan)

    def finish_loading(self, model: PreTrainedModel) -> None:
        """Finish after the weights are loaded: with `offload="cpu"` they go to the CPU, where FSDP2 expects them."""
        if model.is_distributed_loading_by_transformers:
            expect_adapters(model)
        if self.layout.offload is not None:
            offload_parameters(model)

    def save_pretrained(
        self,
        model: PreTrainedModel,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """Write a sharded model as one ordinary folder; all ranks call it, and rank 0 writes.

        `is_main_process` and `save_function`, which Accelerate's examples give, are accepted and have no effect.

        Raises:
            ValueError: an argument of [`PreTrainedModel.save_pretrained`] that a sharded model does not support.
        """
        usual = {"safe_serialization": True, "distributed_checkpoint": False, "variant": None, "token": None}
        without_effect = {"save_function", "save_original_format", "save_peft_format"}
        wrong = {k: v for k, v in kwargs.items() if k not in without_effect and not (k in usual and v == usual[k])}
        if push_to_hub:
            wrong["push_to_hub"] = push_to_hub
        if wrong:
            raise ValueError(
                f"{wrong} cannot be given for a sharded model; save it without, then load it on one process and save "
                "it again"
            )
        save_pretrained(model, save_directory, max_shard_size=max_shard_size, state_dict=state_dict)

    def _validate_resolved_ep_plan(self, ep_plan: dict[str, str]) -> None:
        # this is the only place where transformers gives a configuration the plan of a model that it shards
        super()._validate_resolved_ep_plan(ep_plan)
        if self.dense_replicate_size > 1:
            ranks = self.layout.ranks_per_replica
            raise ValueError(
                f"dp_replicate_size ({self.layout.dp_replicate_size}) with experts on more ranks ({self.ep_size}) "
                f"than a replica has ({ranks}) is for ZCodeM3 only: leave dp_replicate_size out, or lower "
                "expert_parallel_size"
            )
        _take_ted_experts(ep_plan)


def _take_ted_experts(ep_plan: dict[str, str]) -> None:
    """Shard experts over two axes instead of one."""
    for name, style in ep_plan.items():
        if style == "grouped_gemm":
            ep_plan[name] = "ted_experts"


# fields of both classes, under the same names
_SHARED_FIELDS = [field.name for field in fields(Layout) if field.name in TedConfig.__annotations__]

__all__ = ["TedConfig"]
