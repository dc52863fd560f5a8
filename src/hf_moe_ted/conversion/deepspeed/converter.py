"""DeepSpeed-MoE checkpoints -> ZCodeM3 checkpoints."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ...files.json_file import parse_json_object
from ...files.writing import keeping_places
from ...models.configuration_zcode_m3 import ZCodeM3Config, changed_fields
from ...models.layer_names import FFN_PATTERN
from ...tensors.config_file import checked_overrides, config_errors, read_config_fields
from ...tensors.conversion_report import ConversionReport
from ...tensors.lazy_tensors import LazyTensors, checked_weights
from ...tensors.model_folder import TOKENIZER_FILES, copy_tokenizer_and_generation_config, model_folder_writer
from ..conversion_rules import RuleSet
from ..m2m100 import MODEL_TYPE as M2M100
from ..m2m100 import m2m100_config_fields
from .reader import read_deepspeed_state_dict

_ROUTER = re.compile(rf"model\.{FFN_PATTERN}\.router\.weight")
# the fields of the config that match DeepSpeed's gate for k = 1, 2, and 3 or more (sharded_moe.py)
_GATES: tuple[dict[str, Any], ...] = (
    {"normalize_router_weights": None, "token_drop_policy": "random"},
    {"normalize_router_weights": "after_dropping", "token_drop_policy": "position"},
    {"normalize_router_weights": "after_dropping", "token_drop_policy": "probability"},
)


@keeping_places()
def convert_deepspeed_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    base_config: PreTrainedConfig | Mapping[str, Any] | str | os.PathLike[str],
    config_overrides: Mapping[str, Any] | str | None = None,
    rules: str | os.PathLike[str] | RuleSet = "m2m100",
    weights: str = "model",
    dtype: torch.dtype | str | None = None,
    tag: str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    tensor_parallel_rules: Sequence[tuple[str, int | None]] = (),
    ignore_expert_output_bias: bool = False,
    overwrite: bool = False,
) -> ConversionReport:
    """Convert a DeepSpeed-MoE checkpoint to a folder that `ZCodeM3ForConditionalGeneration.from_pretrained` loads.

    The checkpoint says which layers are sparse, how many experts each has and whether there are residual branches. It
    does not hold the number of experts per token, capacities and noise: set them in `config_overrides`. The model
    follows DeepSpeed's gate: with 1 expert per token the router's weight is used as it is; with 2 or more, weights are
    normalized after dropping. Neither DeepSpeed nor any code in the checkpoint is run.

    Args:
        checkpoint_dir: what `engine.save_checkpoint` wrote, with the file `latest`.
        output_dir: the new folder; it appears once it is complete.
        base_config: config of the dense model (`M2M100Config`) or a `ZCodeM3Config`: an object, a dict, or a folder
            with `config.json`.
        config_overrides: fields of `ZCodeM3Config`, such as `{"num_experts_per_tok": 2, "capacity_factor": 1.25}`, or
            the same as JSON.
        rules: how the names of the checkpoint map to ours: `"m2m100"`, `"fairseq"`, `"zcode_m3"`, `"megatron"`, or a
            YAML file (docs/deepspeed.md).
        weights: `"model"` for the weights that the model used, `"master"` for the optimizer's float32 copies.
        dtype: dtype of the result; by default as in the checkpoint.
        tag: name of the checkpoint in the folder; by default the last one.
        tokenizer: a tokenizer, or its folder, that is saved with the model.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        tensor_parallel_rules: pairs of a regular expression on the checkpoint's names and the dimension of the shards,
            or `None` if replicated. They are tried before those of `rules`.
        ignore_expert_output_bias: Megatron-DeepSpeed until early 2023 stored the output biases of its experts and never
            added them; with this they become zero.
        overwrite: whether to replace an `output_dir` that is not empty.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, a tensor fits no rule, shapes disagree with the config, a
            field of the config is wrong, or `output_dir` is not empty. Nothing is written then.
    """
    write = model_folder_writer(
        output_dir,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        sources=[checkpoint_dir],
        also_read=[base_config, tokenizer],
    )
    rule_set = RuleSet.load(rules)
    if isinstance(config_overrides, str):
        config_overrides = parse_json_object(config_overrides, "config_overrides")
    overrides = checked_overrides(config_overrides)
    fields = _base_fields(base_config)
    state = read_deepspeed_state_dict(
        checkpoint_dir,
        tag=tag,
        weights=weights,
        tensor_parallel_rules=(*tensor_parallel_rules, *rule_set.tensor_parallel),
    )
    tensors = rule_set.apply(checked_weights(state), num_heads=fields.get("encoder_attention_heads"))
    if ignore_expert_output_bias:
        tensors = _without_expert_output_bias(tensors)
    origin = base_config if isinstance(base_config, (str, os.PathLike)) else type(base_config).__name__
    with config_errors(f"base_config ({origin}) and config_overrides do not fit the checkpoint"):
        config, warnings = _config(fields, overrides, tensors)
    others = _others(base_config, tokenizer)
    return write(tensors, config, source=Path(checkpoint_dir), save_others=others, warnings=warnings)


def _base_fields(base_config: PreTrainedConfig | Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """Fields of `ZCodeM3Config` from the user's `base_config`. Raises a `ValueError` if it is no such config."""
    forms = "a config, a dict or a folder with config.json; `hf download` makes one of a Hub id"
    ours = ZCodeM3Config.model_type
    otherwise = f"; it must be {M2M100!r} or {ours!r}"
    origin, fields = read_config_fields(base_config, "base_config", (M2M100, ours, None), otherwise, forms=forms)
    if fields.get("model_type") != M2M100:
        return fields
    with config_errors(origin):
        return m2m100_config_fields(fields)


def _config(fields: dict[str, Any], overrides: dict[str, Any], tensors: LazyTensors) -> tuple[ZCodeM3Config, list[str]]:
    """The config of the converted model, and warnings about it."""
    unknown = sorted(set(overrides) - set(ZCodeM3Config().to_dict()))
    if unknown:
        raise ValueError(f"config_overrides has {', '.join(unknown)}, which ZCodeM3Config does not have")
    warnings = []
    if "num_experts_per_tok" not in overrides:
        warnings.append(
            "num_experts_per_tok is not in the checkpoint and was taken to be 1; if the model was trained with another "
            'k, pass config_overrides={"num_experts_per_tok": k}'
        )
    top_k = overrides.get("num_experts_per_tok", 1)
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise ValueError(f"config_overrides: num_experts_per_tok ({top_k!r}) must be a number of experts")
    gate = _GATES[min(max(top_k, 1), len(_GATES)) - 1]
    found = {**fields, **_sparse_fields(tensors), "num_experts_per_tok": top_k, **gate}
    return ZCodeM3Config(**changed_fields(found, overrides)), warnings


def _sparse_fields(tensors: LazyTensors) -> dict[str, Any]:
    """The fields about sparse layers that follow from the tensors."""
    layers: dict[str, dict[int, int]] = {"encoder": {}, "decoder": {}}
    for name, spec in tensors.specs.items():
        if found := _ROUTER.fullmatch(name):
            layers[found[1]][int(found[2])] = spec.shape[0]
    num_experts = [experts for stack in layers.values() for _, experts in sorted(stack.items())]
    fields: dict[str, Any] = {f"{stack}_sparse_layers": sorted(found) for stack, found in layers.items()}
    fields["num_experts"] = num_experts[0] if len(set(num_experts)) == 1 else num_experts
    fields["use_residual"] = any(".ffn.residual." in name for name in tensors)
    fields["router_bias"] = any(name.endswith(".ffn.router.bias") for name in tensors)
    return fields


def _without_expert_output_bias(tensors: LazyTensors) -> LazyTensors:
    def is_ignored(name: str) -> bool:
        return name.endswith((".experts.down_proj_bias", ".residual.mlp.fc2.bias"))

    def read(name: str) -> Tensor:
        spec = tensors.specs[name]
        return torch.zeros(spec.shape, dtype=spec.dtype) if is_ignored(name) else tensors[name]

    return LazyTensors(tensors.specs, read)


def _others(base_config: Any, tokenizer: Any) -> list[Callable[[Path], Any]]:
    """Functions that save tokenizer and generation config into the new folder."""
    others: list[Callable[[Path], Any]] = []
    if isinstance(base_config, (str, os.PathLike)) and Path(base_config).is_dir():
        others.append(copy_tokenizer_and_generation_config(Path(base_config)))
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        others.append(tokenizer.save_pretrained)
    elif tokenizer is not None:
        message = f"tokenizer ({tokenizer}) must be a tokenizer or a folder with one"
        if not Path(tokenizer).is_dir():
            raise ValueError(message)
        if not any(Path(tokenizer, name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(f"{message}: it has no {' and no '.join(TOKENIZER_FILES[:2])}")
        others.append(copy_tokenizer_and_generation_config(Path(tokenizer)))
    return others


__all__ = ["convert_deepspeed_checkpoint"]
