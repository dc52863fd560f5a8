"""Ungated experts with biases on PyTorch's grouped matrix products.

transformers' `grouped_mm` gathers the biases per row and the tokens by index. The gradients of these gathers are
indexed additions, which take half of a training step on an H200. Here the gradient of a bias is a grouped product with
ones, and tokens are moved by permutations whose transposes are gathers.

Shape letters: T tokens, K experts per token, R = T * K rows, E experts, D model width, F inner width.
"""

from typing import Any

import torch
from torch import Tensor

from .permutation import CombineRows, SpreadTokens, sort_slots


class _AddGroupBias(torch.autograd.Function):
    """`rows[r] + bias[group of r]`, in place; rows after the last group do not change."""

    @staticmethod
    def forward(ctx: Any, rows_RF: Tensor, bias_EF: Tensor, group_R: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(group_R, ends_E)
        ctx.num_groups = bias_EF.shape[0]
        ctx.mark_dirty(rows_RF)
        rows_RF.add_(bias_EF.index_select(0, group_R))
        return rows_RF  # the input itself: torch.compile accepts nothing else for a changed input

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        group_R, ends_E = ctx.saved_tensors
        if grad_RF.dtype == torch.bfloat16 and grad_RF.is_cuda:
            ones_8R = grad_RF.new_ones(
                grad_RF.shape[0], 8
            ).t()  # rows of 16 bytes, the smallest that the product accepts
            grad_EF = torch.nn.functional.grouped_mm(ones_8R, grad_RF.contiguous(), offs=ends_E)[:, 0]
        else:
            is_in_group_R1 = (torch.arange(len(group_R), device=group_R.device) < ends_E[-1]).unsqueeze(-1)
            grad_EF = grad_RF.new_zeros(ctx.num_groups, grad_RF.shape[1])
            grad_EF.index_add_(0, group_R, grad_RF.masked_fill(~is_in_group_R1, 0.0))
        return grad_RF, grad_EF, None, None


def _add_group_bias(rows_RF: Tensor, bias_EF: Tensor, group_R: Tensor, ends_E: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (rows_RF.requires_grad or bias_EF.requires_grad):
        return _AddGroupBias.apply(rows_RF, bias_EF, group_R, ends_E)
    return rows_RF.add_(bias_EF.index_select(0, group_R))  # torch.compile accepts such a Function only with gradients


def _grouped_mm(rows: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
    """`grouped_mm`; in compiled code that is not bfloat16, transformers' loop over experts.

    Before 2.15, torch compiles `grouped_mm` only in bfloat16: docs/upstream/torch_grouped_mm_fake_tensors.md.

    `transformers.integrations.moe`, which models/experts.py imports, registers that operator.
    """
    if torch.compiler.is_compiling() and weight.dtype != torch.bfloat16:
        return torch.ops.transformers.grouped_mm_fallback(rows, weight, ends_E)
    return torch.nn.functional.grouped_mm(rows, weight, offs=ends_E)


def grouped_ffn_experts_forward(experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts function under the contract of transformers, for experts without a gate and with biases.

    Args:
        experts: module with `up_proj` [E, F, D], `up_proj_bias` [E, F], `down_proj` [E, D, F], `down_proj_bias` [E, D],
            `act_fn`, `num_experts`, in float32, bfloat16 or float16; D and F multiples of 8.
        hidden_TD: float[T, D].
        top_k_index: int64[T, K]; `num_experts` for a slot that no expert computes.
        top_k_weights: float[T, K].

    Returns:
        float[T, D].
    """
    num_experts = experts.num_experts
    slot_R, row_TK, counts_E = sort_slots(top_k_index, num_experts)
    ends_E = counts_E.cumsum(0).int()
    group_R = top_k_index.flatten().index_select(0, slot_R).clamp(max=num_experts - 1)

    up, up_bias, down, down_bias = parameters_in_dtype_of_products(experts)
    rows_RD = SpreadTokens.apply(hidden_TD, slot_R, row_TK).to(up.dtype)
    inner_RF = _grouped_mm(rows_RD, up.transpose(1, 2), ends_E)
    inner_RF = experts.act_fn(_add_group_bias(inner_RF, up_bias, group_R, ends_E))
    output_RD = _grouped_mm(inner_RF, down.transpose(1, 2), ends_E)
    output_RD = _add_group_bias(output_RD, down_bias, group_R, ends_E)
    return CombineRows.apply(output_RD, top_k_weights.to(output_RD.dtype), slot_R, row_TK).to(hidden_TD.dtype)


def parameters_in_dtype_of_products(experts: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`up_proj`, `up_proj_bias`, `down_proj`, `down_proj_bias`, under autocast in its dtype."""
    parameters = (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
    device_type = experts.up_proj.device.type
    if not torch.is_autocast_enabled(device_type):
        return parameters
    dtype = torch.get_autocast_dtype(device_type)
    up, up_bias, down, down_bias = (parameter.to(dtype) for parameter in parameters)
    return up, up_bias, down, down_bias


__all__ = ["grouped_ffn_experts_forward", "parameters_in_dtype_of_products"]
