"""Folders of NLLB-MoE (https://huggingface.co/papers/2207.04672) read as ours: config, and tensors by our names."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.nllb_moe import MODEL_TYPE, config_fields, weight_conversions
from .config_file import config_errors, read_config_fields
from .lazy_tensors import LazyTensors


def read_nllb_moe_config(folder: Path, argument: str) -> ZCodeM3Config:
    """The config of an NLLB-MoE folder, converted to ZCodeM3.

    Args:
        folder: the user's argument.
        argument: name of the argument, for messages.

    Raises:
        ValueError: there is no config, it is of another model, or one of its fields is wrong.
    """
    otherwise = f", an NLLB-MoE checkpoint has {MODEL_TYPE!r}"
    path, fields = read_config_fields(folder, argument, (MODEL_TYPE,), otherwise)
    with config_errors(path):
        return ZCodeM3Config.from_dict(config_fields(fields))


def nllb_moe_tensors(tensors: LazyTensors) -> LazyTensors:
    """The tensors of an NLLB-MoE folder under our names, with experts stacked; in the folder they need not be.

    Raises:
        ValueError: an expert is missing, two tensors have one name, or experts differ in shape or dtype.
    """
    sources, stacked = sources_by_target(tensors)

    def read_into(target: str, out: Tensor) -> None:
        if target not in stacked:
            tensors.into(sources[target][0], out)
            return
        for expert, name in enumerate(sources[target]):
            tensors.into(name, out[expert])

    def read_row(target: str, index: int | slice) -> Tensor:
        names = sources[target]
        if target not in stacked:
            return tensors.row(names[0], index)
        return tensors[names[index]] if isinstance(index, int) else torch.stack([tensors[n] for n in names[index]])

    specs = {target: tensors.specs[names[0]] for target, names in sources.items()}
    specs |= {target: specs[target].new_empty(len(sources[target]), *specs[target].shape) for target in stacked}
    where = {target: names[0] for target, names in sources.items()}
    return LazyTensors(specs, read_row=read_row, read_into=read_into, where=lambda target: tensors.where(where[target]))


def sources_by_target(tensors: LazyTensors) -> tuple[dict[str, list[str]], set[str]]:
    """For each of our tensors the names of its sources, and which of our tensors are stacks of experts.

    Raises:
        ValueError: see `nllb_moe_tensors`.
    """
    renamings = [rule for rule in weight_conversions() if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in weight_conversions() if isinstance(rule, WeightConverter)]
    sources: dict[str, list[str]] = {}
    stacked = set()
    for source in tensors:
        if source.endswith("embed_positions.weights"):  # sinusoidal positions, stored by old versions of transformers
            continue
        target, pattern = rename_source_key(source, renamings, converters)
        sources.setdefault(target, []).append(source)
        if pattern is not None:
            stacked.add(target)
    for target, names in sources.items():
        names.sort(key=dot_natural_key)
        _check_sources(target, names, tensors.specs, is_list=target in stacked)
    return sources, stacked


def _check_sources(target: str, names: list[str], specs: Mapping[str, Tensor], *, is_list: bool) -> None:
    """Raise a `ValueError` unless `names` are one tensor, or equal tensors of experts 0, 1, 2, ..."""
    if not is_list:
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} both become {target}; remove one from the checkpoint")
        return
    for expert, name in enumerate(names):
        if f".expert_{expert}." not in name:
            raise ValueError(f"expert {expert} of {target} is missing: the checkpoint has {', '.join(names)}")
        if (specs[name].shape, specs[name].dtype) != (specs[names[0]].shape, specs[names[0]].dtype):
            raise ValueError(
                f"{name} is {specs[name].dtype} of shape {tuple(specs[name].shape)}, "
                f"{names[0]} is {specs[names[0]].dtype} of shape {tuple(specs[names[0]].shape)}"
            )


__all__ = ["nllb_moe_tensors", "read_nllb_moe_config", "sources_by_target"]
