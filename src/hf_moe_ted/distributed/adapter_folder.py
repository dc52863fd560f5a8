"""Save and load sharded adapters as PEFT's folders, and merge adapters into the shards of their weights.

All ranks call these functions. Rank 0 writes. Factors are small, so it can hold all of them.

Shape letters: E experts, R rank of the factors, I inputs and O outputs of a weight.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..files.output_kinds import ADAPTER
from .checkpoint import atomic_folder, named_tensors, rank, together, whole_tensors
from .sharding import local_tensor, regions, sources

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_OURS = re.compile(rf"{re.escape(_WEIGHTS)}|{re.escape(_CONFIG)}")
_FACTOR = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")


def save_adapter(
    model: Any,
    save_directory: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Write the adapter of a sharded model as PEFT's ordinary folder, with whole tensors; all ranks call it.

    It replaces `PeftModel.save_pretrained`. The folder loads with `PeftModel.from_pretrained`, into a model of any
    layout or on one process. A new folder appears once it is complete. In an existing folder, other files stay.

    Args:
        model: a model with a sharded adapter.
        save_directory: a folder on a disk of rank 0.
        state_dict: what [`whole_state_dict`] returned; it is written instead of the model's tensors.
        kwargs: arguments of `PeftModel.save_pretrained`, which rank 0 calls.

    Raises:
        ValueError: on all ranks: an argument is not available for a sharded model, or `save_directory` is no folder.
    """
    with together():
        if not kwargs.pop("safe_serialization", True):
            raise ValueError(
                "safe_serialization (False) cannot be given for a sharded model, which is saved as safetensors; "
                "leave it out"
            )
        if kwargs.pop("path_initial_model_for_weight_conversion", None) is not None:
            raise ValueError(
                "path_initial_model_for_weight_conversion cannot be given for a sharded model; save the adapter, load "
                "it in one process and convert it there"
            )
        if kwargs.pop("push_to_hub", False):
            raise ValueError("push_to_hub (True) cannot be given for a sharded model; upload the folder from rank 0")
    for name in (
        "is_main_process",
        "save_embedding_layers",
    ):  # rank 0 is the main process; words cannot be added to sharded embeddings
        kwargs.pop(name, None)
    whole = dict(whole_tensors(_factors(model)) if state_dict is None else state_dict)
    with atomic_folder(save_directory, kind=ADAPTER, stale=_OURS) as temporary:
        if rank() == 0:
            type(model).save_pretrained(model, str(temporary), state_dict=whole, save_embedding_layers=False, **kwargs)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Fill the factors of a sharded model from a folder of `PeftModel.save_pretrained`; each rank reads its part.

    Raises:
        ValueError: on all ranks: there is no adapter, it cannot be read, or its factors differ from the model's.
    """
    path = Path(folder, _WEIGHTS)
    with together(), torch.no_grad():
        tensors = {_FACTOR.sub(r".\1.weight", name): tensor for name, tensor in _factors(model).items()}
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
                wanted = {name: tensor.shape for name, tensor in tensors.items()}
                if shapes != wanted:
                    different = sorted(n for n in {*shapes, *wanted} if shapes.get(n) != wanted.get(n))
                    raise ValueError(
                        f"{path} has other factors than the adapter of the model: {different[0]} and "
                        f"{len(different) - 1} more; make the adapter with the {_CONFIG} of that folder"
                    )
                for name, tensor in tensors.items():
                    for region in regions(tensor):
                        region.local.copy_(file.get_slice(name)[region.slices])
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as an adapter: {error}") from error


def has_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has the files that [`load_adapter`] reads."""
    return Path(folder, _WEIGHTS).is_file()


@torch.no_grad()
def merge_into_shards(wrappers: Mapping[str, Any], adapter: str, *, checks: bool = False) -> None:
    """Add the product of each pair of factors to its weight; each rank changes its own regions.

    Args:
        wrappers: layers of PEFT by name; their weights and factors are shards.
        adapter: the name of the adapter.
        checks: whether all new weights must be finite.

    Raises:
        ValueError: on all ranks: a weight would not be finite; nothing is changed.
    """
    for is_check in [True, False] if checks else [False]:
        for name, wrapper in wrappers.items():
            weight = getattr(wrapper.get_base_layer(), getattr(wrapper, "parameter_name", "weight"))
            first, second = (_whole_everywhere(part[adapter].weight) for part in (wrapper.lora_A, wrapper.lora_B))
            is_finite = True
            for region in regions(weight):
                delta = _product(first, second, weight.shape, region.slices) * wrapper.scaling[adapter]
                delta = delta.to(weight.dtype)
                if is_check:
                    is_finite &= bool((region.local + delta).isfinite().all())
                else:
                    region.local.add_(delta)
            if is_check:
                with together():
                    if not is_finite:
                        raise ValueError(
                            f"{name} would not be finite with its adapter; do not merge it, or merge with "
                            "safe_merge=False"
                        )


def _product(first: Tensor, second: Tensor, shape: torch.Size, slices: tuple[slice, ...]) -> Tensor:
    """A part of the product of [R, I] and [O, R]; for experts, of [experts * R, I] and [O, R * experts].

    Args:
        shape: [O, I] or [experts, O, I].
        slices: the part of that shape.
    """
    outputs, inputs = slices[-2:]
    if len(shape) == 2:
        return second[outputs] @ first[:, inputs]
    first_ERI = first.view(shape[0], -1, shape[2])[slices[0], :, inputs]
    second_EOR = second.view(shape[1], -1, shape[0])[outputs, :, slices[0]].permute(2, 0, 1)
    return second_EOR @ first_ERI


def _factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in named_tensors(model).items() if _FACTOR.search(name)}


def _whole_everywhere(tensor: Tensor) -> Tensor:
    """The whole tensor, on all ranks."""
    if not isinstance(tensor, DTensor):
        return local_tensor(tensor)
    whole = torch.zeros(tensor.shape, dtype=torch.float32, device=local_tensor(tensor).device)
    for region in regions(tensor):
        whole[region.slices] = region.local.float()
    dist.all_reduce(whole)
    num_copies = dist.get_world_size() // len(sources(tensor, rank=int(tensor.device_mesh.mesh.flatten()[0])))
    return (whole / num_copies).to(tensor.dtype)


__all__ = ["has_adapter", "load_adapter", "merge_into_shards", "save_adapter"]
