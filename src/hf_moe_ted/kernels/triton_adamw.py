"""Triton kernels over all tensors of an optimizer at once: squares of gradients, and a step of AdamW that clips.

Tensors are cut into chunks of `CHUNK` elements, with one program each. A table on the device has their addresses, so
one launch reaches all tensors of one dtype.

Letters: N tensors, C chunks.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# rows of the table of addresses, int64[5, N]
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, STEP = (tl.constexpr(row) for row in range(5))
# columns of the table of each tensor's numbers, float32[N, 6]
STEP_SIZE, CORRECTION, DECAY, BETA1, BETA2, EPS = (tl.constexpr(column) for column in range(6))


@triton.jit(do_not_specialize=["num_tensors"])
def count_steps_kernel(addresses, groups, group_options, numbers, num_tensors, BLOCK: tl.constexpr):
    """Counts one more update of each tensor, and computes the numbers that all its elements share.

    Args:
        addresses: int64[5, N].
        groups: int32[N], the group of each tensor.
        group_options: float32[groups, 5], their learning rate, weight decay, betas and eps.
        numbers: float32[N, 6], out. Powers are computed in float64, because 1 - beta2^step has few digits in the first
            steps.
    """
    tensors = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = tensors < num_tensors
    steps = tl.load(addresses + STEP * num_tensors + tensors, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(steps, mask=mask, other=0.0) + 1.0
    tl.store(steps, step, mask=mask)

    options = group_options + tl.load(groups + tensors, mask=mask, other=0) * 5
    lr = tl.load(options, mask=mask, other=0.0)
    weight_decay = tl.load(options + 1, mask=mask, other=0.0)
    beta1 = tl.load(options + 2, mask=mask, other=0.5)
    beta2 = tl.load(options + 3, mask=mask, other=0.5)
    eps = tl.load(options + 4, mask=mask, other=0.0)
    correction1 = (1.0 - tl.exp(step.to(tl.float64) * tl.log(beta1.to(tl.float64)))).to(tl.float32)
    correction2 = (1.0 - tl.exp(step.to(tl.float64) * tl.log(beta2.to(tl.float64)))).to(tl.float32)

    row = numbers + tensors * 6
    tl.store(row + STEP_SIZE, tl.div_rn(lr, correction1), mask=mask)
    tl.store(row + CORRECTION, tl.sqrt_rn(correction2), mask=mask)
    tl.store(row + DECAY, lr * weight_decay, mask=mask)
    tl.store(row + BETA1, beta1, mask=mask)
    tl.store(row + BETA2, beta2, mask=mask)
    tl.store(row + EPS, eps, mask=mask)


@triton.jit(do_not_specialize=["first_chunk", "num_tensors"])
def adamw_kernel(
    addresses,
    numels,
    numbers,
    chunk_tensors,
    chunk_places,
    factor,
    first_chunk,
    num_tensors,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EXACT: tl.constexpr,
):
    """A step of AdamW for one chunk; gradients are multiplied by `factor` when read, and do not change in memory.

    Args:
        numels: int64[N].
        numbers: float32[N, 6], from `count_steps_kernel`.
        chunk_tensors, chunk_places: int32[C], the tensor of each chunk, and the index among its chunks.
        factor: float32 scalar.
        first_chunk: the first chunk of this dtype.
        IS_EXACT: whether root and quotients are rounded as in IEEE 754, or only to some units of float32's last place,
            which dtypes with fewer digits do not show.
    """
    chunk = first_chunk + tl.program_id(0)
    tensor = tl.load(chunk_tensors + chunk)
    start = tl.load(chunk_places + chunk).to(tl.int64) * CHUNK
    remaining = tl.load(numels + tensor) - start
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    row = addresses + tensor
    param = tl.load(row + PARAM * num_tensors) + start * SIZE
    grad = tl.load(row + GRAD * num_tensors) + start * SIZE
    exp_avg = tl.load(row + EXP_AVG * num_tensors) + start * SIZE
    exp_avg_sq = tl.load(row + EXP_AVG_SQ * num_tensors) + start * SIZE
    own = numbers + tensor * 6
    scale = tl.load(factor)
    step_size, correction, decay = tl.load(own + STEP_SIZE), tl.load(own + CORRECTION), tl.load(own + DECAY)
    beta1, beta2, eps = tl.load(own + BETA1), tl.load(own + BETA2), tl.load(own + EPS)
    is_aligned = ((param | grad | exp_avg | exp_avg_sq) & 15) == 0
    if is_aligned & (remaining >= CHUNK):
        for first in range(0, CHUNK, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            params, grads = _aligned(param, DTYPE) + offsets, _aligned(grad, DTYPE) + offsets
            exp_avgs, exp_avg_sqs = _aligned(exp_avg, DTYPE) + offsets, _aligned(exp_avg_sq, DTYPE) + offsets
            _update(
                params, grads, exp_avgs, exp_avg_sqs, None, scale, step_size, correction, decay, beta1, beta2, eps,
                DTYPE, IS_EXACT,
            )  # fmt: skip
    else:
        # one element after the other, so that it needs no more registers than the code above
        PART: tl.constexpr = BLOCK // 8
        last = tl.minimum(remaining, CHUNK).to(tl.int32)
        for first in range(0, last, PART):
            offsets = first + tl.arange(0, PART)
            params, grads = _pointer(param, DTYPE) + offsets, _pointer(grad, DTYPE) + offsets
            exp_avgs, exp_avg_sqs = _pointer(exp_avg, DTYPE) + offsets, _pointer(exp_avg_sq, DTYPE) + offsets
            _update(
                params, grads, exp_avgs, exp_avg_sqs, offsets < last, scale, step_size, correction, decay, beta1,
                beta2, eps, DTYPE, IS_EXACT,
            )  # fmt: skip


@triton.jit
def _update(
    params, grads, exp_avgs, exp_avg_sqs, mask, scale, step_size, correction, decay, beta1, beta2, eps,
    DTYPE: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """The arithmetic of PyTorch's fused AdamW, in its order (aten/src/ATen/native/cuda/fused_adam_utils.cuh)."""
    param = tl.load(params, mask=mask).to(tl.float32)
    grad = tl.load(grads, mask=mask).to(tl.float32) * scale
    exp_avg = tl.load(exp_avgs, mask=mask).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sqs, mask=mask).to(tl.float32)
    param = tl.fma(-decay, param, param)
    exp_avg = tl.fma(beta1, exp_avg, tl.fma(-beta1, grad, grad))
    exp_avg_sq = tl.fma(beta2, exp_avg_sq, tl.fma(-beta2, grad * grad, grad * grad))
    if IS_EXACT:
        param -= tl.div_rn(step_size * exp_avg, tl.div_rn(tl.sqrt_rn(exp_avg_sq), correction) + eps)
    else:
        param -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) / correction + eps)
    tl.store(params, param.to(DTYPE), mask=mask)
    tl.store(exp_avgs, exp_avg.to(DTYPE), mask=mask)
    tl.store(exp_avg_sqs, exp_avg_sq.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["first_chunk"])
def squares_kernel(
    addresses,
    numels,
    weights,
    chunk_tensors,
    chunk_places,
    sums,
    first_chunk,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The sum of the squares of a chunk, in float32, times the weight of its tensor.

    Args:
        addresses: int64[N].
        weights: float32[N].
        sums: float32[C], out.
    """
    chunk = first_chunk + tl.program_id(0)
    tensor = tl.load(chunk_tensors + chunk)
    start = tl.load(chunk_places + chunk).to(tl.int64) * CHUNK
    remaining = tl.load(numels + tensor) - start
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    address = tl.load(addresses + tensor) + start * SIZE
    offsets = tl.arange(0, CHUNK)
    if ((address & 15) == 0) & (remaining >= CHUNK):
        values = tl.load(_aligned(address, DTYPE) + offsets).to(tl.float32)
    else:
        values = tl.load(_pointer(address, DTYPE) + offsets, mask=offsets < remaining, other=0.0).to(tl.float32)
    tl.store(sums + chunk, tl.sum(values * values, axis=0) * tl.load(weights + tensor))


@triton.jit
def _pointer(address, DTYPE: tl.constexpr):
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def _aligned(address, DTYPE: tl.constexpr):
    """A pointer that is a multiple of 16 bytes, so that loads and stores are 16 bytes wide."""
    # the hint marks this conversion, and would be lost on the result of a function
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


__all__ = ["adamw_kernel", "count_steps_kernel", "squares_kernel"]
