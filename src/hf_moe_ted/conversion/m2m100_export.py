"""Dense ZCodeM3 models -> M2M100 folders, which transformers and CTranslate2 load without this package."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    PreTrainedTokenizerBase,
)

from ..files.json_file import read_json_object
from ..files.output_kinds import M2M100_EXPORT
from ..files.writing import keeping_places
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.layer_names import DENSE_OF_STACKED, SIDES, moe_layers
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from ..models.nllb_moe import M2M100_FIELDS
from ..tensors.config_file import read_zcode_m3_config
from ..tensors.conversion_report import ConversionReport
from ..tensors.lazy_tensors import LazyTensors, copy_rounded
from ..tensors.model_folder import (
    TOKENIZER_FILES,
    drop_tied_copies,
    meta_model,
    model_folder_writer,
    read_generation_config,
    stored_specs,
)
from ..tensors.model_in_memory import tensors_of_model
from ..tensors.safetensors_io import check_tensors, open_pretrained_tensors
from ..tensors.whole_model import check_no_adapter
from .m2m100 import m2m100_name

_OUTPUTS = ("fc2.weight", "fc2.bias")  # weights that take a constant factor of an expert's output


@keeping_places()
def export_m2m100(
    model_or_folder: ZCodeM3ForConditionalGeneration | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> ConversionReport:
    """Write a model whose layers are all dense as M2M100.

    `M2M100ForConditionalGeneration` computes the same logits. CTranslate2's own converter
    (`ct2-transformers-converter`) reads the folder.

    A layer with one expert is dense if every token gets that expert's output: a router with a single row gives
    probability 1. `moe_token_dropout` scales the output by a constant, which goes into the weights. In a merged model
    the probability of a row depends on the token, unless the weights of a token are normalized
    (`normalize_router_weights`) or all rows are chosen.

    Args:
        model_or_folder: a model in memory, which does not change, or a folder with `config.json` and weights of
            ZCodeM3, sharded or not, which are read one by one.
        output_dir: the new folder; it appears once it is complete.
        tokenizer: the tokenizer that is saved with the model; by default the one in the folder. Without this package a
            [`ZCodeM3Tokenizer`] is loaded as a tokenizer of the *tokenizers* library, which has the same tokens but
            adds no tags: write them into the text, `"__en__Close all tabs"`.
        dtype: dtype of the weights, such as `torch.bfloat16` or `"bfloat16"`; by default it does not change.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        What was written.

    Raises:
        ValueError: before anything is written: the model has experts, positions that M2M100 does not have, or an
            adapter; it is quantized or has weights in other processes; a weight is missing or not finite; `output_dir`
            is not empty; `dtype` is unknown.
    """
    write = model_folder_writer(
        output_dir,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        sources=[model_or_folder],
        kind=M2M100_EXPORT,
    )
    source = _open(model_or_folder)
    _check_dense(source.config, source.path)
    fields: dict[str, Any] = {name: getattr(source.config, name) for name in M2M100_FIELDS}
    fields |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "exported_from": ZCodeM3Config.model_type}
    config = M2M100Config(**fields)
    save_tokenizer = _tokenizer_saver(source.folder, tokenizer, config.vocab_size)
    warnings = _warnings(source.config)
    if save_tokenizer is None:
        warnings.append("no tokenizer was saved; CTranslate2's converter needs one in the folder")
    return write(
        _dense_tensors(source, config),
        config,
        model_class=M2M100ForConditionalGeneration,
        loaded_dtype=None if source.folder is None else source.config.dtype,
        source=source.path,
        save_others=[source.generation_config.save_pretrained, *([] if save_tokenizer is None else [save_tokenizer])],
        warnings=warnings,
    )


@dataclass(frozen=True)
class _Source:
    """The model that is exported.

    Attributes:
        path: the folder, or the name of the model's class; for messages.
        folder: the folder, if it is one.
        config: of the model.
        tensors: its weights under our names, tied ones once.
        generation_config: has a length, because M2M100's default is 20 tokens.
    """

    path: Path
    folder: Path | None
    config: ZCodeM3Config
    tensors: LazyTensors
    generation_config: GenerationConfig


def _open(model_or_folder: ZCodeM3ForConditionalGeneration | str | os.PathLike[str]) -> _Source:
    """Open the source and check it: names, shapes and dtypes at once, numbers when they are read."""
    generation_config: GenerationConfig | None
    if isinstance(model_or_folder, ZCodeM3ForConditionalGeneration):
        path, folder = Path(type(model_or_folder).__name__), None
        config, generation_config = model_or_folder.config, model_or_folder.generation_config
        _refuse_quantized(path, config, getattr(model_or_folder, "hf_quantizer", None))
        tensors = tensors_of_model(model_or_folder)
    elif isinstance(model_or_folder, str | os.PathLike):
        path = folder = Path(model_or_folder)
        config, generation_config = read_zcode_m3_config(folder, "model_or_folder"), read_generation_config(folder)
        check_no_adapter(folder)
        _refuse_quantized(path, config)
        tensors = open_pretrained_tensors(folder)
    else:
        raise ValueError(
            "model_or_folder must be a ZCodeM3ForConditionalGeneration or the folder of one, got "
            f"{type(model_or_folder).__name__}"
        )
    model = meta_model(config)
    tensors = drop_tied_copies(tensors, model.all_tied_weights_keys)
    check_tensors(tensors.specs, stored_specs(model), str(path))
    return _Source(path, folder, config, tensors, _with_length(generation_config, config))


def _refuse_quantized(path: Path, config: ZCodeM3Config, quantizer: Any = None) -> None:
    if quantizer is not None or getattr(config, "quantization_config", None):
        raise ValueError(f"{path} is quantized (quantization_config); export the model before you quantize it")


def _with_length(generation_config: GenerationConfig | None, config: ZCodeM3Config) -> GenerationConfig:
    found: Any = copy.deepcopy(generation_config) or GenerationConfig.from_model_config(config)
    if found.max_length is None and found.max_new_tokens is None:
        found.max_length = config.default_generation_length
    found._from_model_config = False  # else M2M100 makes it again from its own config, which has no length
    return found


def _check_dense(config: ZCodeM3Config, path: Path) -> None:
    """
    Raises:
        ValueError: the model computes something that M2M100 cannot; the message lists it all and says what to do.
    """
    if config.position_embedding_type != "sinusoidal":
        raise ValueError(
            f"{path} has position_embedding_type={config.position_embedding_type!r}, but M2M100 has sinusoidal "
            "positions only; serve it with this package"
        )
    several = {layer: count for layer, count in moe_layers(config).items() if count > 1}
    if several:
        listed = ", ".join(f"{layer}: {count}" for layer, count in several.items())
        raise ValueError(
            f"{path} has several experts in {len(several)} layers ({listed}), but M2M100 has none; "
            f"{_way_to_one(config)} and train it further, distil a dense model from it, or serve it with this package"
        )
    if moe_layers(config) and (reasons := _why_not_constant(config)):
        raise ValueError(
            f"{path} has one expert per layer, but its output is scaled by a number that M2M100 cannot compute: "
            f"{'; '.join(reasons)}; serve it with this package"
        )


def _why_not_constant(config: ZCodeM3Config) -> list[str]:
    """Reasons why the factor of the one expert's output depends on the token or on chance; empty if there are none."""
    reasons = []
    if config.use_residual:
        reasons.append("use_residual adds a dense branch with coefficients that depend on the token")
    if config.eval_capacity_factor is not None and config.eval_capacity_factor < 1:
        reasons.append(
            f"eval_capacity_factor={config.eval_capacity_factor} drops tokens; set it to None, which drops none"
        )
    if config.second_expert_policy == "random" and config.normalize_router_weights != "after_dropping":
        reasons.append("second_expert_policy='random' leaves second experts out; use 'all', which keeps them")
    is_normalized = config.normalize_router_weights is not None
    if not all(_is_weight_one(config, rows, is_normalized) for side in SIDES for rows in _rows(config, side)):
        reasons.append(
            "the rows of merged or removed experts share the router's probability (expert_map), and "
            "normalize_router_weights is not set, or rows are never chosen; from the model from which it was made, "
            f"{_way_to_one(config)}"
        )
    return reasons


def _way_to_one(config: ZCodeM3Config) -> str:
    """How to get one expert per layer whose output is not scaled."""
    if config.num_experts_per_tok == 1:
        return "keep one per layer (hf-moe-ted prune --keep 1)"
    if config.normalize_router_weights is not None:
        return "merge them to one per layer (hf-moe-ted merge --keep 1)"
    return "keep one per layer, with num_experts_per_tok set to 1 in its config (hf-moe-ted prune --keep 1)"


def _rows(config: ZCodeM3Config, side: Any) -> list[list[int]]:
    """The expert of each row of the routers of a side."""
    return [*config.expert_map_per_layer(side).values()]


def _is_weight_one(config: ZCodeM3Config, expert_of_row: list[int], is_normalized: bool) -> bool:
    """Whether the weights of a token sum to 1; they all lead to expert 0."""
    has_removed_rows = any(expert != 0 for expert in expert_of_row)
    return not has_removed_rows and (is_normalized or len(expert_of_row) == config.num_experts_per_tok)


def _dense_tensors(source: _Source, config: M2M100Config) -> LazyTensors:
    """The weights of M2M100, each made when it is read."""
    ours = {m2m100_name(name): name for name in source.tensors}
    for name in source.tensors:
        prefix, _, kind = name.partition(".ffn.")
        if kind in DENSE_OF_STACKED:
            ours[f"{prefix}.{DENSE_OF_STACKED[kind]}"] = name
    expected = stored_specs(meta_model(config, M2M100ForConditionalGeneration))
    factor = 1.0 - source.config.moe_token_dropout

    def read_into(name: str, out: Tensor) -> None:
        stored = ours[name]
        if ".experts." not in stored:
            source.tensors.into(stored, out)
            return
        weight = source.tensors.row(stored, 0)
        is_scaled = factor != 1.0 and name.endswith(_OUTPUTS)
        copy_rounded(name, weight.double() * factor if is_scaled else weight, out)

    specs = {name: spec.to(source.tensors.specs[ours[name]].dtype) for name, spec in expected.items()}
    return LazyTensors(specs, read_into=read_into)


def _tokenizer_saver(
    folder: Path | None, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> Callable[[Path], None] | None:
    """A function that saves the tokenizer into the new folder; `None` without a tokenizer."""
    files = [] if folder is None else [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if tokenizer is None and not files:
        return None

    def save(new_folder: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(new_folder)
        for path in files if tokenizer is None else ():
            shutil.copyfile(path, new_folder / path.name)
        _adapt_tokenizer_config(new_folder, vocab_size)

    return save


def _adapt_tokenizer_config(folder: Path, vocab_size: int) -> None:
    """Remove references to our code, which is not copied; add the rows without a token, which CTranslate2 counts."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    content = read_json_object(path, "tokenizer config")
    content.pop("auto_map", None)
    if content.get("tokenizer_class") == "M2M100Tokenizer" and (folder / "vocab.json").is_file():
        tokenizer = M2M100Tokenizer.from_pretrained(folder)
        content["num_madeup_words"] = max(0, vocab_size - len(tokenizer.get_vocab()))
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _warnings(config: ZCodeM3Config) -> list[str]:
    """Warnings about what CTranslate2's converter would silently get wrong."""
    warnings = []
    if config.pad_token_id != 1:
        warnings.append(
            f"pad_token_id is {config.pad_token_id}: transformers computes the same, but CTranslate2's converter "
            "assumes that positions begin after a pad_token_id of 1, so CTranslate2 translates wrongly"
        )
    if config.encoder_attention_heads != config.decoder_attention_heads:
        warnings.append(
            f"encoder_attention_heads ({config.encoder_attention_heads}) and decoder_attention_heads "
            f"({config.decoder_attention_heads}) differ: transformers computes the same, but CTranslate2's converter "
            "uses the encoder's number for both, so CTranslate2 translates wrongly"
        )
    return warnings


__all__ = ["export_m2m100"]
