"""Apply tensor parallelism, expert parallelism and ZeRO to the layers of a ZCodeM3, in this order."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.trainer_utils import unwrap_peft_model

from ..models.moe_layer import ZCodeM3MoELayer
from .expert_parallel import expert_modules
from .layout import Layout, layout_of
from .least_loaded_parallel import LeastLoadedExpertParallel as _LeastLoaded  # noqa: F401  # registers itself
from .mesh import data_parallel_rank, expert_zero_mesh, inherit_timeout, zero_mesh
from .private_torch import StridedShard, fsdp_parameters
from .private_transformers import expanded_plan, mark_fsdp_managed, mark_sharded, mesh_manager
from .random_state import synchronize_random_state
from .refusals import refuse_methods
from .tensor_parallel import STYLES, join_logits_without_loss, vocab_parallel_cross_entropy


def parallelize(model: PreTrainedModel, layout: Layout, meshes: Any, expert_plan: dict[str, str]) -> PreTrainedModel:
    """Shard a ZCodeM3 whose parameters are on the meta device; loading then fills the shards.

    Args:
        model: ZCodeM3 model or head, changed in place.
        meshes: transformers' `TransformersDeviceMesh` of the layout; `None` on one process.
        expert_plan: styles of the experts by name.
    """
    if meshes is None:
        return model
    source: Any = model
    mark_sharded(model, meshes, layout)
    if layout.tensor_parallel_size > 1:
        plan = expanded_plan(model, tensor_parallel_plan(model))
        apply_tensor_parallelism(model, meshes.get_mesh("tp"), plan)
        if hasattr(source, "lm_head"):
            source.cross_entropy = vocab_parallel_cross_entropy
            join_logits_without_loss(model)
    if layout.experts_are_spread and expert_plan:
        for layer in model.modules():
            if isinstance(layer, ZCodeM3MoELayer):  # read in each forward, because the router's config may change
                experts: Any = layer.experts
                experts.max_tokens_per_expert = layer.router.max_tokens_per_expert
        apply_expert_parallelism(
            model,
            meshes.get_mesh("ep"),
            meshes.get_mesh("tp"),
            expanded_plan(model, expert_plan),
            ep_implementation=layout.ep_implementation,
        )
    # transformers ties weights only after loading; FSDP2 would then gather and reduce each of the tied weights
    model.tie_weights(recompute_mapping=False)
    if layout.data_parallel_size > 1:
        apply_zero(model, layout, meshes)
    prepare_for_training(model)
    return model


def offload_parameters(model: nn.Module) -> None:
    """Move all parameters to the CPU; buffers stay where the model computes."""
    if all(param.device.type == "cpu" for param in model.parameters()):
        return
    devices = {name: buffer.device for name, buffer in model.named_buffers()}
    model.to("cpu")
    for name, device in devices.items():
        module_name, _, buffer_name = name.rpartition(".")
        setattr(model.get_submodule(module_name), buffer_name, model.get_buffer(name).to(device))


def tensor_parallel_plan(model: Any) -> dict[str, str]:
    """The model's plan with our styles instead of those of transformers.

    The first projection of a dense feed-forward copies its own input. In attention, and for the encoder's states, one
    copy serves several projections.
    """
    plan: dict[str, str] = {}
    for name, style in model.tp_plan.items():
        if style == "colwise" and name.endswith(".fc1"):
            plan[name] = "ted_first_column"
            continue
        plan[name] = STYLES[style]
        if style == "colwise":
            plan[name.rpartition(".")[0]] = "ted_block_input"
    for name, module in model.named_modules():
        if name.endswith("embed_positions") and hasattr(module, "q_proj"):
            projections = {f"{name}.q_proj": "ted_first_column", f"{name}.k_proj": "ted_first_column"}
            plan |= {name: "ted_untied_positions", **projections}
        elif re.fullmatch(r"(.*\.)?decoder", name):
            plan[name] = "ted_decoder_input"
    return plan


def apply_zero(model: PreTrainedModel, layout: Layout, meshes: Any) -> None:
    """ZeRO through FSDP2: experts over the ranks with the same experts, other weights over data-parallel ranks.

    With replicas, weights are sharded only over the ranks of a replica, and gradients are then summed over replicas.
    Experts that no other rank holds are not changed: FSDP2 would keep a second copy of them.
    """
    options = zero_options(layout)
    alone: set[nn.Parameter] = set()
    for experts in expert_modules(model):
        if layout.wraps_experts_in_fsdp:
            shard_experts(experts, layout, expert_zero_mesh(meshes, layout), options)
        else:
            alone.update(experts.parameters())
    mesh = zero_mesh(meshes, layout)
    units = units_of_layers(model, layout)
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=alone, **options)
    _prefetch(units)
    fully_shard(model, mesh=mesh, ignored_params=alone, **options)
    # generation calls the encoder without the model, but the model's hooks gather the embedding:
    # docs/upstream/transformers_fsdp_generate.md
    register_fsdp_forward_method(model, "generate")
    mark_fsdp_managed(model)


def zero_options(layout: Layout) -> dict[str, Any]:
    """The arguments of `fully_shard` that follow from a layout."""
    options: dict[str, Any] = {"reshard_after_forward": layout.zero_stage == 3}
    if layout.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    if layout.mixed_precision:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return options


def units_of_layers(model: nn.Module, layout: Layout) -> list[list[nn.Module]]:
    """Layers whose parameters are gathered at once."""
    size = layout.layers_per_unit
    return [
        layers[start : start + size] for layers in _stacks_of_layers(model) for start in range(0, len(layers), size)
    ]


def shard_experts(experts: nn.Module, layout: Layout, mesh: DeviceMesh, options: dict[str, Any]) -> None:
    """Shard experts, or their adapters: by expert if each rank gets the same number, else by rows of the weights."""

    def placement(param: nn.Parameter) -> Shard | None:
        local = param.to_local() if isinstance(param, DTensor) else param
        taken = {place.dim for place in getattr(param, "placements", ()) if isinstance(place, StridedShard)}
        size = layout.expert_zero_size
        dims = [dim for dim in range(local.ndim) if local.shape[dim] % size == 0 and dim not in taken]
        return Shard(dims[0]) if dims else None

    module: Any = fully_shard(experts, mesh=mesh, shard_placement_fn=placement, **options)
    # the gradient covers the tokens of all data-parallel ranks, whatever number of them holds the expert
    module.set_gradient_divide_factor(float(layout.data_parallel_size))
    if layout.expert_zero_size > 1:  # else FSDP2 divides before it sums over replicas
        # another factor than the group's size is applied in the reduction, which gloo refuses and NCCL gets wrong in
        # bfloat16: docs/upstream/torch_premul_sum_bfloat16.md
        module.set_force_sum_reduction_for_comms(True)


def _stacks_of_layers(model: nn.Module) -> list[list[nn.Module]]:
    """The layers of encoder and decoder in the order in which they run."""
    stacks = [module for name, module in model.named_modules() if re.fullmatch(r"(.*\.)?layers", name)]
    return [list(stack.children()) for stack in stacks]


def _prefetch(units: list[list[nn.Module]]) -> None:
    """Gather the parameters of the next unit while one computes, in forward and backward."""
    gathered = [
        [unit[0], *(m for layer in unit for m in expert_modules(layer) if isinstance(m, FSDPModule))] for unit in units
    ]
    for index, (module, *_) in enumerate(gathered):
        first: Any = module
        if index + 1 < len(units):
            first.set_modules_to_forward_prefetch(gathered[index + 1])
        if index > 0:
            first.set_modules_to_backward_prefetch(gathered[index - 1])


def prepare_for_training(model: nn.Module) -> None:
    """Set up what a sharded model of any class needs besides its shards; done once.

    Models other than ZCodeM3 are sharded by transformers, without ZeRO's stages 1 and 2.
    """
    model = unwrap_peft_model(model)
    layout = layout_of(model)
    for module in model.modules():
        if isinstance(module, FSDPModule) and layout is not None and layout.zero_stage < 3:
            module.set_reshard_after_forward(False, recurse=False)
    meshes = mesh_manager(model)
    _name_as_whole(model)
    refuse_methods(model)
    for axes in (("dp_replicate", "fsdp", "tp"), ("dp_replicate", "efsdp", "ep")):
        inherit_timeout(meshes.get_mesh(axes))
    synchronize_random_state(model, data_parallel_rank(meshes), meshes.get_mesh("tp").get_group())


def show_shards(model: nn.Module) -> None:
    """Make a model show its shards: a forward without backward leaves gathered parameters in their place.

    Parameters that were frozen meanwhile stay frozen. Do not call it between a forward and its backward: it would cost
    another gather.
    """
    shown = {*model.parameters()}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for part in fsdp_parameters(module):
                if part.whole in shown:
                    part.sharded.requires_grad_(part.whole.requires_grad)
            module.reshard()


def step_shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer step the shards, if it was made after a forward without backward.

    Such an optimizer has the gathered parameters, which get no gradients and are overwritten by the next gather.
    """
    managed = [part for module in model.modules() if isinstance(module, FSDPModule) for part in fsdp_parameters(module)]
    shards = {part.whole: part.sharded for part in managed if part.whole is not None}
    for group in optimizer.param_groups:
        group["params"] = [shards.get(param, param) for param in group["params"]]


@contextlib.contextmanager
def deferred_reduction(model: Any, layout: Layout) -> Iterator[None]:
    """Context for a micro-batch that is not the last of its accumulation, for a model that FSDP2 manages.

    ZeRO-2 reduces gradients inside a replica, so that none stay whole, and sums them over replicas with the last
    micro-batch. Stages 1 and 3 reduce nothing. Stages 1 and 2 keep the gathered parameters for the next micro-batch:
    parameters do not change before the last one, and the next loss would need the same memory for them.
    """
    if layout.zero_stage == 2:
        model.set_requires_all_reduce(False)
    else:
        model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(layout.zero_stage == 3)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)  # and the sum over replicas
        model.set_reshard_after_backward(True)


def _name_as_whole(model: nn.Module) -> None:
    """Restore the class name: FSDP2 makes a subclass whose name transformers does not know.

    With the subclass's name, saving would take it for a custom class and copy its file as remote code
    (`custom_object_save` in transformers/dynamic_module_utils.py), and the Trainer's label smoothing would not shift
    labels (`compute_loss`): docs/upstream/transformers_fsdp_class_name.md.
    """
    wrapped: Any = type(model)
    if isinstance(model, FSDPModule):
        whole = next(cls for cls in wrapped.__mro__ if not issubclass(cls, FSDPModule))
        wrapped.__module__, wrapped.__name__, wrapped.__qualname__ = (
            whole.__module__,
            whole.__name__,
            whole.__qualname__,
        )


__all__ = [
    "apply_zero",
    "deferred_reduction",
    "offload_parameters",
    "parallelize",
    "prepare_for_training",
    "shard_experts",
    "show_shards",
    "step_shards",
    "tensor_parallel_plan",
    "units_of_layers",
    "zero_options",
]
