"""Triton kernels for ungated experts with biases: moves between tokens and rows, grouped products, gradients.

How slots become rows and tiles: see row_plan.py. No kernel waits for the host. Each element is written by one program,
in one order: results are the same in every run.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["weights", "dots"])
def gather_rows_kernel(
    tokens,
    rows_out,
    slots_out,
    weights,
    unweighted,
    dots,
    order,
    offsets,
    row_ends,
    tile_ends,
    tile_expert,
    tile_row,
    width,
    num_slots,
    num_experts,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tokens to rows, and zeros to `slots_out`, which other kernels write for slots with an expert only.

    Rows without a slot are zeros.

    With `WEIGHTED` (the gradient of the output) rows are multiplied by their weights. With `DOTS`: products of tokens
    and `unweighted`, the outputs by slot before their weights, one line of `dots` for each part of the columns. The sum
    of the lines is the gradient of the weights, zero for a slot without an expert.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    if tile < tl.load(tile_ends + num_experts):
        expert = tl.load(tile_expert + tile)
        rows = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
        is_row = rows < tl.load(row_ends + expert)
        slots = tl.load(order + rows, mask=is_row, other=0)
        columns = part * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = is_row[:, None] & (columns < width)[None, :]
        slot_offsets = slots.to(tl.int64)[:, None] * width + columns[None, :]
        dot = tl.zeros((BLOCK_M,), tl.float32)
        if expert == num_experts:
            tl.store(slots_out + slot_offsets, tl.zeros((BLOCK_M, BLOCK_N), slots_out.dtype.element_ty), mask=mask)
        else:
            token_offsets = (slots // TOP_K).to(tl.int64)[:, None] * width + columns[None, :]
            values = tl.load(tokens + token_offsets, mask=mask, other=0.0)
            if DOTS:
                outputs = tl.load(unweighted + slot_offsets, mask=mask, other=0.0)
                dot = tl.sum(values.to(tl.float32) * outputs.to(tl.float32), axis=1)
            if WEIGHTED:
                weight = tl.load(weights + slots, mask=is_row, other=0.0).to(tl.float32)
                values = (values.to(tl.float32) * weight[:, None]).to(rows_out.dtype.element_ty)
            row_offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
            row_mask = (rows < tl.load(offsets + expert + 1))[:, None] & (columns < width)[None, :]
            tl.store(rows_out + row_offsets, values, mask=row_mask)
        if DOTS:
            tl.store(dots + part * num_slots + slots, dot, mask=is_row)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["weights"])
def grouped_gemm_kernel(
    a_desc,
    b_desc,
    out,
    unweighted,
    bias,
    weights,
    inner_desc,
    num_rows,
    order,
    offsets,
    row_ends,
    tile_ends,
    tile_expert,
    tile_row,
    N,
    K,
    num_experts,
    KIND: tl.constexpr,
    TRANSPOSED_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`a[rows of e] @ b[e]` for each expert e, or with `b[e]` transposed, and by `KIND`:

    - "up": relu(product + bias), to rows; relu(bias) where there is no slot.
    - "down": (product + bias) * weight, to slots; without the weight to `unweighted`, unless that is `None`.
    - "grad_inner": product where `inner` is positive, to rows, zeros where there is no slot.
    - "grad_input": product, to slots.

    `a_desc`, `b_desc` and `inner_desc` are descriptors, with `None` for `num_rows`; or, where there is no TMA, pointers
    to `num_rows` rows and to the experts' weights.
    """
    if num_rows is not None:
        # Strides that are known, for copies of 16 bytes, and two dimensions, for copies that nobody waits for. What is
        # read behind an expert's weights are those of the next: for columns that are not stored, or times zeros.
        a_desc = tl.make_tensor_descriptor(a_desc, [num_rows, K], [K, 1], [BLOCK_M, BLOCK_K])
        if TRANSPOSED_B:
            b_desc = tl.make_tensor_descriptor(b_desc, [num_experts * N, K], [K, 1], [BLOCK_N, BLOCK_K])
        else:
            b_desc = tl.make_tensor_descriptor(b_desc, [num_experts * K, N], [N, 1], [BLOCK_K, BLOCK_N])
        if KIND == "grad_inner":
            inner_desc = tl.make_tensor_descriptor(inner_desc, [num_rows, N], [N, 1], [BLOCK_M, BLOCK_N // 2])
    num_columns = tl.cdiv(N, BLOCK_N)
    num_tiles = tl.load(tile_ends + num_experts - 1) * num_columns
    for index in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS, flatten=True):
        tile = index // num_columns
        n = index % num_columns * BLOCK_N
        expert = tl.load(tile_expert + tile)
        first = tl.load(tile_row + tile)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            a = a_desc.load([first, k])
            if num_rows is not None:
                b = b_desc.load([expert * N + n, k]).T if TRANSPOSED_B else b_desc.load([expert * K + k, n])
            elif TRANSPOSED_B:
                b = b_desc.load([expert, n, k]).reshape(BLOCK_N, BLOCK_K).T
            else:
                b = b_desc.load([expert, k, n]).reshape(BLOCK_K, BLOCK_N)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)

        rows = first + tl.arange(0, BLOCK_M)
        is_row = rows < tl.load(row_ends + expert)
        slots = tl.load(order + rows, mask=is_row, other=0)
        columns = n + tl.arange(0, BLOCK_N)
        TO_SLOTS: tl.constexpr = KIND == "down" or KIND == "grad_input"
        target = slots if TO_SLOTS else rows
        is_target = is_row if TO_SLOTS else rows < tl.load(offsets + expert + 1)
        if KIND == "up" or KIND == "down":
            row_bias = tl.load(bias + expert * N + columns, mask=columns < N, other=0.0).to(tl.float32)
            accumulator += row_bias[None, :]
        if KIND == "up":
            accumulator = tl.maximum(accumulator, 0.0)
        if KIND == "down":
            if unweighted is not None:
                _store_tile(unweighted, accumulator, target, is_target, n, N)
            accumulator *= tl.load(weights + slots, mask=is_row, other=0.0).to(tl.float32)[:, None]
        if KIND == "grad_inner":  # in two parts: `inner` does not fit into shared memory beside the product's operands
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = accumulator.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
            is_active = (inner_desc.load([first, n]) > 0.0) & is_row[:, None]
            _store_tile(out, tl.where(is_active, left, 0.0), target, is_target, n, N)
            is_active = (inner_desc.load([first, n + HALF]) > 0.0) & is_row[:, None]
            _store_tile(out, tl.where(is_active, right, 0.0), target, is_target, n + HALF, N)
        else:
            _store_tile(out, accumulator, target, is_target, n, N)


@triton.jit
def _store_tile(out, values, target, is_target, n, N):
    columns = n + tl.arange(0, values.shape[1])
    mask = is_target[:, None] & (columns < N)[None, :]
    tl.store(out + target.to(tl.int64)[:, None] * N + columns[None, :], values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def grad_weight_kernel(
    a_desc,
    b_desc,
    out,
    offsets,
    num_rows,
    M,
    N,
    num_experts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[e] = a[rows of e].T @ b[rows of e], zeros for an expert without rows.

    First rows are multiples of `BLOCK_K`; rows without a slot are zeros in `a` and finite in `b`. Descriptors as in
    `grouped_gemm_kernel`.
    """
    if num_rows is not None:
        a_desc = tl.make_tensor_descriptor(a_desc, [num_rows, M], [M, 1], [BLOCK_K, BLOCK_M])
        b_desc = tl.make_tensor_descriptor(b_desc, [num_rows, N], [N, 1], [BLOCK_K, BLOCK_N])
    num_columns = tl.cdiv(N, BLOCK_N)
    tiles_per_expert = tl.cdiv(M, BLOCK_M) * num_columns
    for index in tl.range(tl.program_id(0), num_experts * tiles_per_expert, NUM_PROGRAMS):
        expert = index // tiles_per_expert
        m = (index % tiles_per_expert) // num_columns * BLOCK_M
        n = index % num_columns * BLOCK_N
        start = tl.load(offsets + expert)
        end = tl.load(offsets + expert + 1)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for row in tl.range(start, end, BLOCK_K):
            a = a_desc.load([row, m])
            b = b_desc.load([row, n])
            accumulator = tl.dot(a.T, b, accumulator, input_precision=PRECISION)
        rows = m + tl.arange(0, BLOCK_M)
        columns = n + tl.arange(0, BLOCK_N)
        out_offsets = (expert.to(tl.int64) * M + rows)[:, None] * N + columns[None, :]
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(out + out_offsets, accumulator.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_rows_kernel(values, out, offsets, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[e] = values[rows of e].sum(), zeros for an expert without rows. Rows without a slot are zeros."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(tl.load(offsets + expert), end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < end)[:, None] & (columns < width)[None, :]
        total += tl.load(values + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)
    tl.store(
        out + expert.to(tl.int64) * width + columns,
        tl.sum(total, axis=0).to(out.dtype.element_ty),
        mask=columns < width,
    )
