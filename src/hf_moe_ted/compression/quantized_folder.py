"""Quantize a model from one folder to another, matrix by matrix; the whole model is never in memory.

Shape letters: E experts, O output width, I input width.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from ..tensors.lazy_tensors import LazyTensors, copy_rounded
from ..tensors.model_folder import meta_model, stored_specs
from ..tensors.safetensors_io import write_pretrained_tensors
from .model_source import ModelSource
from .quantized_experts import ExpertQuantizationConfig, ExpertQuantizer, QuantizedExperts
from .quantized_linear import weights_of_parts
from .rounding import relative_error, round_into

_KINDS = ("packed", "scale")


@dataclass(frozen=True)
class _Matrix:
    """A weight that is rounded.

    Attributes:
        source: name of the weight.
        bits: per weight.
        group_size: weights per scale; `None` for a row.
        errors_of: the MoE layer or the part of the model to whose error it adds.
    """

    source: str
    bits: int
    group_size: int | None
    errors_of: str


@dataclass(frozen=True)
class QuantizedFolder:
    """The quantized form of a model in a folder.

    Attributes:
        model: the quantized model without memory for its weights, with its config and generation config.
        tensors: its weights, which are rounded as they are read.
        quantizer: holds the errors once all tensors were read.
    """

    model: Any
    tensors: LazyTensors
    quantizer: ExpertQuantizer

    @classmethod
    def of(cls, source: ModelSource, quantization: ExpertQuantizationConfig, dtype: torch.dtype) -> "QuantizedFolder":
        """
        Args:
            source: a folder.
            quantization: how the weights are stored.
            dtype: dtype of the scales and of all that is not rounded. Weights are converted to it before they are
                rounded, as if the model had been loaded in it.

        Raises:
            ValueError: the model has no experts, or they cannot be stored in this way.
        """
        model = meta_model(source.config).to(dtype)
        parts = weights_of_parts(model) if quantization.what == "all" else {}
        quantizer = ExpertQuantizer(quantization, pre_quantized=True)
        quantizer.preprocess_model(model)
        quantizer.postprocess_model(model)  # `from_pretrained` does this for quantized weights
        model.config.dtype = dtype
        model.config.architectures = [ZCodeM3ForConditionalGeneration.__name__]
        rounded = _matrices_of_experts(model, quantization)
        rounded |= {f"{name}.weight": _Matrix(f"{name}.weight", 8, None, part) for name, (part, _) in parts.items()}
        specs = stored_specs(model)
        rounding = _Rounding(source.tensors, specs, rounded, dtype, _Errors(quantizer))
        return cls(model, LazyTensors(specs, read_into=rounding.read_into), quantizer)

    def write(self, folder: Path, source: ModelSource, max_shard_size: int | str) -> None:
        """Write the model, with its config and tokenizer, into an existing folder."""
        write_pretrained_tensors(self.tensors, folder, max_shard_size=max_shard_size)
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)  # replaced by the source's, if it has one
        source.save_others(folder)


def _matrices_of_experts(model: nn.Module, quantization: ExpertQuantizationConfig) -> dict[str, _Matrix]:
    return {
        f"{name}.{projection}": _Matrix(
            f"{name}.{projection}", quantization.bits, quantization.group_size, name.removesuffix(".experts")
        )
        for name, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
        for projection in ("up_proj", "down_proj")
    }


@dataclass
class _Errors:
    """Sums of squares of errors and weights, by MoE layer and by part; the quantizer gets their ratio."""

    quantizer: ExpertQuantizer
    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, of: str, squared_error: float, squared_norm: float) -> None:
        sums = self.sums.setdefault(of, [0.0, 0.0])
        sums[0] += squared_error
        sums[1] += squared_norm
        by_name = self.quantizer.relative_errors if of.startswith("model.") else self.quantizer.errors_of_parts
        by_name[of] = relative_error(*sums)


@dataclass
class _Rounding:
    """Reads tensors of the quantized model from the tensors of the source.

    One pass over a matrix makes its integers and scales. The part that is not asked for first is kept: usually the
    scales; the integers only if groups are so small that the scales need their own file, which is written before.
    """

    tensors: LazyTensors
    specs: dict[str, Tensor]
    matrices: dict[str, _Matrix]
    dtype: torch.dtype
    errors: _Errors
    waiting: dict[str, Tensor] = field(default_factory=dict)

    def read_into(self, name: str, out: Tensor) -> None:
        base, _, kind = name.rpartition("_")
        matrix = self.matrices.get(base)
        if matrix is None or kind not in _KINDS:
            self._copy(name, out)
        elif name in self.waiting:
            out.copy_(self.waiting.pop(name))
        else:
            outs = {kind: out}
            [other] = (name for name in _KINDS if name != kind)
            spec = self.specs[f"{base}_{other}"]
            outs[other] = self.waiting[f"{base}_{other}"] = torch.empty(spec.shape, dtype=spec.dtype)
            self._round(matrix, outs["packed"], outs["scale"])

    def _copy(self, name: str, out: Tensor) -> None:
        if out.dtype == self.tensors.specs[name].dtype:
            self.tensors.into(name, out)
            return
        for rows, part in self.tensors.parts(name):
            copy_rounded(f"{name} (rows from {rows.start})" if rows.start else name, part, out[rows])

    def _round(self, matrix: _Matrix, packed: Tensor, scale: Tensor) -> None:
        """Round expert by expert, or a part of the rows at a time, because embeddings may be the largest tensor."""
        if packed.ndim == 2:
            for rows, weight_OI in self.tensors.parts(matrix.source):
                self._round_one(matrix, matrix.source, weight_OI, packed[rows], scale[rows])
            return
        for expert, outs in enumerate(zip(packed, scale, strict=True)):
            weight_OI = self.tensors.row(matrix.source, expert)
            self._round_one(matrix, f"{matrix.source} of expert {expert}", weight_OI, *outs)

    def _round_one(self, matrix: _Matrix, name: str, weight_OI: Tensor, packed: Tensor, scale: Tensor) -> None:
        if weight_OI.dtype != self.dtype:
            exact_OI, weight_OI = weight_OI, torch.empty_like(weight_OI, dtype=self.dtype)
            copy_rounded(name, exact_OI, weight_OI)
        self.errors.add(matrix.errors_of, *round_into(weight_OI, packed, scale, matrix.bits, matrix.group_size, name))


__all__ = ["QuantizedFolder"]
