"""TedConfig: transformers' DistributedConfig and what TED adds to it."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from ..distributed import expert_parallel, tensor_parallel  # noqa: F401  # they register the styles that the plans name


@dataclass(repr=False)
class TedConfig(DistributedConfig):
    """What `from_pretrained(distributed_config=...)` needs to know of a layout. [`TedPlugin`] makes it.

    Attributes:
        tp_size: ranks that share a batch and split each dense layer.
        fsdp_size: data-parallel ranks, of `tp_size` each.
        ep_size: ranks that hold all experts once between them: expert-parallel times expert-tensor-parallel size.
        expert_tensor_parallel_size: ranks that split an expert; divides `tp_size`.
        zero_stage: 1 and 2 keep parameters gathered from forward to backward, 3 does not; 2 reduces gradients after
            every micro-batch, 1 at the end of an accumulation.
        duplicate_token_dropping: whether ranks of a tensor-parallel group, which hold the same tokens, send each only
            a share of them to the experts.
        overlap_chunks: parts of a batch whose exchange overlaps with the experts' work on another; 1 for no overlap.
        pad_expert_input_to_capacity: whether ranks exchange as many rows as the capacity allows, whatever the routing.
    """

    expert_tensor_parallel_size: int = 1
    zero_stage: int = 1
    duplicate_token_dropping: bool = True
    overlap_chunks: int = 1
    pad_expert_input_to_capacity: bool = False
    ep_implementation: str = "ted"

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that hold different experts."""
        assert self.ep_size is not None  # set by the parent's __post_init__
        return self.ep_size // self.expert_tensor_parallel_size

    @property
    def wraps_experts_in_fsdp(self) -> bool:
        """Whether FSDP manages ZCodeM3's experts: to share them, or for what only FSDP does."""
        return self.efsdp_size > 1 or self.fsdp_cpu_offload or self.fsdp_mixed_precision

    def distribute(self, model: PreTrainedModel, mesh_manager: Any) -> PreTrainedModel:
        """Shard a model that is not loaded yet; ZCodeM3 asks for it in place of transformers' own way."""
        from .parallelize import parallelize

        check_model(model.config, self)
        return parallelize(model, self, mesh_manager)

    def finish_loading(self, model: PreTrainedModel) -> None:
        """After the weights are there: with `offload="cpu"` they go to the CPU, where FSDP2 wants them."""
        from .parallelize import offload_parameters

        if self.fsdp_cpu_offload and self.dp_size > 1:
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

        `is_main_process` and `save_function`, as in the examples of Accelerate, may be given and change nothing.

        Raises:
            ValueError: an argument of [`PreTrainedModel.save_pretrained`] that a sharded model does not have.
        """
        from .checkpoint import save_pretrained

        usual = {"safe_serialization": True, "distributed_checkpoint": False, "variant": None, "token": None}
        without_effect = {"save_function", "save_original_format", "save_peft_format"}
        wrong = {k: v for k, v in kwargs.items() if k not in without_effect and not (k in usual and v == usual[k])}
        if push_to_hub:
            wrong["push_to_hub"] = push_to_hub
        if wrong:
            raise ValueError(f"{wrong} cannot be given for a sharded model; save it, load and save it again")
        save_pretrained(model, save_directory, max_shard_size=max_shard_size, state_dict=state_dict)

    def _validate_resolved_ep_plan(self, ep_plan: dict[str, str]) -> None:
        # here transformers shows a configuration the plan of the model, the only place where it does: experts are
        # sharded over two axes in place of one
        super()._validate_resolved_ep_plan(ep_plan)
        for name, style in ep_plan.items():
            if style == "grouped_gemm":
                ep_plan[name] = "ted_experts"


def check_model(config: PretrainedConfig, ted: TedConfig) -> None:
    """
    Raises:
        ValueError: the sizes of a ZCodeM3 cannot be divided as the layout asks, or it has no capacity to pad to.
    """
    if ted.pad_expert_input_to_capacity and config.capacity_factor is None:
        raise ValueError(
            "pad_expert_input_to_capacity (True) needs a capacity to pad to, and capacity_factor is None: set a "
            "capacity_factor, or leave pad_expert_input_to_capacity False"
        )
    tp, ep, etp = ted.tp_size, ted.expert_parallel_size, ted.expert_tensor_parallel_size
    wanted = [("vocab_size", tp, "tensor_parallel_size", config.vocab_size)]
    for side in ("encoder", "decoder"):
        wanted.append(
            (f"{side}_attention_heads", tp, "tensor_parallel_size", getattr(config, f"{side}_attention_heads"))
        )
        ffn_dim = getattr(config, f"{side}_ffn_dim")
        wanted.append((f"{side}_ffn_dim", tp, "tensor_parallel_size", ffn_dim))
        for layer, num_experts in config.num_experts_per_layer(side).items():
            wanted.append((f"{side}_ffn_dim", etp, "expert_tensor_parallel_size", ffn_dim))
            wanted.append((f"num_experts of {side} layer {layer}", ep, "expert_parallel_size", num_experts))
    for name, divisor, axis, size in wanted:
        if size % divisor:
            hint = "; model.resize_token_embeddings(n, pad_to_multiple_of=...) pads it" if name == "vocab_size" else ""
            raise ValueError(f"{name} ({size}) must be divisible by {axis} ({divisor}){hint}")


__all__ = ["TedConfig"]
