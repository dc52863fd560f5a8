"""Write the checkpoint from which training from scratch starts, without the model in memory."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..files.messages import shorten
from ..files.named_seed import named_seed
from ..files.writing import keeping_places
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..tensors.config_file import read_config_fields, zcode_m3_config
from ..tensors.conversion_report import ConversionReport
from ..tensors.lazy_tensors import LazyTensors
from ..tensors.model_folder import (
    copy_tokenizer_and_generation_config,
    meta_model,
    model_folder_writer,
    parse_dtype,
    read_generation_config,
    stored_specs,
)


@keeping_places()
def initialize_checkpoint(
    config: ZCodeM3Config | Mapping[str, Any] | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: torch.dtype | str = "float32",
    max_shard_size: int | str = "5GB",
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Write a model with random weights as a folder that `ZCodeM3ForConditionalGeneration.from_pretrained` loads.

    Every weight has the distribution that `ZCodeM3ForConditionalGeneration(config)` gives it, but not the same numbers.
    They depend only on `seed`, the name of the weight and, for experts, their index. They do not depend on other
    weights, on the number of experts, on `max_shard_size`, or on `dtype` except for rounding.

    They are drawn directly into the mapped file. So memory holds at most one weight, or one expert's part of it: the
    float32 numbers that are then rounded to another dtype.

    Args:
        config: an object, its fields, a JSON file, or a folder with `config.json`. The folder's generation config is
            copied, and its tokenizer unless `tokenizer` is given.
        output_dir: the new folder; it appears once it is complete.
        seed: seed of the random weights.
        dtype: dtype of the weights, such as `torch.bfloat16` or `"bfloat16"`.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        tokenizer: a tokenizer, or its folder, that is saved with the model.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        What was written.

    Raises:
        ValueError: before anything is written: `config` is missing, of another model, or has a wrong or unknown field;
            `tokenizer` is no tokenizer or larger than the vocabulary; `dtype` is unknown; `output_dir` is not empty.
    """
    parsed_dtype = parse_dtype(dtype)
    if parsed_dtype is None:
        raise ValueError("dtype (None) must be a dtype for the weights, such as float32 or bfloat16")
    write = model_folder_writer(
        output_dir, dtype=None, max_shard_size=max_shard_size, overwrite=overwrite, also_read=[config, tokenizer]
    )
    source, parsed_config = _read_config(config)
    tensors = _random_tensors(parsed_config, seed, parsed_dtype)
    return write(tensors, parsed_config, source=source, save_others=_others(parsed_config, source, tokenizer))


def _read_config(config: ZCodeM3Config | Mapping[str, Any] | str | os.PathLike[str]) -> tuple[Path, ZCodeM3Config]:
    """The origin of a config, its class if it is an object, and our own config object."""
    ours, forms = ZCodeM3Config.model_type, "a JSON file or a folder with config.json"
    _, fields = read_config_fields(config, "config", (ours, None), f"; it must be {ours!r}", forms=forms)
    source = Path(config if isinstance(config, str | os.PathLike) else ZCodeM3Config.__name__)
    known = {field.name for field in dataclasses.fields(ZCodeM3Config)} | {*ZCodeM3Config().to_dict(), "auto_map"}
    unknown = sorted({*fields} - known - {*ZCodeM3Config.attribute_map})
    if unknown:
        raise ValueError(
            f"config ({source}) has {', '.join(unknown)}, which ZCodeM3Config does not have; correct the name"
        )
    return source, zcode_m3_config(fields, f"config ({source})")


def _random_tensors(config: ZCodeM3Config, seed: int, dtype: torch.dtype) -> LazyTensors:
    """All weights of a model that are stored; each is drawn when it is read."""
    model = meta_model(config)
    specs = {name: spec.to(dtype) for name, spec in stored_specs(model).items()}

    def draw(name: str, seed_name: str, out: Tensor) -> None:
        """Fill `out` as the model's constructor fills the parameter of this name, or one expert's part of it."""
        weight = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32)
        weight.fill_(torch.nan)
        module_name, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        without_memory = module.get_parameter(parameter_name)
        setattr(module, parameter_name, nn.Parameter(weight))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(named_seed(seed, seed_name))
            model._init_weights(module)  # its other parameters are on the meta device: nothing is drawn for them
        setattr(module, parameter_name, without_memory)
        assert not weight.sum().isnan(), f"_init_weights of the model leaves {name} as it is"
        if weight is not out:
            out.copy_(weight)

    def read_into(name: str, out: Tensor) -> None:
        if ".experts." not in name:
            draw(name, name, out)
        else:
            for expert in range(len(out)):
                draw(name, f"{name}.{expert}", out[expert : expert + 1])

    return LazyTensors(specs, read_into=read_into)


def _others(config: ZCodeM3Config, source: Path, tokenizer: Any) -> list[Callable[[Path], Any]]:
    """Functions that save tokenizer and generation config into the new folder."""
    others: list[Callable[[Path], Any]] = []
    if tokenizer is not None:
        tokenizer = _load_tokenizer(tokenizer)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"tokenizer has {len(tokenizer)} tokens, more than vocab_size ({config.vocab_size})")
        others.append(tokenizer.save_pretrained)
    elif source.is_dir():
        others.append(copy_tokenizer_and_generation_config(source))
    generation_config = read_generation_config(source)
    if generation_config is None:
        generation_config = GenerationConfig.from_model_config(config)
        generation_config.max_length = config.default_generation_length
    return [*others, generation_config.save_pretrained]


def _load_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    message = f"tokenizer ({tokenizer}) must be a tokenizer or a folder with one"
    if not Path(tokenizer).is_dir():
        raise ValueError(message)
    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # damaged files may raise any exception
        raise ValueError(f"{message}: {shorten(error, 600)}") from error


__all__ = ["initialize_checkpoint"]
