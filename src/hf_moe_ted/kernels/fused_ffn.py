"""Ungated ReLU experts with biases in Triton kernels: `experts_implementation="zcode_fused"`.

The matrix products include bias, activation, routing weight and the move from rows to slots. In backward the gather
also computes gradients of routing weights, and the products for weights also compute gradients of biases. Nothing waits
for the device. `torch.compile` sees the products as custom operators.

Shape letters: T tokens, K slots per token, S = T * K slots, R rows, E experts, D model width, F inner width.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_ffn
from .device_guard import on_device_of_first
from .grouped_ffn import grouped_ffn_experts_forward, parameters_in_dtype_of_products
from .row_plan import RowPlan, plan_rows, plan_rows_op
from .small_batch_ffn import MAX_SLOTS, MAX_SLOTS_COMPILED, small_batch_relu_experts, small_batch_relu_experts_op

_GATHER_ROWS, _GATHER_COLUMNS = 16, 512


@dataclass(frozen=True)
class GemmConfig:
    """Sizes of the grouped products' tiles, and how many programs run at once on a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1


# For 16-bit products: tiles for at most 16 rows of an expert, for at most 48, and for more. If a program does not have
# 227 KiB of shared memory, as on a Hopper, tiles use at most 99 KiB (compute capability 8.6, 8.9, 12.0, and also 8.0,
# which has 163).
_ROW_CONFIGS = GemmConfig(16, 64, 128, 4, 4, 2), GemmConfig(64, 256, 64, 4, 4), GemmConfig(128, 256, 64, 8, 4)
_ROW_CONFIGS_OF_99_KIB = GemmConfig(16, 64, 128, 4, 4), GemmConfig(64, 128, 64, 4, 3), GemmConfig(128, 128, 64, 8, 3)


def row_config(num_rows: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> GemmConfig:
    """Tiles for products of an expert's rows with its weights."""
    rows_per_expert = num_rows / num_experts
    if dtype == torch.float32:
        return GemmConfig(64 if rows_per_expert > 16 else 16, 64, 32, 4, 3, 2)
    configs = _ROW_CONFIGS if has_much_shared_memory(device) else _ROW_CONFIGS_OF_99_KIB
    return configs[0] if rows_per_expert <= 16 else configs[1] if rows_per_expert <= 48 else configs[2]


def weight_config(dtype: torch.dtype, device: torch.device) -> GemmConfig:
    """Tiles for gradients of weights."""
    if dtype == torch.float32:
        return GemmConfig(64, 64, 32, 4, 3, 2)
    return GemmConfig(128, 128, 32, 4, 5, 2) if has_much_shared_memory(device) else GemmConfig(128, 128, 32, 8, 4)


def rows_step(block_m: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of an expert that the gradient of its weights processes at once."""
    return min(block_m, weight_config(dtype, device).block_k)


@on_device_of_first
def relu_experts(
    tokens: Tensor,
    weights: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    plan: Tensor,
    block_m: int,
    row_multiple: int,
    weights_need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted outputs of experts, `weight * down(relu(up(token)))`.

    Args:
        tokens: float[T, D], contiguous like the others, and of one dtype with up, up_bias, down and down_bias.
        weights: float[T, K].
        up, up_bias, down, down_bias: [E, F, D], [E, F], [E, D, F], [E, D].
        plan: what `plan_rows` returned for the same `block_m` and `row_multiple`.

    Returns:
        float[T, K, D], the output of each slot, zeros without an expert. For backward: inputs float[R, D] and
        activations float[R, F] by row, and float[T, K, D], the outputs of slots with an expert before they are
        weighted; empty unless weights need a gradient.
    """
    parts = RowPlan.of(plan, weights.numel(), up.shape[0], block_m, row_multiple)
    output, rows, inner, unweighted = _outputs(tokens, weights, up, row_multiple, weights_need_grad)
    _gather(tokens, parts, weights.shape[1], rows=rows, slots_out=output)
    _row_product("up", rows, up, inner, parts, bias=up_bias)
    _row_product(
        "down",
        inner,
        down,
        output,
        parts,
        bias=down_bias,
        weights=weights,
        unweighted=unweighted if weights_need_grad else None,
    )
    return output, rows, inner, unweighted


def _outputs(
    tokens: Tensor, weights: Tensor, up: Tensor, row_multiple: int, weights_need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the results of `relu_experts`."""
    num_experts, inner_width, width = up.shape
    num_rows = RowPlan.max_rows(weights.numel(), num_experts, row_multiple)
    output = tokens.new_empty(*weights.shape, width)
    return (
        output,
        tokens.new_empty(num_rows, width),
        tokens.new_empty(num_rows, inner_width),
        torch.empty_like(output) if weights_need_grad else output.new_empty(0),
    )


@on_device_of_first
def relu_experts_backward(
    grad_output: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    rows: Tensor,
    inner: Tensor,
    unweighted: Tensor,
    plan: Tensor,
    block_m: int,
    row_multiple: int,
    experts_need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `relu_experts` for tokens by slot, weights, up, up_bias, down and down_bias.

    Gradients that are not needed are empty. Gradients of experts need a `row_multiple` of `rows_step`.
    """
    num_experts, _, width = up.shape
    num_slots = weights.numel()
    parts = RowPlan.of(plan, num_slots, num_experts, block_m, row_multiple)
    weights_need_grad = unweighted.numel() > 0
    grad_weights = torch.empty_like(weights) if weights_need_grad else weights.new_empty(0)
    weighted = torch.empty_like(rows)
    grad_slots = grad_output.new_empty(*weights.shape, width)
    _gather(
        grad_output,
        parts,
        1,
        rows=weighted,
        slots_out=grad_slots,
        weights=weights,
        unweighted=unweighted if weights_need_grad else None,
        grad_weights=grad_weights,
    )
    grad_inner = torch.empty_like(inner)
    _row_product("grad_inner", weighted, down, grad_inner, parts, inner=inner)
    _row_product("grad_input", grad_inner, up, grad_slots, parts)
    if not experts_need_grad:
        return grad_slots, grad_weights, *_no_gradients(up)
    grad_up, grad_up_bias = _weight_product(grad_inner, rows, parts)
    del grad_inner  # free memory for the next results
    grad_down, grad_down_bias = _weight_product(weighted, inner, parts)
    return grad_slots, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias


def _no_gradients(up: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty gradients of experts that need none; the results of an operator must not share memory."""
    return up.new_empty(0), up.new_empty(0), up.new_empty(0), up.new_empty(0)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, weights, up, _, down, _, plan, ctx.block_m, ctx.row_multiple, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else there would be zeros as large as the kept tensors
    ctx.save_for_backward(weights, up, down, *kept, plan)


def _backward(ctx: Any, backward: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    _, weights_need_grad, *experts_need_grad = ctx.needs_input_grad[:6]
    grad_slots, grad_weights, *grads = backward(
        grad_output.contiguous(), *ctx.saved_tensors, ctx.block_m, ctx.row_multiple, any(experts_need_grad)
    )
    return (
        grad_slots.sum(dim=1) if grad_slots.shape[1] > 1 else grad_slots.squeeze(1),
        grad_weights if weights_need_grad else None,
        *(grad if needed else None for grad, needed in zip(grads, experts_need_grad, strict=True)),
        *[None] * 4,
    )


class _ReluExperts(torch.autograd.Function):
    """`relu_experts` in eager mode, where the operator's wrappers would take longer than the kernels."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = relu_experts(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, relu_experts_backward, grad_output)


relu_experts_op = torch.library.custom_op("hf_moe_ted::relu_experts", relu_experts, mutates_args=())
relu_experts_backward_op = torch.library.custom_op(
    "hf_moe_ted::relu_experts_backward", relu_experts_backward, mutates_args=()
)
relu_experts_op.register_autograd(
    lambda ctx, grad_output, *_: _backward(ctx, relu_experts_backward_op, grad_output),
    setup_context=_save_for_backward,
)


@relu_experts_op.register_fake
def _(tokens: Tensor, weights: Tensor, up: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, row_multiple, weights_need_grad = others
    return _outputs(tokens, weights, up, row_multiple, weights_need_grad)


@relu_experts_backward_op.register_fake
def _(grad_output: Tensor, weights: Tensor, up: Tensor, down: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, _, unweighted, *_, experts_need_grad = others
    grad_slots = grad_output.new_empty(*weights.shape, up.shape[2])
    grad_weights = torch.empty_like(weights) if unweighted.numel() else weights.new_empty(0)
    if not experts_need_grad:
        return grad_slots, grad_weights, *_no_gradients(up)
    grad_up, grad_up_bias = torch.empty_like(up), up.new_empty(up.shape[:2])
    return grad_slots, grad_weights, grad_up, grad_up_bias, torch.empty_like(down), down.new_empty(down.shape[:2])


def _gather(
    tokens: Tensor,
    plan: RowPlan,
    top_k: int,
    *,
    rows: Tensor,
    slots_out: Tensor,
    weights: Tensor | None = None,
    unweighted: Tensor | None = None,
    grad_weights: Tensor | None = None,
) -> None:
    block_m = min(plan.block_m, _GATHER_ROWS)
    triton_ffn.gather_rows_kernel[(plan.tile_row.numel(), plan.block_m // block_m)](
        tokens,
        rows,
        slots_out,
        weights,
        unweighted,
        grad_weights,
        *plan.of_rows_and_tiles,
        tokens.shape[-1],
        plan.num_experts,
        TOP_K=top_k,
        BLOCK_M=block_m,
        BLOCK_N=_GATHER_COLUMNS,
    )


def _row_product(
    kind: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    plan: RowPlan,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    unweighted: Tensor | None = None,
    inner: Tensor | None = None,
) -> None:
    config = row_config(plan.num_slots, plan.num_experts, a.dtype, a.device)
    is_transposed = kind in ("up", "down")
    num_columns = b.shape[1] if is_transposed else b.shape[2]
    b_block = [config.block_n, config.block_k] if is_transposed else [config.block_k, config.block_n]
    num_programs = num_multiprocessors(a.device) * config.programs_per_sm
    triton_ffn.grouped_gemm_kernel[(num_programs,)](
        _described(a, [plan.block_m, config.block_k]),
        _described(b, [1, *b_block]),
        out,
        unweighted,
        bias,
        weights,
        None if inner is None else _described(inner, [plan.block_m, config.block_n // 2]),
        None if has_tma(a.device) else a.shape[0],
        *plan.of_rows_and_tiles,
        num_columns,
        a.shape[1],
        plan.num_experts,
        KIND=kind,
        TRANSPOSED_B=is_transposed,
        BLOCK_M=plan.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_PROGRAMS=num_programs,
        PRECISION="ieee",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _weight_product(a: Tensor, b: Tensor, plan: RowPlan) -> tuple[Tensor, Tensor]:
    """`a.T @ b` of the rows of each expert, [E, A, B], and sums of its rows of `a`, [E, A]."""
    config = weight_config(a.dtype, a.device)
    out, sums = a.new_empty(plan.num_experts, a.shape[1], b.shape[1]), a.new_empty(plan.num_experts, a.shape[1])
    num_programs = num_multiprocessors(a.device) * config.programs_per_sm
    triton_ffn.grad_weight_kernel[(num_programs,)](
        _described(a, [plan.row_multiple, config.block_m]),
        _described(b, [plan.row_multiple, config.block_n]),
        out,
        sums,
        plan.offsets,
        None if has_tma(a.device) else a.shape[0],
        a.shape[1],
        b.shape[1],
        plan.num_experts,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=plan.row_multiple,
        NUM_PROGRAMS=num_programs,
        PRECISION="ieee",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, sums


def _described(tensor: Tensor, block: list[int]) -> TensorDescriptor | Tensor:
    """The argument for a tensor that kernels read by blocks: a descriptor; without TMA, kernels make their own."""
    return TensorDescriptor.from_tensor(tensor, block) if has_tma(tensor.device) else tensor


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; 9.0, a Hopper's, if the kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def has_tma(device: torch.device) -> bool:
    return _capability(device) >= (9, 0)


def has_much_shared_memory(device: torch.device) -> bool:
    return (9, 0) <= _capability(device) < (12, 0)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 4 if the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def fused_ffn_experts_forward(experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts function under the contract of transformers, for experts without a gate and with biases.

    For few slots without gradients it uses the kernels of small_batch_ffn.py.

    Args:
        experts: module with `up_proj` [E, F, D], `up_proj_bias` [E, F], `down_proj` [E, D, F], `down_proj_bias` [E, D],
            `num_experts`, in float32, bfloat16 or float16, on a GPU of compute capability 8.0 or more; D and F
            multiples of 8. Their activation is ReLU, without dropout.
        hidden_TD: float[T, D].
        top_k_index: int64[T, K]; `num_experts` for a slot that no expert computes.
        top_k_weights: float[T, K].

    Returns:
        float[T, D].
    """
    if hidden_TD.shape[0] == 0:
        return grouped_ffn_experts_forward(experts, hidden_TD, top_k_index, top_k_weights)
    parameters = parameters_in_dtype_of_products(experts)
    inputs = [x.contiguous() for x in (hidden_TD.to(parameters[0].dtype), top_k_weights, *parameters)]
    num_slots = top_k_index.numel()
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    is_compiling = torch.compiler.is_compiling()
    if num_slots <= (MAX_SLOTS_COMPILED if is_compiling else MAX_SLOTS) and not needs_gradient:
        small_batch = small_batch_relu_experts_op if is_compiling else small_batch_relu_experts
        output_TKD = small_batch(top_k_index.contiguous(), *inputs)
    else:
        dtype, device = inputs[0].dtype, inputs[0].device
        block_m = row_config(num_slots, experts.num_experts, dtype, device).block_m
        experts_need_gradient = needs_gradient and any(x.requires_grad for x in parameters)
        row_multiple = rows_step(block_m, dtype, device) if experts_need_gradient else 1
        plan_function, experts_function = (
            (plan_rows_op, relu_experts_op) if is_compiling else (plan_rows, _ReluExperts.apply)
        )
        plan = plan_function(top_k_index, experts.num_experts, block_m, row_multiple)
        weights_need_gradient = needs_gradient and inputs[1].requires_grad
        output_TKD, *_ = experts_function(*inputs, plan, block_m, row_multiple, weights_need_gradient)
    output_TD = output_TKD.squeeze(1) if output_TKD.shape[1] == 1 else output_TKD.sum(dim=1)
    return output_TD.to(hidden_TD.dtype)


__all__ = ["fused_ffn_experts_forward"]
