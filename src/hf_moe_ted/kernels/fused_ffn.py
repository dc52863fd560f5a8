"""Ungated ReLU experts with biases in Triton kernels: `experts_implementation="zcode_fused"`.

Bias, activation, routing weight and the moves between tokens and rows are part of the matrix products, in backward,
too; nothing waits for the device. `torch.compile` sees the products as custom operators.

Shape letters: T tokens, K slots per token, S = T * K slots, R rows, E experts, D model width, F inner width.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_ffn
from .device_guard import on_device_of_first
from .grouped_ffn import grouped_ffn_experts_forward, parameters_in_dtype_of_products
from .row_plan import RowPlan, plan_rows, plan_rows_op
from .small_batch_ffn import MAX_SLOTS, small_batch_relu_experts, small_batch_relu_experts_op

_GATHER_COLUMNS = 128


@dataclass(frozen=True)
class GemmConfig:
    """Sizes of the grouped products' tiles, and how many programs run at once on a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1


def row_config(num_rows: int, num_experts: int, dtype: torch.dtype) -> GemmConfig:
    """For products of the rows of an expert with its weights."""
    rows_per_expert = num_rows / num_experts
    if dtype == torch.float32:
        return GemmConfig(64 if rows_per_expert > 16 else 16, 64, 32, 4, 3, 2)
    if rows_per_expert <= 16:
        return GemmConfig(16, 64, 128, 4, 4, 2)
    if rows_per_expert <= 48:
        return GemmConfig(64, 256, 64, 4, 4)
    return GemmConfig(128, 256, 64, 8, 4)


def weight_config(dtype: torch.dtype) -> GemmConfig:
    """For gradients of weights."""
    return GemmConfig(64, 64, 32, 4, 3, 2) if dtype == torch.float32 else GemmConfig(128, 128, 32, 4, 5, 2)


def rows_step(block_m: int, dtype: torch.dtype) -> int:
    """Rows of an expert that gradients of its weights take at once."""
    return min(block_m, weight_config(dtype).block_k)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted outputs of experts, `weight * down(relu(up(token)))`.

    Args:
        tokens: float[T, D], contiguous like the others, and of one dtype with up, up_bias, down and down_bias.
        weights: float[T, K].
        up, up_bias, down, down_bias: [E, F, D], [E, F], [E, D, F], [E, D].
        plan: of `plan_rows` with the same `block_m` and `row_multiple`.

    Returns:
        float[T, K, D], the output of each slot, zeros for one without an expert; and for backward float[R, D] and
        float[R, F], inputs and activations by row.
    """
    top_k = weights.shape[1]
    num_experts, inner_width, width = up.shape
    parts = RowPlan.of(plan, weights.numel(), num_experts, block_m, row_multiple)
    output = tokens.new_empty(*weights.shape, width)
    rows = tokens.new_empty(parts.num_rows, width)
    inner = tokens.new_empty(parts.num_rows, inner_width)
    _gather(tokens, parts, top_k, rows=rows, slots_out=output)
    _row_product("up", rows, up, inner, parts, bias=up_bias)
    _row_product("down", inner, down, output, parts, bias=down_bias, weights=weights)
    return output, rows, inner


@on_device_of_first
def relu_experts_backward(
    grad_output: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor,
    rows: Tensor,
    inner: Tensor,
    plan: Tensor,
    block_m: int,
    row_multiple: int,
    weights_need_grad: bool,
    experts_need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `relu_experts` for tokens by slot, weights, up, up_bias, down and down_bias.

    Those that are not needed are empty. Those of experts need a `row_multiple` of `rows_step`.
    """
    num_experts, inner_width, width = up.shape
    num_slots = weights.numel()
    parts = RowPlan.of(plan, num_slots, num_experts, block_m, row_multiple)
    max_tiles = parts.tile_row.numel()
    config = row_config(num_slots, num_experts, up.dtype)
    num_gather_dots = triton.cdiv(width, _GATHER_COLUMNS)
    num_dots = num_gather_dots + triton.cdiv(inner_width, config.block_n) if weights_need_grad else 0
    dots = weights.new_empty(num_dots, num_slots, dtype=torch.float32)
    down_bias_sums = weights.new_empty(max_tiles, width, dtype=torch.float32)
    up_bias_sums = weights.new_empty(max_tiles, inner_width, dtype=torch.float32)

    weighted = torch.empty_like(rows)
    grad_rows = torch.empty_like(rows) if weights_need_grad else weighted
    grad_slots = grad_output.new_empty(*weights.shape, width)
    _gather(
        grad_output,
        parts,
        top_k=1,
        rows=grad_rows,
        slots_out=grad_slots,
        weighted=weighted,
        weights=weights,
        bias=down_bias,
        bias_sums=down_bias_sums,
        dots=dots,
    )
    grad_inner = torch.empty_like(inner)
    _row_product(
        "grad_inner",
        grad_rows,
        down,
        grad_inner,
        parts,
        weights=weights,
        inner=inner,
        bias_sums=up_bias_sums,
        dots=dots[num_gather_dots:],
    )
    _row_product("grad_input", grad_inner, up, grad_slots, parts)
    grad_weights = dots.sum(dim=0).view_as(weights).to(weights.dtype) if weights_need_grad else dots.flatten()
    if not experts_need_grad:
        empty = [up.new_empty(0) for _ in range(4)]
        return grad_slots, grad_weights, empty[0], empty[1], empty[2], empty[3]
    grad_up, grad_up_bias = _weight_product(grad_inner, rows, parts), _sum_tiles(up_bias_sums, parts, up.dtype)
    grad_down, grad_down_bias = _weight_product(weighted, inner, parts), _sum_tiles(down_bias_sums, parts, up.dtype)
    return grad_slots, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weights, up, _, down, down_bias, plan, ctx.block_m, ctx.row_multiple = inputs
    _, rows, inner = output
    ctx.mark_non_differentiable(rows, inner)
    ctx.set_materialize_grads(False)  # or there would be zeros of the size of `rows` and `inner`
    ctx.save_for_backward(weights, up, down, down_bias, rows, inner, plan)


def _backward(ctx: Any, backward: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    weights, up, down, down_bias, rows, inner, plan = ctx.saved_tensors
    _, weights_need_grad, *experts_need_grad = ctx.needs_input_grad[:6]
    grad_slots, grad_weights, *grads = backward(
        grad_output.contiguous(),
        weights,
        up,
        down,
        down_bias,
        rows,
        inner,
        plan,
        ctx.block_m,
        ctx.row_multiple,
        weights_need_grad,
        any(experts_need_grad),
    )
    return (
        grad_slots.sum(dim=1) if grad_slots.shape[1] > 1 else grad_slots.squeeze(1),
        grad_weights if weights_need_grad else None,
        *(grad if needed else None for grad, needed in zip(grads, experts_need_grad, strict=True)),
        None,
        None,
        None,
    )


class _ReluExperts(torch.autograd.Function):
    """`relu_experts` in eager mode, where the operator's wrappers would take longer than the kernels."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = relu_experts(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
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
def _(
    tokens: Tensor,
    weights: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    plan: Tensor,
    block_m: int,
    row_multiple: int,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, width = RowPlan.max_rows(weights.numel(), up.shape[0], row_multiple), tokens.shape[1]
    return (
        tokens.new_empty(*weights.shape, width),
        tokens.new_empty(num_rows, width),
        tokens.new_empty(num_rows, up.shape[1]),
    )


@relu_experts_backward_op.register_fake
def _(
    grad_output: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor,
    rows: Tensor,
    inner: Tensor,
    plan: Tensor,
    block_m: int,
    row_multiple: int,
    weights_need_grad: bool,
    experts_need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_slots = grad_output.new_empty(*weights.shape, up.shape[2])
    grad_weights = torch.empty_like(weights) if weights_need_grad else weights.new_empty(0, dtype=torch.float32)
    if not experts_need_grad:
        empty = [up.new_empty(0) for _ in range(4)]
        return grad_slots, grad_weights, empty[0], empty[1], empty[2], empty[3]
    grad_up, grad_up_bias = torch.empty_like(up), up.new_empty(up.shape[:2])
    return grad_slots, grad_weights, grad_up, grad_up_bias, torch.empty_like(down), torch.empty_like(down_bias)


def _gather(
    tokens: Tensor,
    plan: RowPlan,
    top_k: int,
    *,
    rows: Tensor,
    slots_out: Tensor,
    weighted: Tensor | None = None,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    bias_sums: Tensor | None = None,
    dots: Tensor | None = None,
) -> None:
    width = tokens.shape[-1]
    num_dots = 0 if dots is None else dots.shape[0]
    grid = (plan.tile_row.numel(), triton.cdiv(width, _GATHER_COLUMNS))
    triton_ffn.gather_rows_kernel[grid](
        tokens,
        rows,
        weighted,
        slots_out,
        weights,
        bias,
        bias_sums,
        dots,
        plan.order,
        plan.offsets,
        plan.row_ends,
        plan.tile_ends,
        plan.tile_expert,
        plan.tile_row,
        width,
        plan.num_slots,
        plan.num_experts,
        num_dots,
        TOP_K=top_k,
        WEIGHTED=weighted is not None,
        DOTS=num_dots > 0,
        BLOCK_M=plan.block_m,
        BLOCK_N=_GATHER_COLUMNS,
        num_warps=8 if plan.block_m > 64 else 4,
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
    inner: Tensor | None = None,
    bias_sums: Tensor | None = None,
    dots: Tensor | None = None,
) -> None:
    config = row_config(plan.num_slots, plan.num_experts, a.dtype)
    is_transposed = kind in ("up", "down")
    num_columns = b.shape[1] if is_transposed else b.shape[2]
    b_block = [config.block_n, config.block_k] if is_transposed else [config.block_k, config.block_n]
    num_programs = _num_multiprocessors(a.device) * config.programs_per_sm
    triton_ffn.grouped_gemm_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(a, [plan.block_m, config.block_k]),
        TensorDescriptor.from_tensor(b, [1, *b_block]),
        out,
        bias,
        weights,
        None if inner is None else TensorDescriptor.from_tensor(inner, [plan.block_m, config.block_n // 2]),
        bias_sums,
        dots,
        plan.order,
        plan.offsets,
        plan.row_ends,
        plan.tile_ends,
        plan.tile_expert,
        plan.tile_row,
        num_columns,
        a.shape[1],
        plan.num_slots,
        plan.num_experts,
        KIND=kind,
        DOTS=dots is not None and dots.numel() > 0,
        TRANSPOSED_B=is_transposed,
        BLOCK_M=plan.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_PROGRAMS=num_programs,
        PRECISION="ieee",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _weight_product(a: Tensor, b: Tensor, plan: RowPlan) -> Tensor:
    config = weight_config(a.dtype)
    out = a.new_empty(plan.num_experts, a.shape[1], b.shape[1])
    num_programs = _num_multiprocessors(a.device) * config.programs_per_sm
    triton_ffn.grad_weight_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(a, [plan.row_multiple, config.block_m]),
        TensorDescriptor.from_tensor(b, [plan.row_multiple, config.block_n]),
        out,
        plan.offsets,
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
    return out


def _sum_tiles(sums: Tensor, plan: RowPlan, dtype: torch.dtype) -> Tensor:
    out = sums.new_empty(plan.num_experts, sums.shape[1], dtype=dtype)
    grid = (plan.num_experts, triton.cdiv(sums.shape[1], 128))
    triton_ffn.sum_tiles_kernel[grid](sums, out, plan.tile_ends, sums.shape[1], BLOCK_N=128, STEP=16)
    return out


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    """4 where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def can_fuse(experts: Any, hidden_states: Tensor) -> bool:
    """Whether the kernels can run these experts: ReLU without dropout, widths in steps of 8, a device with TMA."""
    activation = experts.act_fn
    has_dropout = activation.training and getattr(activation, "dropout", 0.0) > 0.0
    is_relu = isinstance(getattr(activation, "activation", activation), torch.nn.ReLU)
    _, inner_width, width = experts.up_proj.shape
    return (
        is_relu
        and not has_dropout
        and inner_width % 8 == width % 8 == 0
        and hidden_states.shape[0] > 0
        and _has_tma(hidden_states.device)
    )


def _has_tma(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (9, 0)
    return triton.knobs.runtime.interpret


def fused_ffn_experts_forward(experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts function under the contract of transformers, for experts without a gate and with biases.

    Runs `zcode_grouped` where the kernels cannot: another activation, dropout inside the experts, widths that are no
    multiples of 8, CPUs, and GPUs before Hopper. Few slots without gradients take the kernels of small_batch_ffn.py.

    Args:
        experts: module with `up_proj` [E, F, D], `up_proj_bias` [E, F], `down_proj` [E, D, F], `down_proj_bias` [E, D],
            `act_fn`, `num_experts`, in float32, bfloat16 or float16.
        hidden_TD: float[T, D].
        top_k_index: int64[T, K]; `num_experts` for a slot that no expert computes.
        top_k_weights: float[T, K].

    Returns:
        float[T, D].
    """
    if not can_fuse(experts, hidden_TD):
        return grouped_ffn_experts_forward(experts, hidden_TD, top_k_index, top_k_weights)
    parameters = parameters_in_dtype_of_products(experts)
    inputs = [x.contiguous() for x in (hidden_TD.to(parameters[0].dtype), top_k_weights, *parameters)]
    num_slots = top_k_index.numel()
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    is_compiling = torch.compiler.is_compiling()
    if num_slots <= MAX_SLOTS and not needs_gradient:
        small_batch = small_batch_relu_experts_op if is_compiling else small_batch_relu_experts
        output_TKD = small_batch(top_k_index.contiguous(), *inputs)
    else:
        block_m = row_config(num_slots, experts.num_experts, inputs[0].dtype).block_m
        experts_need_gradient = needs_gradient and any(x.requires_grad for x in parameters)
        row_multiple = rows_step(block_m, inputs[0].dtype) if experts_need_gradient else 1
        plan_function, experts_function = (
            (plan_rows_op, relu_experts_op) if is_compiling else (plan_rows, _ReluExperts.apply)
        )
        plan = plan_function(top_k_index, experts.num_experts, block_m, row_multiple)
        output_TKD, _, _ = experts_function(*inputs, plan, block_m, row_multiple)
    output_TD = output_TKD.squeeze(1) if output_TKD.shape[1] == 1 else output_TKD.sum(dim=1)
    return output_TD.to(hidden_TD.dtype)


__all__ = ["can_fuse", "fused_ffn_experts_forward"]
