"""What TED uses of transformers under private names, with the reason.

`docs/private_names.md` lists all such names of the package with the versions that were read; methods of transformers
that subclasses override stand there only.
"""

from operator import attrgetter
from typing import Any

from transformers import PreTrainedModel

from .layout import Layout

# the meshes that a model was sharded with, and its tensor-parallel size, whether with a TedConfig or without
mesh_manager, tensor_parallel_size = attrgetter("_mesh_manager"), attrgetter("_tp_size")
# a plan with the layers of a model in place of its `*`, as `apply_tensor_parallelism` wants it
expanded_plan = PreTrainedModel._expand_parallel_plan


def mark_sharded(model: Any, meshes: Any, layout: Layout) -> None:
    """What `DistributedMixin.maybe_distribute_model` sets on a model and transformers asks for everywhere."""
    model._mesh_manager = meshes
    model._device_mesh = meshes.get_mesh(("pp", "fsdp", "tp"))
    model._is_distributed_loading_by_transformers = True
    model._tp_size, model._fsdp_size = layout.tensor_parallel_size, layout.data_parallel_size


def mark_fsdp_managed(model: Any) -> None:
    """Generation then keeps going until all ranks are done."""
    model._is_fsdp_managed_module = True


def names_not_saved(model: PreTrainedModel) -> set[str]:
    """Tensors that a class leaves out of its checkpoints."""
    return set(model._keys_to_ignore_on_save or ())


def has_adapters(model: Any) -> bool:
    """Whether `add_adapter` or `load_adapter` put some into the model; PEFT's own models have a `peft_config`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def given_conversions(model: Any) -> list[Any]:
    """The `key_mapping` that `from_pretrained` got."""
    return getattr(model, "_weight_conversions", None) or []


__all__ = [
    "expanded_plan",
    "given_conversions",
    "has_adapters",
    "mark_fsdp_managed",
    "mark_sharded",
    "mesh_manager",
    "names_not_saved",
    "tensor_parallel_size",
]
