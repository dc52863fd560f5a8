"""NLLB-MoE checkpoints (https://huggingface.co/papers/2207.04672) -> ZCodeM3 checkpoints."""

import os
from pathlib import Path

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..files.writing import keeping_places
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.nllb_moe import MODEL_TYPE, config_fields, weight_conversions
from ..tensors.config_file import config_errors, read_config_fields
from ..tensors.conversion_report import ConversionReport
from ..tensors.lazy_tensors import LazyTensors
from ..tensors.model_folder import copy_tokenizer_and_generation_config, model_folder_writer
from ..tensors.safetensors_io import open_pretrained_tensors


@keeping_places()
def convert_nllb_moe_checkpoint(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> ConversionReport:
    """Convert a Hugging Face NLLB-MoE folder to one that `ZCodeM3ForConditionalGeneration.from_pretrained` loads.

    Experts may be stored one by one (`experts.expert_0.fc1.weight`) or stacked (`experts.up_proj`). At most one output
    shard and the largest tensor are in memory. Tokenizer files and the generation config come along as they are.

    Args:
        source: a folder with `config.json` and safetensors or bin weights, sharded or not.
        output_dir: the new folder; it appears when everything is in it.
        dtype: of the floating-point weights, `torch.bfloat16` or `"bfloat16"`; as in the source by default.
        max_shard_size: bytes or a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        What was converted.

    Raises:
        ValueError: `source` is no NLLB-MoE checkpoint, or a weight of it is missing, unknown or of a wrong shape (all
            of them are named, before anything is written); `output_dir` is not empty; `dtype` is unknown.
    """
    source = Path(source)
    write = model_folder_writer(
        output_dir, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, sources=[source]
    )
    config = _read_config(source)
    tensors = _renamed(open_pretrained_tensors(source))
    return write(tensors, config, source=source, save_others=[copy_tokenizer_and_generation_config(source)])


def _read_config(source: Path) -> ZCodeM3Config:
    otherwise = f", an NLLB-MoE checkpoint has {MODEL_TYPE!r}"
    path, fields = read_config_fields(source, "source", (MODEL_TYPE,), otherwise)
    with config_errors(path):
        return ZCodeM3Config.from_dict(config_fields(fields))


def _renamed(tensors: LazyTensors) -> LazyTensors:
    """The tensors under our names, experts stacked."""
    sources, stacked = _sources_by_target(tensors)

    def read_into(target: str, out: Tensor) -> None:
        if target not in stacked:
            tensors.into(sources[target][0], out)
            return
        for expert, name in enumerate(sources[target]):
            tensors.into(name, out[expert])

    specs = {target: tensors.specs[names[0]] for target, names in sources.items()}
    specs |= {target: specs[target].new_empty(len(sources[target]), *specs[target].shape) for target in stacked}
    return LazyTensors(specs, read_into=read_into)


def _sources_by_target(tensors: LazyTensors) -> tuple[dict[str, list[str]], set[str]]:
    """The names of what becomes one of our tensors, and which of ours are stacked experts."""
    renamings = [rule for rule in weight_conversions() if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in weight_conversions() if isinstance(rule, WeightConverter)]
    sources: dict[str, list[str]] = {}
    stacked = set()
    for source in tensors:
        if source.endswith("embed_positions.weights"):  # sinusoids, stored by old versions of transformers
            continue
        target, pattern = rename_source_key(source, renamings, converters)
        sources.setdefault(target, []).append(source)
        if pattern is not None:
            stacked.add(target)
    for target, names in sources.items():
        names.sort(key=dot_natural_key)
        _check_sources(target, names, tensors.specs, is_list=target in stacked)
    return sources, stacked


def _check_sources(target: str, names: list[str], specs: dict[str, Tensor], *, is_list: bool) -> None:
    """Raise a `ValueError` unless `names` are one tensor, or equal tensors of experts 0, 1, 2, ..."""
    if not is_list:
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} both are {target}; remove one from the checkpoint")
        return
    for expert, name in enumerate(names):
        if f".expert_{expert}." not in name:
            raise ValueError(f"expert {expert} of {target} is missing: the checkpoint has {', '.join(names)}")
        if (specs[name].shape, specs[name].dtype) != (specs[names[0]].shape, specs[names[0]].dtype):
            raise ValueError(
                f"{name} is {specs[name].dtype} of shape {tuple(specs[name].shape)}, "
                f"{names[0]} is {specs[names[0]].dtype} of shape {tuple(specs[names[0]].shape)}"
            )


__all__ = ["convert_nllb_moe_checkpoint"]
