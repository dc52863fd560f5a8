"""ZCodeM3 models -> DeepSpeed-MoE checkpoints."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...files.output import check_output_dir, new_folder
from ...files.output_kinds import DEEPSPEED_EXPORT
from ...files.writing import keeping_places
from ...models.configuration_zcode_m3 import ZCodeM3Config
from ...tensors.config_file import read_zcode_m3_config
from ...tensors.lazy_tensors import LazyTensors, check_rounded, checked_weights
from ...tensors.model_folder import drop_tied_copies, meta_model, parse_dtype, stored_specs
from ...tensors.safetensors_io import check_tensors, open_pretrained_tensors
from ..conversion_rules import RuleSet
from ..patterns import Pattern

TAG = "global_step0"

_EXPERT = re.compile(r"(.*)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\..*")


@keeping_places()
def export_deepspeed_checkpoint(
    model_or_folder: PreTrainedModel | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    rules: str | os.PathLike[str] | RuleSet,
    expert_parallel_size: int = 1,
    tensor_parallel_size: int = 1,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint that DeepSpeed loads into the user's own model.

    `engine.load_checkpoint(output_dir, load_module_only=True)` reads it with any expert-parallel size that divides the
    experts, because each expert has a file. It has no optimizer state.

    Args:
        model_or_folder: a ZCodeM3 model, or a folder that `from_pretrained` loads.
        output_dir: the new folder; it appears once it is complete.
        rules: the names in the user's model: `"m2m100"`, `"fairseq"`, `"zcode_m3"`, `"megatron"`, a YAML file, or a
            `RuleSet`. If a rule has choices, the first is written; `RuleSet.load("m2m100").with_names(moe="ffn")` makes
            `ffn` the attribute name of the MoE layers.
        expert_parallel_size: the expert-parallel size that is written into the checkpoint; it must divide the experts
            of every layer.
        tensor_parallel_size: number of shards of the tensors that `rules` split, experts included (DeepSpeed's expert
            tensor parallelism).
        dtype: dtype of the weights; by default it does not change.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        `output_dir`.

    Raises:
        ValueError: a tensor fits no rule, sizes do not divide, or `output_dir` is not empty. Nothing is written then.
    """
    output_dir = Path(output_dir)
    dtype = parse_dtype(dtype)
    check_output_dir(output_dir, overwrite=overwrite, kind=DEEPSPEED_EXPORT, sources=[model_or_folder])
    rule_set = RuleSet.load(rules)
    config, ours = _with_tied_copies(model_or_folder)
    num_experts = [spec.shape[0] for name, spec in ours.specs.items() if name.endswith(".ffn.experts.up_proj")]
    _check_sizes(num_experts, expert_parallel_size, tensor_parallel_size)
    if config.expert_map is not None:
        raise ValueError(
            "the model has an expert_map (its experts were merged, or pruned with renormalize=False), but "
            "DeepSpeed's gates have one row per expert; export the model from which it was made"
        )
    theirs = rule_set.inverse().apply(ours, num_heads=config.encoder_attention_heads)
    shard_dims = {name: _shard_dim(name, theirs.specs[name], rule_set, tensor_parallel_size) for name in theirs}
    main = _without_weights(num_experts, expert_parallel_size, tensor_parallel_size)
    with new_folder(output_dir, overwrite=overwrite, kind=DEEPSPEED_EXPORT) as folder:
        _write_files(folder, theirs, shard_dims, tensor_parallel_size, dtype, main)
        (folder / "latest").write_text(TAG)
    return output_dir


def _with_tied_copies(model_or_folder: PreTrainedModel | str | os.PathLike[str]) -> tuple[ZCodeM3Config, LazyTensors]:
    """Config and tensors. Tied tensors have all of their names, because a DeepSpeed model loads all of them."""
    if isinstance(model_or_folder, PreTrainedModel):
        config, source = model_or_folder.config, "the model"
        tensors = _in_memory(model_or_folder)
    else:
        folder = Path(model_or_folder)
        config = read_zcode_m3_config(folder, "model_or_folder")
        if getattr(config, "quantization_config", None):
            raise ValueError(f"{folder} has a quantization_config; export the model before you quantize it")
        tensors, source = open_pretrained_tensors(folder), str(folder)
    if not isinstance(config, ZCodeM3Config):
        raise ValueError(f"model_or_folder ({type(config).__name__}) must be a ZCodeM3 model")
    model = meta_model(config)
    tied: Mapping[str, str] = model.all_tied_weights_keys
    tensors = drop_tied_copies(tensors, tied)
    check_tensors(tensors.specs, stored_specs(model), source)
    originals = {name: tied.get(name, name) for name in model.state_dict()}
    return config, tensors.under_names(originals)


def _in_memory(model: PreTrainedModel) -> LazyTensors:
    state = model.state_dict()

    def read_into(name: str, out: Tensor) -> None:
        out.copy_(state[name])

    tensors = LazyTensors(
        {name: tensor.to("meta") for name, tensor in state.items()},
        read_row=lambda name, index: state[name][index].cpu().clone(),
        read_into=read_into,
        where=lambda _: f"the model in memory ({type(model).__name__})",
    )
    return checked_weights(tensors)


def _check_sizes(num_experts: Sequence[int], expert_parallel_size: int, tensor_parallel_size: int) -> None:
    for name, size in (("tensor_parallel_size", tensor_parallel_size), ("expert_parallel_size", expert_parallel_size)):
        if size < 1:
            raise ValueError(f"{name} ({size}) must be at least 1")
    if odd := [number for number in num_experts if number % expert_parallel_size]:
        raise ValueError(f"num_experts ({odd[0]}) must be divisible by expert_parallel_size ({expert_parallel_size})")


def _shard_dim(name: str, spec: Tensor, rules: RuleSet, size: int) -> int | None:
    """The dimension in which tensor-parallel ranks share a tensor; `None` if each rank has all of it."""
    if size == 1:
        return None
    dim = next((dim for text, dim in rules.tensor_parallel if Pattern(text, rules.name).search(name)), None)
    if dim is not None and spec.shape[dim] % size:
        raise ValueError(
            f"{name}: dimension {dim} of shape {tuple(spec.shape)} must be divisible by tensor_parallel_size ({size})"
        )
    return dim


def _files(tensors: LazyTensors) -> dict[tuple[int, int] | None, list[str]]:
    """Names of the tensors of each file: (ordinal of the MoE layer, expert), `None` for tensors outside of experts."""
    ordinals: dict[str, int] = {}
    files: dict[tuple[int, int] | None, list[str]] = {None: []}
    for name in tensors:
        if found := _EXPERT.fullmatch(name):
            layer = ordinals.setdefault(found[1], len(ordinals))
            files.setdefault((layer, int(found[2])), []).append(name)
        else:
            files[None].append(name)
    return files


def _without_weights(num_experts: list[int], expert_parallel_size: int, tensor_parallel_size: int) -> dict[str, Any]:
    """The content of a main file besides weights."""
    return {
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": 0,
        "global_samples": 0,
        "skipped_steps": 0,
        "dp_world_size": expert_parallel_size,
        "mp_world_size": tensor_parallel_size,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": tensor_parallel_size},
        "num_experts": num_experts,
        "ds_config": {},
        "buffer_names": [],
        "param_shapes": None,
        "shared_params": None,
    }


def _write_files(
    folder: Path,
    tensors: LazyTensors,
    shard_dims: Mapping[str, int | None],
    tensor_parallel_size: int,
    dtype: torch.dtype | None,
    main: Mapping[str, Any],
) -> None:
    (folder / TAG).mkdir()
    for file, names in tqdm(_files(tensors).items(), desc="Writing DeepSpeed files", unit="file"):
        whole = {name: tensors[name] for name in names}
        for rank in range(tensor_parallel_size):
            shards = {}
            for name, tensor in whole.items():
                dim = shard_dims[name]
                shard = tensor if dim is None else tensor.chunk(tensor_parallel_size, dim)[rank].clone()
                shards[name] = shard if dtype is None else shard.to(dtype)
                check_rounded(name, shard, shards[name])
            prefix = "" if file is None else f"layer_{file[0]}_expert_{file[1]}_"
            content = {**main, "module": shards} if file is None else shards
            # write to a Python file: its errors say what is wrong; torch's own errors say "file write failed"
            with (folder / TAG / f"{prefix}mp_rank_{rank:02d}_model_states.pt").open("wb") as file_object:
                torch.save(content, file_object)


__all__ = ["export_deepspeed_checkpoint"]
