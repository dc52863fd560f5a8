"""Experts and routing for the tests of `zcode_fused`, and what comes out, by a float64 loop over the experts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_moe_ted.models.configuration_zcode_m3 import ZCodeM3Config
from hf_moe_ted.models.experts import ZCodeM3Experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")

CASES = ("random", "all on one", "some dropped", "one token each", "empty experts")


def make_experts(num_experts: int, d_model: int, ffn_dim: int, dtype: torch.dtype, **overrides: Any) -> ZCodeM3Experts:
    config = ZCodeM3Config(
        d_model=d_model, encoder_attention_heads=1, decoder_attention_heads=1, **{"activation_dropout": 0.0} | overrides
    )
    config._experts_implementation = "zcode_fused"
    with torch.device(DEVICE):
        experts = ZCodeM3Experts(config, num_experts, ffn_dim).to(dtype)
    nn.init.normal_(experts.up_proj, std=d_model**-0.5)
    nn.init.normal_(experts.down_proj, std=ffn_dim**-0.5)
    nn.init.normal_(experts.up_proj_bias, std=0.3)
    nn.init.normal_(experts.down_proj_bias, std=0.3)
    return experts


def reference(experts: ZCodeM3Experts, hidden: Tensor, ids: Tensor, weights: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output and gradients of hidden states, weights and parameters in float64."""
    inputs = [hidden, weights, experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias]
    inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    x, w, up, up_bias, down, down_bias = inputs
    output = torch.zeros_like(x)
    for expert in range(experts.num_experts):
        token, slot = torch.where(ids == expert)
        inner = torch.relu(x[token] @ up[expert].T + up_bias[expert])
        result = (inner @ down[expert].T + down_bias[expert]) * w[token, slot, None]
        output = output.index_add(0, token, result)
    return [output.detach(), *torch.autograd.grad(output, inputs, cotangent.double())]


def routing(case: str, num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    """int64[T, K]."""
    ids = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :top_k]
    if case == "all on one":
        ids[:, 0] = num_experts - 1
    elif case == "some dropped":
        ids[torch.rand(ids.shape) < 0.3] = num_experts
    elif case == "one token each":
        ids[:] = num_experts
        ids[:num_experts, 0] = torch.arange(num_experts)[:num_tokens]
    elif case == "empty experts":
        ids[ids % 2 == 0] = num_experts + 3  # any id above is no expert
    return ids.to(DEVICE)


def without_kinks(experts: ZCodeM3Experts, hidden: Tensor, ids: Tensor, cotangent: Tensor) -> Tensor:
    """The cotangent, 0 for tokens with an inner unit within rounding of 0, where ReLU may have one slope or the other.

    One such unit of a million is more than the tolerance in float32.
    """
    is_near = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    for expert in range(experts.num_experts):
        token, _ = torch.where(ids == expert)
        up, bias = experts.up_proj[expert].detach().double(), experts.up_proj_bias[expert].detach().double()
        is_near[token] |= ((hidden[token].double() @ up.T + bias).abs() < 1e-5).any(dim=1)
    return cotangent.masked_fill(is_near.unsqueeze(-1), 0.0)


def assert_near(
    actual: list[Tensor], expected: list[Tensor], tolerance: float, cotangent: Tensor | None = None
) -> None:
    """Output, and gradients if there are any, of the order of `reference`.

    The gradient of a weight is one sum over D. With the cotangent, the errors of all of them are relative to what they
    are when the terms of their sums do not cancel, if that is more.
    """
    names = ("output", "hidden", "weights", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    for name, one, other in zip(names[: len(expected)], actual, expected, strict=True):
        assert one.isfinite().all(), f"{name} has elements that nobody wrote"
        size = other.norm().clamp(min=1e-30)
        if name == "weights" and cotangent is not None:
            typical_T = expected[0].norm(dim=-1) * cotangent.double().norm(dim=-1) / cotangent.shape[-1] ** 0.5
            size = torch.maximum(size, typical_T.norm())
        error = (one.double() - other).norm() / size
        assert error < tolerance, f"{name}: relative error {error:.1e}"
