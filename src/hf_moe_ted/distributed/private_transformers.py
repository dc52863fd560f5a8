"""Private names of transformers that TED uses, each with the reason.

`docs/private_names.md` lists all such names of the package, with the versions that were read. Methods of transformers
that subclasses override are listed only there.
"""

from operator import attrgetter
from typing import Any

from transformers import PreTrainedModel

from .layout import Layout

# the meshes with which a model was sharded, and its tensor-parallel size, with or without a TedConfig
mesh_manager, tensor_parallel_size = attrgetter("_mesh_manager"), attrgetter("_tp_size")
# a plan with a model's layers instead of `*`, the form that `apply_tensor_parallelism` needs
expanded_plan = PreTrainedModel._expand_parallel_plan


def mark_sharded(model: Any, meshes: Any, layout: Layout) -> None:
    """Set the attributes that `DistributedMixin.maybe_distribute_model` sets; transformers reads them everywhere."""
    model._mesh_manager = meshes
    model._device_mesh = meshes.get_mesh(("pp", "fsdp", "tp"))
    model._is_distributed_loading_by_transformers = True
    model._tp_size, model._fsdp_size = layout.tensor_parallel_size, layout.data_parallel_size


def mark_fsdp_managed(model: Any) -> None:
    """Make generation continue until all ranks are done."""
    model._is_fsdp_managed_module = True


def names_not_saved(model: PreTrainedModel) -> set[str]:
    """Names of tensors that a class leaves out of its checkpoints."""
    return set(model._keys_to_ignore_on_save or ())


def has_adapters(model: Any) -> bool:
    """Whether `add_adapter` or `load_adapter` put adapters into the model; PEFT's own models have a `peft_config`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def given_conversions(model: Any) -> list[Any]:
    """The `key_mapping` that was given to `from_pretrained`."""
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
