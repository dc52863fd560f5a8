"""Several models with experts become one: it has the experts of all, behind one router per layer."""

import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.output import check_output_dir, new_folder
from ..files.writing import keeping_places
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.layer_names import SIDES, moe_layers
from ..tensors.byte_sizes import num_bytes_of
from ..tensors.lazy_tensors import LazyTensors, num_bytes, num_parameters
from ..tensors.model_folder import TOKENIZER_FILES, meta_model, stored_specs
from .model_source import ModelSource
from .report.compression_report import AggregationReport
from .report.model_card import derived_card
from .report.report_folder import describe
from .report.summary import Summary

# fields that say how a model was trained; the new model takes those of the first checkpoint
_OF_TRAINING = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "init_std",
    "router_noise_policy",
    "router_jitter_noise",
    "capacity_factor",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "label_smoothing",
    "output_router_logits",
    "use_cache",
)
# compared by the layers that they choose
_SPARSE = tuple(f"{side}_sparse_{kind}" for side in SIDES for kind in ("step", "layers"))
# of tokenizer_config.json: the languages that it was last used with, and how it was loaded
_OF_USE = ("src_lang", "tgt_lang", "is_local", "local_files_only", "name_or_path")


@keeping_places()
def aggregate_experts(
    checkpoints: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> AggregationReport:
    """Aggregation of Experts: one model with the experts of several, to continue its training.

    Source: https://huggingface.co/papers/2109.10465. Weights that the models share are averaged. Experts stand side by
    side, those of the first checkpoint first; so do the rows and biases of the routers. The models should come from the
    same initialization or have much training in common; the average of other models does not translate. The new model
    routes every token over the experts of all. It is a start for further training, not a better model at once.

    Weights are read and written one by one, so memory holds no more than the largest tensor of each checkpoint.
    Tokenizer and generation config come from the first checkpoint.

    Args:
        checkpoints: two or more folders with `config.json` and weights of ZCodeM3, of one architecture and with the
            same tokenizer. They may differ in the number of experts and in fields that matter in training only; the new
            model takes these from the first checkpoint.
        output_dir: the new folder, with `compression_report.json` and `report.md`; it appears once it is complete.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        What was aggregated.

    Raises:
        ValueError: before anything is written: fewer than two checkpoints; configs, dtypes or tokenizers differ (the
            message names all differences); no MoE layer; `output_dir` is not empty.
    """
    if isinstance(checkpoints, str | os.PathLike) or len(checkpoints) < 2:
        raise ValueError(f"checkpoints ({checkpoints!r}) must be a list of at least two folders")
    max_shard_size = num_bytes_of(max_shard_size, "max_shard_size")
    check_output_dir(output_dir, overwrite=overwrite, sources=checkpoints)
    folders = [Path(checkpoint) for checkpoint in checkpoints]
    sources = [ModelSource.open(folder) for folder in folders]
    problems = [p for other in sources[1:] for p in _differences(sources[0], other)]
    if problems:
        raise ValueError("the checkpoints cannot be aggregated:\n  " + "\n  ".join(problems))
    if not moe_layers(sources[0].config):
        raise ValueError(f"{folders[0]} has no MoE layer, so it has no experts to aggregate; give models with experts")

    config = _aggregated_config([source.config for source in sources])
    tensors = _aggregated_tensors([source.tensors for source in sources], config)
    report = _report(sources, config, tensors)
    card = derived_card([str(folder) for folder in folders], relation="merge")
    with new_folder(output_dir, overwrite=overwrite) as folder:
        sources[0].write(folder, tensors, config, max_shard_size)
        describe(folder, Summary.of(report), str(card))
    return report


def _differences(first: ModelSource, other: ModelSource) -> list[str]:
    """Differences between the architectures of two checkpoints, one line each."""
    problems = [
        f"{name} is {values[0]!r} in {first.path} and {values[1]!r} in {other.path}"
        for name, values in _different_fields(first.config, other.config).items()
        if name not in _OF_TRAINING
    ]
    if problems:  # shapes follow from the configs
        return problems
    by_dtypes: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for name, spec in first.tensors.specs.items():
        if spec.dtype != (dtype := other.tensors.specs[name].dtype):
            by_dtypes.setdefault((spec.dtype, dtype), []).append(name)
    problems = [
        f"{len(names)} tensors, such as {names[0]}, are {dtype} in {first.path} and {of_other} in {other.path}; load "
        "one of them with from_pretrained(folder, dtype=...) and save it again"
        for (dtype, of_other), names in by_dtypes.items()
    ]
    for name in TOKENIZER_FILES:
        contents = [_tokenizer_file(source.path / name) for source in (first, other)]
        if contents[0] != contents[1]:
            problems.append(f"{name} is not the same in {first.path} and {other.path}; the tokenizers must be equal")
    return problems


def _different_fields(first: ZCodeM3Config, other: ZCodeM3Config) -> dict[str, tuple[Any, Any]]:
    """Fields of ZCodeM3Config that differ, except `num_experts`: name -> values."""
    names = [name for name in inspect.get_annotations(ZCodeM3Config) if name not in ("num_experts", *_SPARSE)]
    pairs = {name: (getattr(first, name), getattr(other, name)) for name in names}
    pairs |= {f"{side}_sparse_layers": (first.sparse_layers(side), other.sparse_layers(side)) for side in SIDES}
    return {name: values for name, values in pairs.items() if values[0] != values[1]}


def _tokenizer_file(path: Path) -> Any:
    """Content of the tokenizer file without how it was last used and loaded; `None` without the file."""
    if not path.is_file():
        return None
    if path.suffix != ".json":
        return path.read_bytes()
    content = json.loads(path.read_text(encoding="utf-8"))
    if path.name != "tokenizer_config.json":
        return content
    return {name: value for name, value in content.items() if name not in _OF_USE}


def _aggregated_config(configs: Sequence[ZCodeM3Config]) -> ZCodeM3Config:
    counts = [sum(count) for count in zip(*(moe_layers(config).values() for config in configs), strict=True)]
    num_experts = counts[0] if len({*counts}) == 1 else counts
    return ZCodeM3Config.from_dict(configs[0].to_dict() | {"num_experts": num_experts})


def _aggregated_tensors(sources: Sequence[LazyTensors], config: ZCodeM3Config) -> LazyTensors:
    """The weights of the new model, each made when it is read."""
    layers = moe_layers(config)
    specs = {name: spec.to(sources[0].specs[name].dtype) for name, spec in stored_specs(meta_model(config)).items()}

    def is_united(name: str) -> bool:
        prefix, _, kind = name.partition(".ffn.")
        return f"{prefix}.ffn" in layers and not kind.startswith("residual.")

    def read_into(name: str, out: Tensor) -> None:
        if is_united(name):
            parts = out.split([source.specs[name].shape[0] for source in sources])
            for source, part in zip(sources, parts, strict=True):
                source.into(name, part)
            return
        total = sources[0][name].double()  # rounded once
        for source in sources[1:]:
            total += source[name]
        out.copy_(total / len(sources))

    return LazyTensors(specs, read_into=read_into)


def _report(sources: Sequence[ModelSource], config: ZCodeM3Config, tensors: LazyTensors) -> AggregationReport:
    first = sources[0]
    warnings = [
        f"{name} is {values[0]!r} in {first.path} and {values[1]!r} in {other.path}; the new model takes the first"
        for other in sources[1:]
        for name, values in _different_fields(first.config, other.config).items()
    ]
    if config.normalize_router_weights is None:
        warnings.append(
            "normalize_router_weights=None: the experts of all checkpoints share the router's probabilities, so the "
            "weights of a token's experts get smaller; train the model further before use"
        )
    per_checkpoint = [moe_layers(source.config) for source in sources]
    return AggregationReport(
        source=str(first.path),
        arguments={"checkpoints": [str(source.path) for source in sources]},
        num_parameters_before=sum(num_parameters(source.tensors.specs) for source in sources),
        num_parameters_after=num_parameters(tensors.specs),
        num_bytes_before=sum(num_bytes(source.tensors.specs) for source in sources),
        num_bytes_after=num_bytes(tensors.specs),
        warnings=tuple(warnings),
        checkpoints=tuple(str(source.path) for source in sources),
        num_experts={layer: [counts[layer] for counts in per_checkpoint] for layer in moe_layers(config)},
    )


__all__ = ["aggregate_experts"]
