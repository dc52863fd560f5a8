"""Quantized experts for the tests of their kernels, and experts with the same weights in float32."""

from typing import Any

import torch
from fused_experts_cases import DEVICE, make_experts, reference, routing
from torch import Tensor

from hf_moe_ted.compression.quantized_experts import ExpertQuantizationConfig, QuantizedExperts
from hf_moe_ted.compression.rounding import dequantize_weight
from hf_moe_ted.models.experts import ZCodeM3Experts

Inputs = tuple[Tensor, Tensor, Tensor]


def make_quantized(
    bits: int, group_size: int | None, num_experts: int, d_model: int, ffn_dim: int, dtype: torch.dtype, **config: Any
) -> tuple[QuantizedExperts, ZCodeM3Experts]:
    """Random experts, and the reference."""
    experts = make_experts(num_experts, d_model, ffn_dim, dtype, **config)
    quantized = QuantizedExperts(experts, ExpertQuantizationConfig(bits, group_size), experts.config).eval()
    quantized.quantize_from(experts)
    experts.float()
    for name in ("up_proj", "down_proj"):
        packed, scale = quantized.get_parameter(f"{name}_packed"), quantized.get_parameter(f"{name}_scale")
        experts.get_parameter(name).data = dequantize_weight(packed, scale.float(), bits)
        experts.get_parameter(f"{name}_bias").data = quantized.get_parameter(f"{name}_bias").float()
    return quantized, experts


def random_inputs(case: str, num_tokens: int, top_k: int, experts: ZCodeM3Experts, dtype: torch.dtype) -> Inputs:
    """Hidden states, expert ids and weights."""
    hidden = torch.randn(num_tokens, experts.up_proj.shape[2], device=DEVICE, dtype=dtype)
    weights = torch.rand(num_tokens, top_k, device=DEVICE, dtype=dtype)
    return hidden, routing(case, num_tokens, top_k, experts.num_experts), weights


def expected_output(experts: ZCodeM3Experts, inputs: Inputs) -> list[Tensor]:
    return reference(experts, *inputs, torch.zeros_like(inputs[0]))[:1]
