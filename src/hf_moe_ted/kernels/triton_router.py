"""Triton kernels of a linear top-k router: one for logits, softmax and choices, and two for gradients.

A product of float32 numbers is computed as three TF32 products (`PRECISION`), about as exact as float32. Each element
is written by one program, in one order, so results are the same in every run.

Shape letters: T tokens, K choices per token, E rows of the router, D model width.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    hidden,
    weight,
    bias,
    seed,
    logits_out,
    probs_out,
    choices_out,
    num_tokens,
    width,
    num_experts,
    jitter,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of a tile of tokens, the `TOP_K` largest probabilities of their softmax, and their experts.

    Of equal probabilities the lower expert comes first. A row with NaN has NaN probabilities and chooses the first
    experts.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    is_token = tokens < num_tokens
    is_expert = experts < num_experts
    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(0, width, BLOCK_D):
        inputs = _load_inputs(hidden, seed, jitter, tokens, is_token, first, width, BLOCK_T, BLOCK_D)
        rows = _load_weight(weight, experts, num_experts, first, width, BLOCK_D)
        # the limit makes each tile's products be summed separately and then added, because tensor cores truncate
        # running sums
        logits += tl.dot(inputs, rows.T, input_precision=PRECISION, max_num_imprecise_acc=BLOCK_D)
    if bias is not None:
        logits += tl.load(bias + experts, mask=is_expert, other=0.0).to(tl.float32)[None, :]
    offsets = tokens.to(tl.int64)[:, None] * num_experts + experts[None, :]
    tl.store(logits_out + offsets, logits, mask=is_token[:, None] & is_expert[None, :])

    probs, total = _softmax(logits, is_expert)
    # padding is below any probability, so that NaN cannot make it a choice
    scores = tl.where(is_expert[None, :], tl.where(probs >= 0.0, probs, 0.0), -1.0)
    slots = tokens.to(tl.int64) * TOP_K
    for k in tl.static_range(TOP_K):
        best, choice = tl.max(scores, axis=1, return_indices=True)
        tl.store(probs_out + slots + k, tl.where(total == total, best, total), mask=is_token)
        tl.store(choices_out + slots + k, choice.to(tl.int64), mask=is_token)
        scores = tl.where(experts[None, :] == choice[:, None], -2.0, scores)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["grad_probs"])
def grad_hidden_kernel(
    grad_logits,
    grad_probs,
    logits,
    choices,
    weight,
    seed,
    grad_scores,
    grad_hidden,
    num_tokens,
    width,
    num_experts,
    jitter,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PART_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`grad_scores`, the whole gradient of the logits with the part from the softmax, and the gradient of the inputs.

    `None` means zeros for `grad_logits` or `grad_probs`, and not needed for `grad_hidden`. More than `PART_E` experts
    are too many for the registers of a product; then they are read again from `grad_scores`.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    is_token = tokens < num_tokens
    is_expert = experts < num_experts
    mask = is_token[:, None] & is_expert[None, :]
    offsets = tokens.to(tl.int64)[:, None] * num_experts + experts[None, :]
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if grad_logits is not None:
        grad += tl.load(grad_logits + offsets, mask=mask, other=0.0)
    if grad_probs is not None:
        probs, _ = _softmax(tl.load(logits + offsets, mask=mask, other=0.0), is_expert)
        grad_chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        slots = tokens.to(tl.int64) * TOP_K
        for k in tl.static_range(TOP_K):
            choice = tl.load(choices + slots + k, mask=is_token, other=0).to(tl.int32)
            grad_prob = tl.load(grad_probs + slots + k, mask=is_token, other=0.0)
            grad_chosen += tl.where(experts[None, :] == choice[:, None], grad_prob[:, None], 0.0)
        grad += probs * (grad_chosen - tl.sum(probs * grad_chosen, axis=1)[:, None])
    tl.store(grad_scores + offsets, grad, mask=mask)
    if grad_hidden is not None:
        IN_PARTS: tl.constexpr = BLOCK_E > PART_E
        if IN_PARTS:
            tl.debug_barrier()  # from here on, threads read what other threads stored
        for first in range(0, width, BLOCK_D):
            if IN_PARTS:
                product = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
                for first_expert in range(0, num_experts, PART_E):
                    part = first_expert + tl.arange(0, PART_E)
                    part_offsets = tokens.to(tl.int64)[:, None] * num_experts + part[None, :]
                    part_mask = is_token[:, None] & (part < num_experts)[None, :]
                    part_grad = tl.load(grad_scores + part_offsets, mask=part_mask, other=0.0)
                    rows = _load_weight(weight, part, num_experts, first, width, BLOCK_D)
                    product = tl.dot(part_grad, rows, product, input_precision=PRECISION)
            else:
                rows = _load_weight(weight, experts, num_experts, first, width, BLOCK_D)
                product = tl.dot(grad, rows, input_precision=PRECISION)
            if seed is not None:
                product *= _noise(seed, jitter, tokens, first, width, BLOCK_T, BLOCK_D)
            columns = first + tl.arange(0, BLOCK_D)
            hidden_offsets = tokens.to(tl.int64)[:, None] * width + columns[None, :]
            hidden_mask = is_token[:, None] & (columns < width)[None, :]
            tl.store(grad_hidden + hidden_offsets, product.to(grad_hidden.dtype.element_ty), mask=hidden_mask)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_split"])
def grad_weight_kernel(
    grad_scores,
    hidden,
    seed,
    grad_weight,
    grad_bias,
    num_tokens,
    tokens_per_split,
    width,
    num_experts,
    jitter,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Contributions of each split of the tokens to the gradients of weight, [splits, E, D], and bias, [splits, E].

    A gradient that is not needed is `None`.
    """
    first = tl.program_id(0) * BLOCK_D
    split = tl.program_id(1)
    experts = tl.arange(0, BLOCK_E)
    is_expert = experts < num_experts
    start = split * tokens_per_split
    end = tl.minimum(start + tokens_per_split, num_tokens)
    weight_sum = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    bias_sum = tl.zeros((BLOCK_E,), tl.float32)
    for first_token in range(start, end, BLOCK_T):
        tokens = first_token + tl.arange(0, BLOCK_T)
        is_token = tokens < end
        offsets = tokens.to(tl.int64)[:, None] * num_experts + experts[None, :]
        grad = tl.load(grad_scores + offsets, mask=is_token[:, None] & is_expert[None, :], other=0.0)
        if grad_weight is not None:
            inputs = _load_inputs(hidden, seed, jitter, tokens, is_token, first, width, BLOCK_T, BLOCK_D)
            weight_sum = tl.dot(grad.T, inputs, weight_sum, input_precision=PRECISION)
        if grad_bias is not None:
            bias_sum += tl.sum(grad, axis=0)
    if grad_weight is not None:
        columns = first + tl.arange(0, BLOCK_D)
        offsets = (split * num_experts + experts).to(tl.int64)[:, None] * width + columns[None, :]
        mask = is_expert[:, None] & (columns < width)[None, :]
        tl.store(grad_weight + offsets, weight_sum.to(grad_weight.dtype.element_ty), mask=mask)
    if grad_bias is not None and first == 0:
        bias_offsets = split * num_experts + experts
        tl.store(grad_bias + bias_offsets, bias_sum.to(grad_bias.dtype.element_ty), mask=is_expert)


@triton.jit
def _softmax(logits, is_expert):
    """Probabilities, 0 for padding, and their divisor, NaN if they are NaN."""
    logits = tl.where(is_expert[None, :], logits, float("-inf"))
    exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    total = tl.sum(exponentials, axis=1)
    return exponentials / total[:, None], total


@triton.jit
def _load_weight(weight, experts, num_experts, first, width, BLOCK_D: tl.constexpr):
    """float32[experts, BLOCK_D], zeros for padding."""
    columns = first + tl.arange(0, BLOCK_D)
    offsets = experts[:, None] * width + columns[None, :]
    mask = (experts < num_experts)[:, None] & (columns < width)[None, :]
    return tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_inputs(hidden, seed, jitter, tokens, is_token, first, width, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """float32[BLOCK_T, BLOCK_D], hidden states, times noise if there is a seed; zeros for padding."""
    columns = first + tl.arange(0, BLOCK_D)
    offsets = tokens.to(tl.int64)[:, None] * width + columns[None, :]
    mask = is_token[:, None] & (columns < width)[None, :]
    inputs = tl.load(hidden + offsets, mask=mask, other=0.0).to(tl.float32)
    if seed is not None:
        inputs *= _noise(seed, jitter, tokens, first, width, BLOCK_T, BLOCK_D)
    return inputs


@triton.jit
def _noise(seed, jitter, tokens, first, width, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """float32[BLOCK_T, BLOCK_D], uniform between 1 - jitter and 1 + jitter.

    It depends on seed, token and column, not on tiles, so backward has the same noise as forward.
    """
    fours = first // 4 + tl.arange(0, BLOCK_D // 4)  # the generator makes four numbers at a time
    offsets = tokens.to(tl.int64)[:, None] * tl.cdiv(width, 4) + fours[None, :]
    a, b, c, d = tl.rand4x(tl.load(seed), offsets)
    uniform = tl.join(tl.join(a, b), tl.join(c, d)).reshape(BLOCK_T, BLOCK_D)
    return 1.0 + jitter * (2.0 * uniform - 1.0)
