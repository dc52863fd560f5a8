"""Linear top-k routing in Triton kernels: one launch forward and two backward; eager PyTorch needs about forty.

The products include casts, jitter noise, bias, softmax, top-k and the choice of probabilities. `torch.compile` sees
custom operators.

Shape letters: T tokens, K choices per token, E rows of the router, D model width.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor, nn

from . import triton_router
from .device_guard import on_device_of_first

_MAX_EXPERTS = 512
_MAX_TOP_K = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_MAX_SEED = torch.iinfo(torch.int32).max
_WEIGHT_PROGRAMS = 512  # about four for each multiprocessor; a constant, so that all GPUs sum in the same order
_MIN_TOKENS_PER_SPLIT = 256


@dataclass(frozen=True)
class RouterTiles:
    """Sizes of a kernel's tiles: tokens, columns, and rows of the router with padding.

    With these sizes, almost nothing spills out of the registers of a Hopper GPU.
    """

    block_t: int
    block_d: int
    block_e: int
    num_warps: int
    num_stages: int

    @property
    def part_e(self) -> int:
        """Rows of the router that go into one product of `grad_hidden_kernel`."""
        return self.block_e if self.block_e <= 2 * self.block_t else 64

    @functools.cached_property
    def launch(self) -> dict[str, int]:
        """Launch arguments of all kernels."""
        blocks = {"BLOCK_T": self.block_t, "BLOCK_D": self.block_d, "BLOCK_E": self.block_e}
        return {**blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.lru_cache
def route_tiles(num_tokens: int, num_experts: int) -> RouterTiles:
    """Tiles of `route_kernel`, whose programs process a tile of tokens with all experts and columns."""
    block_e = max(16, triton.next_power_of_2(num_experts))
    block_t = _tokens_per_tile(num_tokens, block_e)
    block_d = max(16, min(128 if block_t == 16 else 32, 4096 // block_e))
    return RouterTiles(block_t, block_d, block_e, _num_warps(block_t, block_e), num_stages=3)


@functools.lru_cache
def hidden_tiles(num_tokens: int, num_experts: int) -> RouterTiles:
    """Tiles of `grad_hidden_kernel`, whose programs do the same."""
    block_e = max(16, triton.next_power_of_2(num_experts))
    block_t = _tokens_per_tile(num_tokens, block_e)
    block_d = 64 if block_t == 16 or block_e > 2 * block_t else 32
    return RouterTiles(block_t, block_d, block_e, _num_warps(block_t, block_e), num_stages=2)


@functools.lru_cache
def weight_tiles(num_experts: int) -> RouterTiles:
    """Tiles of `grad_weight_kernel`, whose programs process all experts, some columns and a split of the tokens."""
    block_e = max(16, triton.next_power_of_2(num_experts))
    block_t, block_d = (16, 32) if block_e == 512 else (32, 64)
    return RouterTiles(block_t, block_d, block_e, num_warps=4 if block_e <= 64 else 8, num_stages=3)


def _tokens_per_tile(num_tokens: int, block_e: int) -> int:
    """As many tokens as fit into registers and still give a large GPU about two programs per multiprocessor."""
    most = 128 if block_e <= 64 else 64 if block_e <= 256 else 32
    return min(max(1 << (num_tokens // 256).bit_length() >> 1, 16), most)


def _num_warps(block_t: int, block_e: int) -> int:
    return 8 if block_t == 128 or block_e >= 256 else 4


@on_device_of_first
def route(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, jitter: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Route tokens by the largest of their probabilities.

    Args:
        hidden: float[T, D], contiguous, T at least 1.
        weight: float[E, D], contiguous.
        bias: float[E], *optional*.
        seed: int64[1], *optional*, seed of the noise; without it there is no noise.
        jitter: half width of the noise around 1.
        top_k: K.

    Returns:
        Logits float32[T, E]; the K largest of their softmax float32[T, K], and their experts int64[T, K].
    """
    num_tokens, width = hidden.shape
    num_experts = weight.shape[0]
    logits, probs, choices = _outputs(hidden, num_experts, top_k)
    tiles = route_tiles(num_tokens, num_experts)
    # TF32 represents numbers of half precision exactly
    is_exact = seed is None and hidden.dtype != torch.float32 and weight.dtype != torch.float32
    triton_router.route_kernel[(triton.cdiv(num_tokens, tiles.block_t),)](
        hidden,
        weight,
        bias,
        seed,
        logits,
        probs,
        choices,
        num_tokens,
        width,
        num_experts,
        jitter,
        TOP_K=top_k,
        PRECISION="tf32" if is_exact else "tf32x3",
        **tiles.launch,
    )
    return logits, probs, choices


def _outputs(hidden: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the results of `route`."""
    num_tokens = hidden.shape[0]
    return (
        hidden.new_empty(num_tokens, num_experts, dtype=torch.float32),
        hidden.new_empty(num_tokens, top_k, dtype=torch.float32),
        hidden.new_empty(num_tokens, top_k, dtype=torch.int64),
    )


@on_device_of_first
def route_backward(
    logits: Tensor,
    choices: Tensor,
    grad_logits: Tensor | None,
    grad_probs: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor,
    seed: Tensor | None,
    jitter: float,
    hidden_dtype: torch.dtype,
    hidden_needs_grad: bool,
    weight_needs_grad: bool,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `route` for hidden states, weight and bias; those that are not needed are empty.

    Args:
        grad_logits, grad_probs: contiguous; `None` for zeros.
        hidden: may be `None` if the gradient of the weight is not needed.
    """
    num_tokens, num_experts = logits.shape
    width = weight.shape[1]
    grad_hidden = logits.new_empty((num_tokens, width) if hidden_needs_grad else 0, dtype=hidden_dtype)
    grad_scores = torch.empty_like(logits)
    tiles = hidden_tiles(num_tokens, num_experts)
    triton_router.grad_hidden_kernel[(triton.cdiv(num_tokens, tiles.block_t),)](
        grad_logits,
        grad_probs,
        logits,
        choices,
        weight,
        seed,
        grad_scores,
        grad_hidden if hidden_needs_grad else None,
        num_tokens,
        width,
        num_experts,
        jitter,
        TOP_K=choices.shape[1],
        PART_E=tiles.part_e,
        PRECISION=_gradient_precision(hidden_dtype),
        **tiles.launch,
    )
    if not (weight_needs_grad or bias_needs_grad):
        return grad_hidden, weight.new_empty(0), weight.new_empty(0)
    inputs = hidden if weight_needs_grad else None
    precision = _gradient_precision(hidden_dtype)
    grads = _grad_weight_and_bias(grad_scores, inputs, weight, seed, jitter, bias_needs_grad, precision)
    return grad_hidden, *grads


def _grad_weight_and_bias(
    grad_scores: Tensor,
    hidden: Tensor | None,
    weight: Tensor,
    seed: Tensor | None,
    jitter: float,
    with_bias: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Sums over splits of the tokens, in an order that depends on shapes only; without `hidden`, only for the bias."""
    num_tokens, num_experts = grad_scores.shape
    width = weight.shape[1]
    tiles = weight_tiles(num_experts)
    num_columns = 1 if hidden is None else triton.cdiv(width, tiles.block_d)
    num_splits = max(1, min(_WEIGHT_PROGRAMS // num_columns, num_tokens // _MIN_TOKENS_PER_SPLIT))
    tokens_per_split = triton.cdiv(triton.cdiv(num_tokens, num_splits), tiles.block_t) * tiles.block_t
    dtype = weight.dtype if num_splits == 1 else torch.float32
    grad_weight = weight.new_empty((num_splits, num_experts, width) if hidden is not None else (1, 0), dtype=dtype)
    grad_bias = weight.new_empty((num_splits, num_experts) if with_bias else (1, 0), dtype=dtype)
    triton_router.grad_weight_kernel[(num_columns, num_splits)](
        grad_scores,
        hidden,
        seed,
        None if hidden is None else grad_weight,
        grad_bias if with_bias else None,
        num_tokens,
        tokens_per_split,
        width,
        num_experts,
        jitter,
        PRECISION=precision,
        **tiles.launch,
    )
    return _sum_splits(grad_weight, weight.dtype), _sum_splits(grad_bias, weight.dtype)


def _gradient_precision(hidden_dtype: torch.dtype) -> str:
    """One TF32 product, with three more bits than bfloat16, if hidden states and their gradients are bfloat16."""
    return "tf32" if hidden_dtype == torch.bfloat16 else "tf32x3"


def _sum_splits(sums: Tensor, dtype: torch.dtype) -> Tensor:
    return sums.squeeze(0).to(dtype) if sums.shape[0] == 1 else sums.sum(dim=0).to(dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, _, seed, ctx.jitter, _ = inputs
    logits, _, choices = output
    ctx.mark_non_differentiable(choices)
    ctx.set_materialize_grads(False)
    ctx.hidden_dtype = hidden.dtype
    ctx.save_for_backward(logits, choices, hidden if ctx.needs_input_grad[1] else None, weight, seed)


def _backward(ctx: Any, backward: Any, grad_logits: Tensor | None, grad_probs: Tensor | None) -> tuple[Any, ...]:
    logits, choices, hidden, weight, seed = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    grads = backward(
        logits,
        choices,
        None if grad_logits is None else grad_logits.contiguous(),
        None if grad_probs is None else grad_probs.contiguous(),
        hidden,
        weight,
        seed,
        ctx.jitter,
        ctx.hidden_dtype,
        *needed,
    )
    return *(grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True)), None, None, None


class _Route(torch.autograd.Function):
    """`route` in eager mode, where the operator's wrappers would take longer than the kernels."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = route(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor | None, grad_probs: Tensor | None, _: Any) -> tuple[Any, ...]:
        return _backward(ctx, route_backward, grad_logits, grad_probs)


route_op = torch.library.custom_op("hf_moe_ted::route", route, mutates_args=())
route_backward_op = torch.library.custom_op("hf_moe_ted::route_backward", route_backward, mutates_args=())
route_op.register_autograd(
    lambda ctx, grad_logits, grad_probs, _: _backward(ctx, route_backward_op, grad_logits, grad_probs),
    setup_context=_save_for_backward,
)


@route_op.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, top_k = others
    return _outputs(hidden, weight.shape[0], top_k)


@route_backward_op.register_fake
def _(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, weight, _, _, hidden_dtype, hidden_needs_grad, weight_needs_grad, bias_needs_grad = others
    hidden_shape = (logits.shape[0], weight.shape[1])
    return (
        logits.new_empty(hidden_shape if hidden_needs_grad else 0, dtype=hidden_dtype),
        weight.new_empty(weight.shape if weight_needs_grad else 0),
        weight.new_empty(weight.shape[0] if bias_needs_grad else 0),
    )


def can_fuse_router(router: Any, hidden_states: Tensor) -> bool:
    """Whether the kernels can do what this router would do to these hidden states, float[T, D].

    They cannot if experts are sampled, share rows, or are too many for the registers; if `router_dtype` is not float32;
    for subclasses of tensors (DTensor); and on devices other than NVIDIA GPUs since Ampere.
    """
    is_sampled = router.second_expert_policy == "sampling" or (router.training and router.noise_policy == "rsample")
    weight = router.weight
    return (
        _has_tf32(hidden_states.device)
        and hidden_states.device == weight.device
        and not is_sampled
        and router.expert_map is None
        and router.dtype == torch.float32
        and weight.shape[0] <= _MAX_EXPERTS
        and router.top_k <= _MAX_TOP_K
        and hidden_states.shape[0] > 0
        and type(hidden_states) in _PLAIN_TENSORS
        and type(weight) in _PLAIN_TENSORS
        and hidden_states.dtype in _DTYPES
        and weight.dtype in _DTYPES
    )


def _has_tf32(device: torch.device) -> bool:
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_properties(device).major >= 8


def fused_route(
    hidden_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, top_k: int, jitter_noise: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and the experts of the largest probabilities, in one kernel; gradients for all inputs in two.

    Autocast changes nothing: everything is computed in float32. The seed of the noise is drawn from PyTorch's generator
    on the device; backward makes the same noise again.

    Args:
        hidden_TD: float32, bfloat16 or float16[T, D], T at least 1.
        weight_ED: float32, bfloat16 or float16[E, D], E at most 512.
        bias_E: float[E], *optional*.
        top_k: int, K, at most 8 and at most E.
        jitter_noise: half width of the uniform noise around 1 that hidden states are multiplied by.

    Returns:
        The logits float32[T, E]; the chosen experts' probabilities float32[T, K], largest first; and the chosen experts
        int64[T, K]; of equal probabilities the lower expert comes first.
    """
    seed = torch.randint(_MAX_SEED, (1,), device=hidden_TD.device) if jitter_noise else None
    function = route_op if torch.compiler.is_compiling() else _Route.apply
    return function(hidden_TD.contiguous(), weight_ED.contiguous(), bias_E, seed, jitter_noise, top_k)


__all__ = ["can_fuse_router", "fused_route"]
