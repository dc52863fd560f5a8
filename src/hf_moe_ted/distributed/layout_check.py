"""Check that a model fits the layout with which it is trained."""

from typing import Any

from torch import nn
from transformers import PretrainedConfig

from .layout import Layout

_SIZES = (
    *("tp_size", "fsdp_size", "dp_replicate_size", "dense_replicate_size"),
    *("ep_size", "expert_tensor_parallel_size", "zero_stage"),
)


def check_is_sharded(model: nn.Module, parallelism_config: Any) -> None:
    """Check that a model is sharded; otherwise every rank would silently train a whole copy.

    Args:
        model: the model that a Trainer or an Accelerator gets. A model without trainable parameters, such as a teacher,
            may be whole.
        parallelism_config: a [`TedPlugin`]; nothing is checked for other configs, for `None`, or on one process.

    Raises:
        ValueError: the plugin is for several processes, but the model is not sharded, or has another layout.
    """
    wanted = getattr(parallelism_config, "distributed_config", None)
    if wanted is None or parallelism_config.total_size == 1:
        return
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        if any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"{type(model).__name__} is not sharded, but the TedPlugin is for {parallelism_config.total_size} "
                f"processes (tensor_parallel_size {wanted.tp_size} x data_parallel_size {wanted.dp_size}): load it "
                "with from_pretrained(folder, distributed_config=plugin.distributed_config)"
            )
        return
    present: Any = getattr(model, "config", None)
    present = getattr(present, "distributed_config", None)
    for name in _SIZES:
        has, wants = getattr(present, name, None), getattr(wanted, name)
        if has is not None and has != wants:
            raise ValueError(
                f"{type(model).__name__} was loaded with {name} {has}, but the TedPlugin has {wants}: give the "
                "Trainer or the Accelerator the plugin whose distributed_config loaded the model"
            )


def check_model(config: PretrainedConfig, layout: Layout) -> None:
    """
    Raises:
        ValueError: the layout does not divide the sizes of a ZCodeM3, or the model has no capacity to pad to.
    """
    if layout.pad_expert_input_to_capacity and config.capacity_factor is None:
        raise ValueError(
            "pad_expert_input_to_capacity (True) needs a capacity to pad to, but capacity_factor is None: set a "
            "capacity_factor, or leave pad_expert_input_to_capacity False"
        )
    wanted = [("vocab_size", "tensor_parallel_size", config.vocab_size)]
    for side in ("encoder", "decoder"):
        heads, ffn_dim = f"{side}_attention_heads", f"{side}_ffn_dim"
        wanted += [(name, "tensor_parallel_size", getattr(config, name)) for name in (heads, ffn_dim)]
        for layer, num_experts in config.num_experts_per_layer(side).items():
            wanted.append((ffn_dim, "expert_tensor_parallel_size", getattr(config, ffn_dim)))
            wanted.append((f"num_experts of {side} layer {layer}", "expert_parallel_size", num_experts))
    for name, axis, size in wanted:
        divisor = getattr(layout, axis)
        if size % divisor:
            hint = "; model.resize_token_embeddings(n, pad_to_multiple_of=...) pads it" if name == "vocab_size" else ""
            raise ValueError(f"{name} ({size}) must be divisible by {axis} ({divisor}){hint}")


__all__ = ["check_is_sharded", "check_model"]
