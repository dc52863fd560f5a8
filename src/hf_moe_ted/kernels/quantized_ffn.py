"""Ungated experts with biases whose weights are packed integers, in Triton kernels, for inference.

The kernels read packed weights, which become floats in registers. Nothing waits for the device, and nothing is cached.
`torch.compile` sees the products as custom operators.

Shape letters: T tokens, K slots per token, S = T * K slots, E experts, D model width, F inner width, B packed bytes of
the inputs of a row, G groups of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .quantized_many_slots import gather_planes, many_slots_tile, quantized_grouped_linear
from .quantized_small_batch import MAX_SLOTS, plan_tiles, plan_tiles_op, small_batch_quantized_linear
from .row_plan import RowPlan, plan_rows, plan_rows_op


def quantized_linear(
    inputs: Tensor,
    expert_ids: Tensor,
    plan: Tensor,
    weights: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor,
    relu: bool,
) -> Tensor:
    """`matrix[e] @ input + bias[e]` for the expert of each slot.

    With 4 bits, the numbers between both matrices of an expert are in the order in which the second reads them: even
    positions before odd positions.

    Args:
        inputs: float[T, D] of tokens for the first matrix, float[S, F] for the second; all tensors are contiguous.
        expert_ids: integer[T, K]; E or more for a slot that no expert computes.
        plan: from `plan_tiles` for at most `MAX_SLOTS` slots, else from `plan_rows`.
        weights: float[T, K], factors of the outputs, for the second matrix; `None` for the first.
        packed, scale, bias: int8[E, N, D] or, with 4 bits, uint8[E, N, D / 2]; float[E, N, G]; float[E, N].
        relu: whether to apply ReLU to the outputs.

    Returns:
        float[S, N]. For the first matrix: undefined for slots without an expert, and ordered by row with a plan of
        rows. For the second: ordered by slot, zeros for slots without an expert.
    """
    num_slots, num_experts = expert_ids.numel(), packed.shape[0]
    is_first = weights is None
    planes = 8 // _bits(packed)
    if num_slots <= MAX_SLOTS:
        return small_batch_quantized_linear(
            inputs,
            expert_ids,
            weights,
            packed,
            scale,
            bias,
            plan,
            in_planes=not is_first and planes == 2,
            out_planes=is_first and planes == 2,
            relu=relu,
        )
    tile = many_slots_tile(num_slots, num_experts, packed, scale, inputs.dtype)
    parts = RowPlan.of(plan, num_slots, num_experts, tile.block_m)
    rows = gather_planes(inputs, parts, num_slots // inputs.shape[0], planes) if is_first else inputs
    return quantized_grouped_linear(
        rows, parts, weights, packed, scale, bias, out_planes=is_first and planes == 2, relu=relu, tile=tile
    )


def _bits(packed: Tensor) -> int:
    return 8 if packed.dtype == torch.int8 else 4


# in eager mode the operator's wrappers would take longer than the kernels
quantized_linear_op = torch.library.custom_op("hf_moe_ted::quantized_linear", quantized_linear, mutates_args=())


@quantized_linear_op.register_fake
def _(inputs: Tensor, expert_ids: Tensor, plan: Tensor, weights: Tensor | None, packed: Tensor, *_: Any) -> Tensor:
    return inputs.new_empty(expert_ids.numel(), packed.shape[1])


def quantized_experts_forward(
    experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, is_relu: bool
) -> Tensor:
    """Experts function for [`QuantizedExperts`], without gradients.

    Args:
        experts: module with `up_proj_packed` int8[E, F, D] or, with 4 bits, uint8[E, F, D / 2], `up_proj_scale`
            float[E, F, G], `up_proj_bias` [E, F], the same of `down_proj`, and `act_fn`; any D and F, scales in
            float32, bfloat16 or float16, on a GPU of compute capability 8.0 or more.
        hidden_TD: float[T, D].
        top_k_index: int64[T, K]; `num_experts` for a slot that no expert computes.
        top_k_weights: float[T, K].
        is_relu: whether `act_fn` is only ReLU. Other functions run between the kernels.

    Returns:
        float[T, D] in the dtype of `hidden_TD`.
    """
    num_tokens, top_k = top_k_index.shape
    if not top_k_index.numel():
        return torch.zeros_like(hidden_TD)
    up, down = (
        [getattr(experts, f"{name}_{kind}") for kind in ("packed", "scale", "bias")]
        for name in ("up_proj", "down_proj")
    )
    num_experts, device_type = up[0].shape[0], hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else up[1].dtype
    is_compiling = torch.compiler.is_compiling()
    functions: tuple[Callable[..., Tensor], ...] = (
        (quantized_linear_op, plan_tiles_op, plan_rows_op)
        if is_compiling
        else (quantized_linear, plan_tiles, plan_rows)
    )
    linear, tiles_of, rows_of = functions
    ids, tokens = top_k_index.contiguous(), hidden_TD.to(dtype).contiguous()
    if ids.numel() <= MAX_SLOTS:
        plan = tiles_of(ids, num_experts)
    else:
        block_m = many_slots_tile(ids.numel(), num_experts, up[0], up[1], dtype).block_m
        plan = rows_of(ids, num_experts, block_m)
    inner = linear(tokens, ids, plan, None, *up, is_relu)
    if not is_relu:
        inner = experts.act_fn(inner)
    output = linear(inner, ids, plan, top_k_weights.contiguous(), *down, False).view(num_tokens, top_k, -1)
    return (output.squeeze(1) if top_k == 1 else output.sum(dim=1)).to(hidden_TD.dtype)


__all__ = ["quantized_experts_forward", "quantized_linear_op"]
