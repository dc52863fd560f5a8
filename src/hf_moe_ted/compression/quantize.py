"""Quantization for inference: experts in 8 or 4 bits per weight, other weights in 8 bits or as they were."""

import copy
import logging
import math
import os
from collections.abc import Mapping
from typing import Any, overload

from torch import Tensor, nn

from ..files.output import check_output_dir, new_folder
from ..files.writing import keeping_places
from ..models.experts import ZCodeM3Experts
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from ..tensors.byte_sizes import num_bytes_of
from ..tensors.lazy_tensors import check_all, check_weight, num_bytes, num_parameters
from ..tensors.model_folder import parse_dtype, stored_dtype
from ..tensors.whole_model import DTYPES, load_whole_model
from .model_source import ModelSource
from .quantized_experts import ExpertQuantizationConfig, ExpertQuantizer
from .quantized_folder import QuantizedFolder
from .quantized_linear import modules_of_parts
from .report.compression_report import QuantizationReport
from .report.model_card import derived_card
from .report.report_folder import describe
from .report.summary import Summary

MAX_GROUP_SIZE = 128  # largest default; smaller groups are more exact, but their scales take more memory

logger = logging.getLogger(__name__)


@overload
def quantize_experts(
    model_or_folder: ZCodeM3ForConditionalGeneration,
    bits: int = ...,
    group_size: int | None = ...,
    *,
    what: str = ...,
    dtype: str = ...,
    output_dir: str | os.PathLike[str] | None = ...,
    max_shard_size: int | str = ...,
    overwrite: bool = ...,
) -> ZCodeM3ForConditionalGeneration: ...


@overload
def quantize_experts(
    model_or_folder: str | os.PathLike[str],
    bits: int = ...,
    group_size: int | None = ...,
    *,
    what: str = ...,
    dtype: str = ...,
    output_dir: None = ...,
    max_shard_size: int | str = ...,
    overwrite: bool = ...,
) -> ZCodeM3ForConditionalGeneration: ...


@overload
def quantize_experts(
    model_or_folder: str | os.PathLike[str],
    bits: int = ...,
    group_size: int | None = ...,
    *,
    what: str = ...,
    dtype: str = ...,
    output_dir: str | os.PathLike[str],
    max_shard_size: int | str = ...,
    overwrite: bool = ...,
) -> QuantizationReport: ...


@keeping_places()
def quantize_experts(
    model_or_folder: ZCodeM3ForConditionalGeneration | str | os.PathLike[str],
    bits: int = 8,
    group_size: int | None = None,
    *,
    what: str = "experts",
    dtype: str = "auto",
    output_dir: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> ZCodeM3ForConditionalGeneration | QuantizationReport:
    """Round expert weights to 8 or 4 bits and, with `what="all"`, those of other large matrices to 8 bits.

    The method is weight-only, symmetric, rounded to nearest and without calibration, as in
    https://huggingface.co/papers/2211.10017. Its authors measured -0.007 BLEU with 8 bits and -0.167 with 4, per
    channel. Weights become floats again for the computation, so this saves memory, not time. On CPUs, however, weights
    with 8 bits per channel are multiplied as integers, which is several times as fast as float32: see
    [`QuantizedExperts`]. To translate on a CPU, use `what="all"`.

    From a folder to a folder it works matrix by matrix: memory holds at most one output shard, the largest tensor and
    0.5 GiB, for a model of any size. The files are the same as those of a model that was quantized in memory and saved.
    Load the folder with `from_pretrained`.

    Loading with `quantization_config=ExpertQuantizationConfig(bits=4)` quantizes, too. Errors and sizes are logged and
    stand in the report. From a folder to a folder the report is returned; else it is `model.hf_quantizer.report`.

    Args:
        model_or_folder: a model in memory, which does not change, or a folder of ZCodeM3 or NLLB-MoE.
        bits: 8 or 4.
        group_size: number of weights along the input of a matrix that share a scale. It must divide `d_model` and the
            inner widths of the experts. Scales have the dtype of the weights. The default is one scale per output
            channel for 8 bits, and for 4 bits the largest power of two up to 128 that divides the widths.
        what: "experts", or "all": also attention, dense feed-forward, the projection to the vocabulary and the
            embeddings that are tied to it, with 8 bits and one scale per output channel or word.
        dtype: dtype of a folder's weights before they are rounded, and so of the scales and of all that is not rounded:
            "float32", "bfloat16", "float16", or "auto", the dtype in its config.
        output_dir: a new folder for the model, with `compression_report.json` and `report.md`; it appears once it is
            complete. From a folder it also gets the tokenizer.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        a model in evaluation mode, which cannot be trained; from a folder to a folder, the report.

    Raises:
        ValueError: the model is quantized already, spread over processes, has an adapter or has no experts; a weight is
            missing, of another kind or not finite; an unknown value of `bits`, `what` or `dtype`, or a `group_size`
            that does not divide a width; `max_shard_size` is no size; `output_dir` is not empty. No part of an output
            is left then.
    """
    max_shard_size = num_bytes_of(max_shard_size, "max_shard_size")
    if output_dir is not None:
        check_output_dir(output_dir, overwrite=overwrite, sources=[model_or_folder])
    if dtype not in DTYPES or (dtype != "auto" and isinstance(model_or_folder, nn.Module)):
        raise ValueError(
            f"dtype ({dtype!r}) must be one of {', '.join(DTYPES)}, and 'auto' for a model in memory, whose dtype "
            "model.to changes"
        )
    quantization = ExpertQuantizationConfig(bits, group_size, what=what)
    source = ModelSource.open(model_or_folder, allow_merged=True, allow_nllb_moe=True)
    if bits == 4 and group_size is None:
        quantization.group_size = _default_group_size(source)
    card = derived_card([getattr(source.model, "name_or_path", "") or str(source.path)], relation="quantized")
    if source.model is None and output_dir is not None:
        quantized_folder = _quantized_folder(source, quantization, dtype)
        with new_folder(output_dir, overwrite=overwrite) as folder:
            quantized_folder.write(folder, source, max_shard_size)
            report = _report(source, source.tensors.specs, quantized_folder.tensors.specs, quantized_folder.quantizer)
            describe(folder, Summary.of(report), str(card))
        logger.info("%s", report)
        return report

    quantized = _quantized_in_memory(source, quantization, dtype)
    if output_dir is not None:
        with new_folder(output_dir, overwrite=overwrite) as folder:
            quantized.save_pretrained(folder, max_shard_size=max_shard_size)
            describe(folder, Summary.of(quantized.hf_quantizer.report), str(card))
    return quantized


def _quantized_folder(source: ModelSource, quantization: ExpertQuantizationConfig, dtype: str) -> QuantizedFolder:
    is_auto = dtype == "auto"
    parsed = stored_dtype(source.config, source.tensors.specs) if is_auto else parse_dtype(dtype)
    assert parsed is not None
    stored = {spec.dtype for spec in source.tensors.specs.values() if spec.is_floating_point()}
    if is_auto and all(dtype.itemsize < parsed.itemsize for dtype in stored):
        names = [str(each).removeprefix("torch.") for each in (*stored, parsed)]
        logger.warning(
            f"weights that are not rounded become larger: {source.path} has {names[0]}, and its config says "
            f"{names[-1]}; dtype {names[0]!r} (--dtype {names[0]}) leaves them as they are"
        )
    return QuantizedFolder.of(source, quantization, parsed)


def _quantized_in_memory(source: ModelSource, quantization: ExpertQuantizationConfig, dtype: str) -> Any:
    """The quantized model; all weights are checked first."""
    model = source.model
    if model is None:
        model = load_whole_model(source.path, dtype)
        for name, weight in model.named_parameters():
            check_weight(name, weight, str(source.path))
    else:
        check_all(source.tensors)
    quantizer = ExpertQuantizer(quantization, pre_quantized=False)
    # these are not copied
    replaced = [*_experts_of(model), *(modules_of_parts(model) if quantization.what == "all" else ())]
    quantized: Any = copy.deepcopy(model, {id(module): module for module in replaced})
    quantizer.preprocess_model(quantized)  # with the next two lines, what `from_pretrained` does
    quantized.hf_quantizer = quantizer
    quantizer.postprocess_model(quantized)
    quantized.eval()
    before, after = dict(model.named_parameters()), dict(quantized.named_parameters())  # tied weights once
    quantizer.report = _report(source, before, after, quantizer)
    logger.info("%s", quantizer.report)
    return quantized


def _experts_of(model: nn.Module) -> list[ZCodeM3Experts]:
    return [module for module in model.modules() if isinstance(module, ZCodeM3Experts)]


def _default_group_size(source: ModelSource) -> int:
    specs = source.tensors.specs
    widths = [
        spec.shape[-1] for name, spec in specs.items() if name.endswith((".experts.up_proj", ".experts.down_proj"))
    ]
    return math.gcd(MAX_GROUP_SIZE, *widths)


def _report(
    source: ModelSource, before: Mapping[str, Tensor], after: Mapping[str, Tensor], quantizer: ExpertQuantizer
) -> QuantizationReport:
    quantization = quantizer.quantization_config
    return QuantizationReport(
        source=str(source.path),
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
