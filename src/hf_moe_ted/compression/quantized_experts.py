"""Experts with 8 or 4 bits per weight, and the quantization method `zcode_experts` that lets transformers load them.

Importing this module registers the method, the way https://huggingface.co/docs/transformers/quantization/contribute
describes. It imports models only when one is quantized, so it can be imported with the quantizers of transformers.

Shape letters: T tokens, K experts per token, R rows, E experts, D model width, F inner width, O output width, I input
width, G weights per scale.
"""

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..kernels.cpu_ffn import run_on_sorted_rows
from ..kernels.experts_implementations import QUANTIZED_EXPERTS_FORWARD, runs_quantized_experts
from ..kernels.int8_linear import Int8Rows, PackedInt8Weights
from .quantized_linear import QuantizedEmbedding, QuantizedLinear, quantize_parts, replace_by_quantized
from .rounding import dequantize_weight, quantize_weight, relative_error, round_into

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..models.experts import ZCodeM3Experts
    from .report.compression_report import CompressionReport

METHOD = "zcode_experts"
BITS = (8, 4)
WHAT = ("experts", "all")

TRITON_ON_GPUS = os.environ.get("HF_MOE_TED_QUANTIZED_KERNELS", "1") == "1"

_PROJECTIONS = ("up_proj", "down_proj")
_DTYPES_IN_TRITON = (torch.float32, torch.bfloat16, torch.float16)


@register_quantization_config(METHOD)
class ExpertQuantizationConfig(QuantizationConfigMixin):
    """Weight-only quantization of experts: integers, symmetric around 0, with a scale per channel or group.

    As the `quantization_config` of `from_pretrained` it quantizes a model during loading. In `config.json` it says how
    the experts are stored.

    Args:
        bits: bits per weight, 8 or 4.
        group_size: number of weights along the input that share a scale; it must divide both widths of the experts.
            `None` is a whole row, that is one output channel.
        what: "experts", or "all": also attention, dense feed-forward, the projection to the vocabulary and the
            embeddings tied to it. These have 8 bits and a scale per channel, whatever the experts have.

    Raises:
        ValueError: an unknown value of `bits` or `what`, a `group_size` that is not positive, or an unknown option.
    """

    def __init__(
        self,
        bits: int = 8,
        group_size: int | None = None,
        quant_method: str = METHOD,
        what: str = "experts",
        **unknown: Any,
    ):
        if unknown:
            raise ValueError(f"{METHOD} has no option {', '.join(unknown)}; its options are bits, group_size and what")
        if what not in WHAT:
            raise ValueError(f"what ({what!r}) must be one of {WHAT}")
        if not _is_integer(bits) or bits not in BITS:
            raise ValueError(f"bits ({bits!r}) must be one of {BITS}")
        if group_size is not None and (not _is_integer(group_size) or group_size < 1):
            raise ValueError(
                f"group_size ({group_size!r}) must be a positive integer, or None for one scale per output channel"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # an enum of the methods within transformers
        self.bits = bits
        self.group_size = group_size
        self.what = what

    def to_dict(self) -> dict[str, Any]:
        """Like the parent's. If only experts are quantized, `what` is left out, so that older versions can read it."""
        fields = super().to_dict()
        if self.what == "experts":
            del fields["what"]
        return fields


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class QuantizedExperts(nn.Module):
    """[`ZCodeM3Experts`] with integer weights, which become floats one expert at a time, while that expert computes.

    On GPUs with compute capability 8.0 or more and Triton, and without gradients, kernels read packed weights and turn
    them into floats in registers; nothing waits for the device.

    On CPUs, with 8 bits, one scale per channel and no gradients, activations are rounded, too, with a scale per token,
    and multiplied as integers. This is several times as fast as float32. It adds about as much rounding error as the
    weights have. The kernels ([`PackedInt8Weights`]) take one or two more bytes per weight of the experts that are
    used.

    `experts_implementation="eager"` computes with rounded weights in floats on every device, one expert after the
    other.

    Parameters: `up_proj_packed` and `down_proj_packed` int8[E, O, I] or, with 4 bits, uint8[E, O, I / 2];
    `up_proj_scale` and `down_proj_scale` float[E, O, I / G]; `up_proj_bias` [E, F], `down_proj_bias` [E, D].
    """

    def __init__(self, experts: "ZCodeM3Experts", quantization: ExpertQuantizationConfig, config: "PreTrainedConfig"):
        """
        Args:
            experts: the module from which shapes, dtypes, devices and the activation are taken, but not the weights.
            quantization: how weights are stored.
            config: config of the model, where `set_experts_implementation` stores its choice.
        """
        super().__init__()
        self.config = config
        self._packed_weights = PackedInt8Weights()
        self.bits, self.group_size = quantization.bits, quantization.group_size
        self.num_experts = experts.num_experts
        self.act_fn = copy.deepcopy(experts.act_fn)
        for name in _PROJECTIONS:
            weight, bias = experts.get_parameter(name), experts.get_parameter(f"{name}_bias")
            num_inputs = weight.shape[-1]
            packed_width = num_inputs if self.bits == 8 else num_inputs // 2
            packed = weight.new_empty(
                (*weight.shape[:-1], packed_width), dtype=torch.int8 if self.bits == 8 else torch.uint8
            )
            scale = weight.new_empty((*weight.shape[:-1], num_inputs // (self.group_size or num_inputs)))
            for kind, tensor in (("packed", packed), ("scale", scale), ("bias", torch.empty_like(bias))):
                self.register_parameter(f"{name}_{kind}", nn.Parameter(tensor, requires_grad=False))

    @torch.no_grad()
    def quantize_from(self, experts: "ZCodeM3Experts") -> float:
        """Copy and round the weights, expert by expert.

        Returns:
            the relative error of the weight matrices of all experts, `||rounded - exact|| / ||exact||` (Frobenius).

        Raises:
            ValueError: a weight is not finite, or too large to be rounded in its dtype.
        """
        squared_error = squared_norm = 0.0
        for name in _PROJECTIONS:
            self.get_parameter(f"{name}_bias").copy_(experts.get_parameter(f"{name}_bias"))
            for expert, weight in enumerate(experts.get_parameter(name)):
                packed, scale = (self.get_parameter(f"{name}_{kind}")[expert] for kind in ("packed", "scale"))
                error, norm = round_into(
                    weight, packed, scale, self.bits, self.group_size, f"{name} of expert {expert}"
                )
                squared_error += error
                squared_norm += norm
        return relative_error(squared_error, squared_norm)

    def weight(self, name: str, expert: int) -> Tensor:
        """float[O, I], `"up_proj"` or `"down_proj"` of one expert."""
        packed, scale = self.get_parameter(f"{name}_packed"), self.get_parameter(f"{name}_scale")
        return dequantize_weight(packed[expert], scale[expert], self.bits)

    @property
    def sums_in_float32(self) -> bool:
        """Whether, on CPUs, outputs of experts stay float32 until the outputs for a token are added up."""
        return self._has_integers_to_multiply()

    def forget_packed(self, experts: Sequence[int]) -> None:
        """Drop packed copies of the weights of some experts, which were overwritten without PyTorch's notice."""
        for name in _PROJECTIONS:
            for expert in experts:
                self._packed_weights.forget((name, expert))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Args:
            hidden_states: float[T, D].
            top_k_index: int64[T, K], expert of each slot; `num_experts` for a slot that no expert computes.
            top_k_weights: float[T, K], factor of each expert's output, 0 for such a slot.

        Returns:
            float[T, D], the weighted sum over a token's experts; zeros for a token that none computes.

        Raises:
            ValueError: in training.
        """
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                "quantized experts cannot be trained: train the model before you quantize it, or call model.eval()"
            )
        if self._runs_in_triton(hidden_states, top_k_weights):
            return self._in_triton(hidden_states, top_k_index, top_k_weights)
        if self._multiplies_integers():
            return run_on_sorted_rows(
                hidden_states, top_k_index, top_k_weights, self.num_experts, self._networks_of_integers
            )
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index[top_k_index < self.num_experts].unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            up = nn.functional.linear(
                hidden_states[token], self.weight("up_proj", expert), self.get_parameter("up_proj_bias")[expert]
            )
            down = nn.functional.linear(
                self.act_fn(up), self.weight("down_proj", expert), self.get_parameter("down_proj_bias")[expert]
            )
            output = output.index_add(0, token, (down * top_k_weights[token, slot, None]).to(output.dtype))
        return output

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph can hold a call without gradients: it does not wait for the device."""
        device = self.get_parameter("up_proj_packed").device
        return device.type == "cuda" and self._has_triton(device)

    def _has_triton(self, device: torch.device) -> bool:
        implementation = self.config._experts_implementation
        return (
            # on CPUs Triton's interpreter is slow, so it runs only if asked for by name
            (implementation != "eager" if device.type == "cuda" else implementation == "zcode_fused")
            and (TRITON_ON_GPUS or device.type != "cuda")
            and runs_quantized_experts(device)
            and self.get_parameter("up_proj_scale").dtype in _DTYPES_IN_TRITON
        )

    def _runs_in_triton(self, hidden_states: Tensor, top_k_weights: Tensor) -> bool:
        return self._has_triton(hidden_states.device) and not (
            torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        )

    def _in_triton(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        from ..models.expert_computation import is_plain_relu

        assert QUANTIZED_EXPERTS_FORWARD is not None
        is_relu = is_plain_relu(self.act_fn)
        return QUANTIZED_EXPERTS_FORWARD(self, hidden_states, top_k_index, top_k_weights, is_relu=is_relu)

    def _multiplies_integers(self) -> bool:
        return (
            self._has_integers_to_multiply()
            and self.get_parameter("up_proj_packed").device.type == "cpu"
            and not torch.is_grad_enabled()  # rounding has no gradient
        )

    def _has_integers_to_multiply(self) -> bool:
        return self.config._experts_implementation != "eager" and self.bits == 8 and self.group_size is None

    def _networks_of_integers(self, rows_RD: Tensor, num_rows_E: list[int], expert_R: Tensor) -> Tensor:
        """Outputs float32[R, D] for rows in the order of their experts."""
        inner_RF = self.act_fn(self._linears_of_integers("up_proj", rows_RD, num_rows_E, expert_R))
        return self._linears_of_integers("down_proj", inner_RF, num_rows_E, expert_R)

    def _linears_of_integers(self, name: str, inputs_RI: Tensor, num_rows_E: list[int], expert_R: Tensor) -> Tensor:
        weight_EOI, scale_EO1, bias_EO = (self.get_parameter(f"{name}_{kind}") for kind in ("packed", "scale", "bias"))
        rows = Int8Rows.of(inputs_RI)
        products = [
            self._packed_weights.product(rows_RI, (name, expert), weight_EOI[expert], scale_EO1[expert].squeeze(-1))
            for expert, rows_RI in enumerate(rows.rounded_RI.split(num_rows_E))
            if len(rows_RI)
        ]
        return torch.cat(products).mul_(rows.step_R1).add_(bias_EO.index_select(0, expert_R))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, bits={self.bits}, group_size={self.group_size}"


QUANTIZED_MODULES = (QuantizedExperts, QuantizedLinear, QuantizedEmbedding)


@register_quantizer(METHOD)
class ExpertQuantizer(HfQuantizer):
    """Loads quantized experts, or quantizes a model that is loaded with an [`ExpertQuantizationConfig`].

    Attributes:
        relative_errors: name of each MoE layer -> relative error of its experts' weights, if they were quantized here.
        errors_of_parts: the same for the other parts that were quantized: "attention", "feed-forward", "vocabulary".
        report: the report of `quantize_experts`, if that was used.
    """

    quantization_config: ExpertQuantizationConfig
    requires_calibration = False

    def __init__(self, quantization_config: ExpertQuantizationConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.relative_errors: dict[str, float] = {}
        self.errors_of_parts: dict[str, float] = {}
        self.report: CompressionReport | None = None

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                f"quantization method {METHOD} does not work with a distributed_config; load the model on one device"
            )
        _check_experts(model, self.quantization_config)
        if self.pre_quantized:
            for name, experts in _experts_of(model).items():
                model.set_submodule(name, QuantizedExperts(experts, self.quantization_config, model.config))
            if self.quantization_config.what == "all":
                replace_by_quantized(model)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        for name, experts in _experts_of(model).items():
            quantized = QuantizedExperts(experts, self.quantization_config, model.config)
            self.relative_errors[name.removesuffix(".experts")] = quantized.quantize_from(experts)
            model.set_submodule(name, quantized.train(experts.training))
        if self.quantization_config.what == "all" and not self.pre_quantized:
            self.errors_of_parts = quantize_parts(model)
        for module in model.modules():
            if isinstance(module, QUANTIZED_MODULES):
                module.requires_grad_(False)  # loading creates new parameters

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _experts_of(model: nn.Module) -> dict[str, "ZCodeM3Experts"]:
    """Name -> experts that are not quantized yet."""
    from ..models.experts import ZCodeM3Experts

    return {name: module for name, module in model.named_modules() if isinstance(module, ZCodeM3Experts)}


def _check_experts(model: "PreTrainedModel", quantization: ExpertQuantizationConfig) -> None:
    all_experts = _experts_of(model)
    if not all_experts:
        raise ValueError(f"{type(model).__name__} has no ZCodeM3 experts to quantize")
    bits, group_size = quantization.bits, quantization.group_size
    for name, experts in all_experts.items():
        for projection in _PROJECTIONS:
            width = experts.get_parameter(projection).shape[-1]
            if width % (group_size or 1):
                raise ValueError(f"group_size ({group_size}) must divide the width {width} of {name}.{projection}")
            if bits == 4 and width % 2:
                raise ValueError(f"bits=4 needs even widths, {name}.{projection} has {width}; use bits=8")


__all__ = [
    "METHOD",
    "ExpertQuantizationConfig",
    "ExpertQuantizer",
    "QuantizedExperts",
    "dequantize_weight",
    "quantize_weight",
]
