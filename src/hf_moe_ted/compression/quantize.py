"""Experts in 8 or 4 bits per weight, all else in 8 or as it was: the same architecture, smaller, for inference."""

import copy
import logging
import math
import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import NllbMoeConfig

from ..files.json_file import read_json_object
from ..files.output import check_output_dir, new_folder
from ..files.writing import keeping_places
from ..models.experts import ZCodeM3Experts
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from ..tensors.config_file import config_path
from ..tensors.lazy_tensors import check_all, check_weight, num_bytes, num_parameters
from ..tensors.model_folder import copy_tokenizer_and_generation_config
from ..tensors.whole_model import load_whole_model
from .model_source import ModelSource
from .quantized_experts import ExpertQuantizationConfig, ExpertQuantizer
from .quantized_linear import modules_of_parts
from .report.compression_report import QuantizationReport
from .report.model_card import derived_card
from .report.report_folder import describe
from .report.summary import Summary

MAX_GROUP_SIZE = 128  # of the default; smaller groups are more exact, their scales take more room

logger = logging.getLogger(__name__)


@keeping_places()
def quantize_experts(
    model_or_folder: ZCodeM3ForConditionalGeneration | str | os.PathLike[str],
    bits: int = 8,
    group_size: int | None = None,
    *,
    what: str = "experts",
    output_dir: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> ZCodeM3ForConditionalGeneration:
    """Round the weights of the experts to 8 or 4 bits, and with `what="all"` those of other large matrices to 8.

    Weight-only, symmetric, rounded to nearest, without calibration, as in https://huggingface.co/papers/2211.10017: its
    authors measured -0.007 BLEU with 8 bits and -0.167 with 4, per channel. Weights become floats again while they
    compute, so what is saved is memory, not time. But on CPUs what has 8 bits per channel multiplies integers, which is
    several times as fast as float32: see [`QuantizedExperts`]. For translations on a CPU take `what="all"`.

    The model is saved with `save_pretrained` and loaded with `from_pretrained`, as it was. Loading with
    `quantization_config=ExpertQuantizationConfig(bits=4)` quantizes, too. Errors and sizes are logged, and are in
    `model.hf_quantizer.report`.

    Args:
        model_or_folder: a model in memory, which is left as it is, or a folder of one, which is loaded in the dtype of
            its config.
        bits: 8 or 4.
        group_size: so many weights along the input of a matrix share a scale, which has the dtype of the weights; it
            divides `d_model` and the inner widths of the experts. By default one scale per output channel for 8 bits,
            and for 4 bits the largest power of two up to 128 that divides the widths.
        what: "experts", or "all" for attention, dense feed-forward, the projection to the vocabulary and the embeddings
            that are tied to it, too: 8 bits and one scale per output channel or word.
        output_dir: a new folder for the model, which appears when everything is in it, `compression_report.json`
            and `report.md` included. From a folder the tokenizer comes along.
        max_shard_size: of the weight files, bytes or a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        a model in evaluation mode, that cannot be trained.

    Raises:
        ValueError: before anything is written: the model is quantized already, spread over processes, has an adapter or
            no experts; weights that are missing or not finite; other `bits` or `what`, or a `group_size` that does not
            divide a width; `output_dir` is not empty.
    """
    if output_dir is not None:
        check_output_dir(output_dir, overwrite=overwrite, sources=[model_or_folder])
    model, source = _open(model_or_folder)
    card = derived_card([model.name_or_path or str(source)], relation="quantized")
    if bits == 4 and group_size is None:
        group_size = _default_group_size(model)
    quantizer = ExpertQuantizer(ExpertQuantizationConfig(bits, group_size, what=what), pre_quantized=False)
    replaced = [*_experts_of(model), *(modules_of_parts(model) if what == "all" else ())]  # these are not copied
    quantized: Any = copy.deepcopy(model, {id(module): module for module in replaced})
    quantizer.preprocess_model(quantized)  # with the next two lines, what `from_pretrained` does
    quantized.hf_quantizer = quantizer
    quantizer.postprocess_model(quantized)
    quantized.eval()

    report = quantizer.report = _report(str(source), model, quantized, quantizer)
    logger.info("%s", report)
    if output_dir is None:
        return quantized

    with new_folder(output_dir, overwrite=overwrite) as folder:
        _write(folder, quantized, None if isinstance(model_or_folder, nn.Module) else source, max_shard_size)
        describe(folder, Summary.of(report), str(card))
    return quantized


def _open(
    model_or_folder: ZCodeM3ForConditionalGeneration | str | os.PathLike[str],
) -> tuple[ZCodeM3ForConditionalGeneration, Path]:
    """The model, all of whose weights are those of its config and finite, and the folder or the name of its class."""
    if not isinstance(model_or_folder, str | os.PathLike):
        source = ModelSource.open(model_or_folder, allow_merged=True)
        assert source.model is not None
        check_all(source.tensors)
        return source.model, source.path
    folder = Path(model_or_folder)
    fields = read_json_object(config_path(folder, "model"), "config")
    if fields.get("model_type") != NllbMoeConfig.model_type:
        ModelSource.open(folder, allow_merged=True)
    model = load_whole_model(folder)
    for name, weight in model.named_parameters():
        check_weight(name, weight, str(folder))
    return model, folder


def _write(folder: Path, quantized: Any, source: Path | None, max_shard_size: int | str) -> None:
    """The model, and what comes along from the folder that it was made of, if it is one."""
    quantized.save_pretrained(folder, max_shard_size=max_shard_size)
    if source is not None:
        copy_tokenizer_and_generation_config(source)(folder)


def _experts_of(model: nn.Module) -> list[ZCodeM3Experts]:
    return [module for module in model.modules() if isinstance(module, ZCodeM3Experts)]


def _default_group_size(model: nn.Module) -> int:
    widths = [weight.shape[-1] for experts in _experts_of(model) for weight in (experts.up_proj, experts.down_proj)]
    return math.gcd(MAX_GROUP_SIZE, *widths)


def _report(
    source: str,
    model: ZCodeM3ForConditionalGeneration,
    quantized: ZCodeM3ForConditionalGeneration,
    quantizer: ExpertQuantizer,
) -> QuantizationReport:
    before, after = dict(model.named_parameters()), dict(quantized.named_parameters())  # tied ones once
    quantization = quantizer.quantization_config
    return QuantizationReport(
        source=source,
        arguments={"bits": quantization.bits, "group_size": quantization.group_size, "what": quantization.what},
        num_parameters_before=num_parameters(before),
        num_parameters_after=num_parameters(before),
        num_bytes_before=num_bytes(before),
        num_bytes_after=num_bytes(after),
        warnings=(),
        bits=quantization.bits,
        group_size=quantization.group_size,
        relative_errors=quantizer.relative_errors,
        errors_of_parts=quantizer.errors_of_parts,
    )


__all__ = ["quantize_experts"]
