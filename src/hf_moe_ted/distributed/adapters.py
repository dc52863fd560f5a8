"""LoRA (PEFT) in a sharded model: factors are split in the same way as their weights.

The layers of PEFT do not change, except for three things, read in peft 0.21.2:

- PEFT makes the factors of a split linear layer from the shape of this rank's shard. With data parallelism no layer
  computes with that shape. It also gives them a tensor parallelism that exchanges DTensors, which counts the gradient
  of an input several times if a block copies its input to the group once. Here its `update_layer` makes whole factors,
  which are then split as the layer is.
- A factor of a split layer runs with the collectives of that layer's style.
- PEFT adds the factors of experts to their weights with `torch.nn.utils.parametrize`, which moves the weights away from
  where the exchange of tokens looks for its shards. Here the exchange adds the factors itself.

Shape letters: E local experts, R rank of the factors, I inputs and O outputs of a weight.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from transformers.trainer_utils import unwrap_peft_model

from ..models.pretrained_model import ZCodeM3PreTrainedModel
from .adapter_folder import merge_into_shards, save_adapter
from .collectives import copy_to_group
from .expert_parallel import layout_of_experts
from .layout import Layout
from .local_shard import LocalShard
from .mesh import expert_mesh, expert_zero_mesh, zero_mesh
from .parallelize import shard_experts, show_shards, units_of_layers, zero_options
from .private_torch import StridedShard, forget_root, fsdp_parameters
from .private_transformers import mesh_manager
from .refusals import refuse_methods_of_adapters
from .tensor_parallel import can_split_low_rank, split_low_rank

Wrappers = dict[str, Any]  # layers of PEFT by name; each wraps a layer of the model

_EXPERT_WEIGHTS = ("up_proj", "down_proj")
_WHAT_TO_DO = "; else train the adapter in one process, without a TedPlugin"


def is_adapted(model: nn.Module) -> bool:
    """Whether it is a PEFT model around a sharded model."""
    base = unwrap_peft_model(model)
    return base is not model and bool(getattr(base, "is_distributed_loading_by_transformers", False))


def expect_adapters(base: Any) -> None:
    """Make PEFT load adapters into a sharded model as into a whole one. Factors are whole until they are sharded."""
    base.tp_plan = None  # PEFT would split them by this attribute; nothing is sharded after this point
    base.register_load_state_dict_pre_hook(lambda module, *_: _make_whole(module))
    base.register_forward_pre_hook(_check_adapters_are_sharded)


def _check_adapters_are_sharded(base: Any, _: Any) -> None:
    if getattr(base, "peft_config", None) and not _has_sharded_adapter(base):
        raise ValueError(
            f"{type(base).__name__} is sharded, but its adapter is not: call hf_moe_ted.shard_adapters(model) after "
            "get_peft_model or PeftModel.from_pretrained, as Trainer and accelerator.prepare do"
        )


def _has_sharded_adapter(base: nn.Module) -> bool:
    return "ted_adapter" in base.__dict__


def _make_whole(base: Any) -> None:
    """Make the factors of split linear layers again if PEFT made them for this rank's shard of the weight."""
    configs: Any = getattr(base, "peft_config", None)
    for module in base.modules() if configs else ():
        layer = getattr(module, "base_layer", None)
        if not (isinstance(layer, nn.Linear) and hasattr(module, "lora_A")):
            continue
        shape = layer.in_features, layer.out_features
        for adapter in [name for name in module.lora_A if _sizes(module, name) != shape]:
            before = module.lora_A[adapter].weight
            module.in_features, module.out_features = shape
            module.update_layer(adapter, module.r[adapter], module.lora_alpha[adapter], config=configs[adapter])
            for factor in (module.lora_A[adapter], module.lora_B[adapter]):
                factor.to(before.dtype).requires_grad_(before.requires_grad)


def _sizes(wrapper: Any, adapter: str) -> tuple[int, int]:
    return wrapper.lora_A[adapter].weight.shape[1], wrapper.lora_B[adapter].weight.shape[0]


def shard_adapters(model: nn.Module) -> nn.Module:
    """Shard the LoRA factors of a sharded model over the ranks, as its weights are. All ranks call it once.

    A Trainer and `accelerator.prepare` call it. If your training loop makes its optimizer before `prepare`, call it
    before you make the optimizer, which must get the new parameters.

    All ranks take the factors of rank 0, whatever their seeds. In a column-parallel layer `lora_A` is whole and
    `lora_B` is split by outputs. In a row-parallel layer `lora_A` is split by inputs and `lora_B` is whole. Factors of
    experts are spread over ranks with the experts. ZeRO shards factors over data-parallel ranks. The frozen weights get
    no gradients; ZeRO's stages 1 and 2 gather them once and keep them.

    Args:
        model: what `get_peft_model` or `PeftModel.from_pretrained` gives for a model that
            `from_pretrained(distributed_config=plugin.distributed_config)` has sharded. Any other model does not
            change.

    Returns:
        The model.

    Raises:
        ValueError: the adapter is of another kind, there is more than one, or a layer is split in a way that supports
            no adapter.
    """
    peft_model: Any = model
    base: Any = unwrap_peft_model(model)
    if not is_adapted(model) or _has_sharded_adapter(base):
        return model
    adapter, wrappers = _check(peft_model, base)
    _make_whole(base)
    _check_what_is_trained(peft_model, wrappers, adapter)
    layout, meshes = layout_of_experts(base), mesh_manager(base)
    for wrapper in wrappers.values():
        for factor in (wrapper.lora_A[adapter], wrapper.lora_B[adapter]):
            dist.broadcast(factor.weight.detach(), src=0)
    _split(wrappers, adapter, layout, meshes)
    _freeze(base)
    if layout.data_parallel_size > 1:
        _apply_zero(base, wrappers, layout, meshes)
    refuse_methods_of_adapters(peft_model)
    peft_model.save_pretrained = functools.partial(save_adapter, peft_model)
    for part in (peft_model, peft_model.base_model):
        part.merge_and_unload = functools.partial(_unload, peft_model, merge=True)
        part.unload = functools.partial(_unload, peft_model, merge=False)
    for name in ("enable_adapter_layers", "set_adapter"):
        setattr(peft_model.base_model, name, functools.partial(_set_up, base, getattr(peft_model.base_model, name)))
    base.ted_adapter = adapter
    return model


def _check(model: Any, base: nn.Module) -> tuple[str, Wrappers]:
    """The adapter's name, and its layers by name.

    Raises:
        ValueError: the adapter is not supported.
    """
    from peft import PeftType
    from peft.tuners import lora

    if not isinstance(base, ZCodeM3PreTrainedModel):
        raise ValueError(
            f"{type(base).__name__} is sharded and has adapters, which only a sharded ZCodeM3 supports{_WHAT_TO_DO}"
        )
    if len(model.peft_config) > 1:
        raise ValueError(
            f"a sharded model can have one adapter, but this one has {[*model.peft_config]}; load one of them"
        )
    configs: dict[str, Any] = model.peft_config
    adapter, config = next(iter(configs.items()))
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"peft_type ({config.peft_type}) must be LORA for a sharded model{_WHAT_TO_DO}")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights ({config.init_lora_weights!r}) must be True, False or 'gaussian' for a sharded model, "
            "because other values compute with whole weights; make the adapter in one process, save it, set "
            "init_lora_weights to true in its adapter_config.json, and load it with PeftModel.from_pretrained(model, "
            "folder, is_trainable=True)"
        )
    wrappers = _layers_of_peft(base)
    for name, wrapper in wrappers.items():
        is_dense = type(wrapper) is lora.Linear and can_split_low_rank(wrapper.get_base_layer())
        is_of_experts = type(wrapper) is lora.ParamWrapper and wrapper.parameter_name in _EXPERT_WEIGHTS
        if not (is_dense or is_of_experts):
            target = getattr(wrapper, "parameter_name", type(wrapper.get_base_layer()).__name__)
            raise ValueError(
                f"{name} ({target}) is adapted, but a sharded model supports only adapters of linear layers in "
                "attention and feed-forwards (target_modules) and of up_proj and down_proj of experts "
                f"(target_parameters): leave it out of the LoraConfig{_WHAT_TO_DO}"
            )
        if wrapper.lora_variant or any(wrapper.lora_bias.values()):
            raise ValueError(
                f"{name} has a variant of LoRA or a bias; a sharded model supports only plain LoRA{_WHAT_TO_DO}"
            )
        if wrapper.merged:
            raise ValueError(f"{name} is merged; merge after training, with merge_and_unload")
    return adapter, wrappers


def _layers_of_peft(base: nn.Module) -> Wrappers:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}


def _check_what_is_trained(model: nn.Module, wrappers: Wrappers, adapter: str) -> None:
    """
    Raises:
        ValueError: parameters besides the factors are trained.
    """
    factors = {id(f.weight) for w in wrappers.values() for f in (w.lora_A[adapter], w.lora_B[adapter])}
    trained = {name: id(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = [name for name, key in trained.items() if key not in factors]
    if others:
        raise ValueError(
            f"{others[0]} and {len(others) - 1} more parameters besides the factors of LoRA are to be trained "
            "(modules_to_save, bias, trainable_token_indices): leave them out of the LoraConfig, because a sharded "
            f"model trains only factors{_WHAT_TO_DO}"
        )


def _split(wrappers: Wrappers, adapter: str, layout: Layout, meshes: Any) -> None:
    """Tensor and expert parallelism of the factors, which are whole on all ranks."""
    for wrapper in wrappers.values():
        if _is_of_spread_experts(wrapper):
            _spread(wrapper, adapter, meshes.get_mesh("ep"))
        elif layout.tensor_parallel_size > 1 and isinstance(wrapper.get_base_layer(), nn.Linear):
            factors = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
            split_low_rank(*factors, of=wrapper.get_base_layer(), mesh=meshes.get_mesh("tp"))


def _is_of_spread_experts(wrapper: Any) -> bool:
    return bool(getattr(wrapper.get_base_layer(), "is_spread_over_ranks", False))


def _spread(wrapper: Any, adapter: str, mesh: DeviceMesh) -> None:
    """Spread factors of stacked experts, [experts * R, I] and [O, R * experts]: each rank gets those of its experts."""
    experts: Any = wrapper.get_base_layer()
    axes = expert_mesh(mesh, layout_of_experts(experts).expert_tensor_parallel_size)
    is_split, rank = int(axes.size(1)) > 1, wrapper.r[adapter]
    by_inputs = wrapper.parameter_name == "down_proj"  # how the ranks of one expert split it
    whole: Placement = Replicate()
    placements = {
        wrapper.lora_A[adapter]: [Shard(0), Shard(1) if is_split and by_inputs else whole],
        wrapper.lora_B[adapter]: [_every_expert(rank), Shard(0) if is_split and not by_inputs else whole],
    }
    for factor, places in placements.items():
        sharded = distribute_tensor(factor.weight.detach(), axes, places, src_data_rank=None)
        factor.weight = nn.Parameter(sharded, requires_grad=factor.weight.requires_grad)
    experts.ted_exchange.adapters[wrapper.parameter_name] = functools.partial(
        _adapted, wrapper, axes["etp"].get_group() if is_split else None
    )

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return wrapper.base_layer(x, *args, **kwargs)

    wrapper.forward = forward


def _every_expert(rank: int) -> Placement:
    """Dim 1 of [O, R * experts], where experts follow each other in each of R groups."""
    return Shard(1) if rank == 1 else StridedShard(1, split_factor=rank)


def _adapted(wrapper: Any, group: Any, weight_EOI: Tensor, gradient_factor: float) -> Tensor:
    """The weight plus the product of its factors.

    Args:
        group: ranks that split the experts. Each computes a part of the gradient of the factor that all hold whole.
            `None` for one rank.
        weight_EOI: the weight of this rank.
        gradient_factor: number with which the factors' gradients are multiplied.
    """
    if wrapper.disable_adapters:
        return weight_EOI
    num_experts = weight_EOI.shape[0]
    for adapter in wrapper.active_adapters:
        first = LocalShard.apply(wrapper.lora_A[adapter].weight, 1.0, gradient_factor)
        second = LocalShard.apply(wrapper.lora_B[adapter].weight, 1.0, gradient_factor)
        if group is not None and wrapper.parameter_name == "down_proj":
            second = copy_to_group(second, group)
        elif group is not None:
            first = copy_to_group(first, group)
        first_ERI = first.view(num_experts, -1, first.shape[-1]).to(weight_EOI.dtype)
        second_EOR = second.view(second.shape[0], -1, num_experts).permute(2, 0, 1).to(weight_EOI.dtype)
        weight_EOI = torch.baddbmm(weight_EOI, second_EOR, first_ERI, alpha=wrapper.scaling[adapter])
    return weight_EOI


def _set_up(base: nn.Module, set_up: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Show PEFT the shards, not gathered parameters, before it marks the factors that are trained."""
    for wrapper in _layers_of_peft(base).values():
        if isinstance(wrapper, FSDPModule):
            wrapper.reshard()
    set_up(*args, **kwargs)


def _freeze(base: nn.Module) -> None:
    """Freeze the shards, too: after a forward, PEFT sees and freezes only the gathered parameters."""
    for module in base.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
            for parameter in fsdp_parameters(module):
                parameter.sharded.requires_grad_(False)
                if parameter.whole is not None:
                    parameter.whole.requires_grad_(False)


def _apply_zero(base: Any, wrappers: Wrappers, layout: Layout, meshes: Any) -> None:
    """Factors of a unit of layers are gathered and reduced together; factors of experts separately."""
    if layout.zero_stage < 3:  # they do not change
        for module in base.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_backward(False, recurse=False)
    factors = {id(p) for w in wrappers.values() for factors in (w.lora_A, w.lora_B) for p in factors.parameters()}
    frozen = {parameter for parameter in base.parameters() if id(parameter) not in factors}
    options = zero_options(layout) | {"ignored_params": frozen}
    outermost = {name: wrapper for name, wrapper in wrappers.items() if not name.endswith(".base_layer")}
    spread = [wrapper for wrapper in outermost.values() if _is_of_spread_experts(wrapper)]
    for wrapper in spread if layout.wraps_experts_in_fsdp else []:
        shard_experts(wrapper, layout, expert_zero_mesh(meshes, layout), options)
    dense = [wrapper for wrapper in outermost.values() if wrapper not in spread]
    units = [
        [wrapper for layer in unit for wrapper in layer.modules() if wrapper in dense]
        for unit in units_of_layers(base, layout)
    ]
    in_units = [wrapper for unit in units for wrapper in unit]
    units += [[wrapper] for wrapper in dense if wrapper not in in_units]
    for unit in units:
        if unit:
            fully_shard(unit, mesh=zero_mesh(meshes, layout), **options)
    forget_root(base)


def _unload(model: Any, *, merge: bool, safe_merge: bool = False, **kwargs: Any) -> nn.Module:
    """Like PEFT's `unload` and `merge_and_unload`; each rank changes its shards. All ranks call it.

    Returns:
        The sharded model without adapters, which you can save or evaluate. Its parameters stay frozen, as in PEFT.

    Raises:
        ValueError: on all ranks: `adapter_names` names another adapter, or with `safe_merge` a weight would not be
            finite. Nothing is changed.
    """
    base: Any = unwrap_peft_model(model)
    adapter, wrappers = base.ted_adapter, _layers_of_peft(base)
    if kwargs.get("adapter_names") not in (None, [adapter]):
        raise ValueError(f"adapter_names ({kwargs['adapter_names']}) must be [{adapter!r}], the only adapter")
    show_shards(base)
    if merge:
        merge_into_shards(wrappers, adapter, checks=safe_merge)
    for wrapper in wrappers.values():
        if _is_of_spread_experts(wrapper):
            experts: Any = wrapper.get_base_layer()
            experts.ted_exchange.adapters.clear()
    for module in base.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_backward(True, recurse=False)
    type(model.base_model).unload(model.base_model)
    del base.ted_adapter
    forget_root(base)
    return base


def check_optimizers(models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
    """
    Raises:
        ValueError: an optimizer has parameters of adapters that are not sharded yet; stepping them would have no
            effect.
    """
    for model in models:
        if not is_adapted(model) or _has_sharded_adapter(unwrap_peft_model(model)):
            continue
        own = {id(parameter) for parameter in model.parameters()}
        for optimizer in optimizers:
            if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                raise ValueError(
                    "the optimizer was made before the adapters were sharded, so it would step parameters that are "
                    "no longer in the model: call hf_moe_ted.shard_adapters(model) after get_peft_model, then make "
                    "the optimizer"
                )


__all__ = ["check_optimizers", "expect_adapters", "is_adapted", "shard_adapters"]
