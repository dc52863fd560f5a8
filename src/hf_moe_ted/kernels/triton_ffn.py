"""Triton kernels for ungated experts with biases: moves between tokens and rows, grouped products, gradients.

For how slots become rows and tiles, see row_plan.py. No kernel waits for the host. Each element is written by one
program, in one order, so results are the same in every run.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["weights", "grad_weights"])
def gather_rows_kernel(
    tokens,
    rows_out,
    slots_out,
    weights,
    unweighted,
    grad_weights,
    order,
    offsets,
    row_ends,
    tile_ends,
    tile_expert,
    tile_row,
    width,
    num_experts,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Move tokens to rows, and write zeros to `slots_out`, which other kernels write only for slots with an expert.

    Rows without a slot are zeros.

    With `weights` (for the gradient of the output) rows are multiplied by them. With `unweighted`, the outputs by slot
    before they are weighted, it also computes the gradient of the weights: their products with the tokens, zero for a
    slot without an expert.
    """
    tile = tl.program_id(0)
    if tile < tl.load(tile_ends + num_experts):
        expert = tl.load(tile_expert + tile)
        rows = tl.load(tile_row + tile) + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = rows < tl.load(row_ends + expert)
        has_row = rows < tl.load(offsets + expert + 1)
        slots = tl.load(order + rows, mask=is_row, other=0)
        if weights is not None:
            weight = tl.load(weights + slots, mask=is_row, other=0.0).to(tl.float32)
        dot = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(0, width, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            is_column = (columns < width)[None, :]
            mask = is_row[:, None] & is_column
            slot_offsets = slots.to(tl.int64)[:, None] * width + columns[None, :]
            if expert == num_experts:
                tl.store(slots_out + slot_offsets, tl.zeros((BLOCK_M, BLOCK_N), slots_out.dtype.element_ty), mask=mask)
            else:
                token_offsets = (slots // TOP_K).to(tl.int64)[:, None] * width + columns[None, :]
                values = tl.load(tokens + token_offsets, mask=mask, other=0.0)
                if unweighted is not None:
                    outputs = tl.load(unweighted + slot_offsets, mask=mask, other=0.0)
                    dot += tl.sum(values.to(tl.float32) * outputs.to(tl.float32), axis=1)
                if weights is not None:
                    values = (values.to(tl.float32) * weight[:, None]).to(rows_out.dtype.element_ty)
                row_offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
                tl.store(rows_out + row_offsets, values, mask=has_row[:, None] & is_column)
        if unweighted is not None:
            tl.store(grad_weights + slots, dot.to(grad_weights.dtype.element_ty), mask=is_row)


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

    - "up": relu(product + bias), to rows; relu(bias) for rows without a slot.
    - "down": (product + bias) * weight, to slots; without the weight to `unweighted`, unless that is `None`.
    - "grad_inner": product where `inner` is positive, to rows; zeros for rows without a slot.
    - "grad_input": product, to slots.

    `a_desc`, `b_desc` and `inner_desc` are descriptors, and `num_rows` is `None`; or, without TMA, pointers to
    `num_rows` rows and to the experts' weights.
    """
    if num_rows is not None:
        # Constant strides allow copies of 16 bytes, and two dimensions allow asynchronous copies. Reads after the end
        # of an expert's weights get those of the next expert: they are for columns that are not stored, or are
        # multiplied by zeros.
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
        if (
            KIND == "grad_inner"
        ):  # in two parts, because `inner` does not fit into shared memory beside the product's operands
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
    sums,
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
    """out[e] = a[rows of e].T @ b[rows of e] and sums[e] = a[rows of e].sum(), zeros for an expert without rows.

    First rows are multiples of `BLOCK_K`. Rows without a slot are zeros in `a` and finite in `b`. Descriptors are as in
    `grouped_gemm_kernel`.
    """
    if num_rows is not None:
        a_desc = tl.make_tensor_descriptor(a_desc, [num_rows, M], [M, 1], [BLOCK_K, BLOCK_M])
        b_desc = tl.make_tensor_descriptor(b_desc, [num_rows, N], [N, 1], [BLOCK_K, BLOCK_N])
    num_parts = tl.cdiv(M, BLOCK_M)
    tiles_per_expert = num_parts * tl.cdiv(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), num_experts * tiles_per_expert, NUM_PROGRAMS):
        expert = index // tiles_per_expert
        # tiles with sums are consecutive, so that each program gets some
        n = index % tiles_per_expert // num_parts * BLOCK_N
        m = index % num_parts * BLOCK_M
        start = tl.load(offsets + expert)
        end = tl.load(offsets + expert + 1)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if n == 0:
            total = tl.zeros((8, BLOCK_M), tl.float32)  # of every eighth row: a thread has several of them
            for row in tl.range(start, end, BLOCK_K):
                a = a_desc.load([row, m])
                accumulator = tl.dot(a.T, b_desc.load([row, n]), accumulator, input_precision=PRECISION)
                total += tl.sum(a.reshape(BLOCK_K // 8, 8, BLOCK_M).to(tl.float32), axis=0)
            parts = m + tl.arange(0, BLOCK_M)
            total = tl.sum(total, axis=0).to(sums.dtype.element_ty)
            tl.store(sums + expert.to(tl.int64) * M + parts, total, mask=parts < M)
        else:
            for row in tl.range(start, end, BLOCK_K):
                a = a_desc.load([row, m])
                b = b_desc.load([row, n])
                accumulator = tl.dot(a.T, b, accumulator, input_precision=PRECISION)
        rows = m + tl.arange(0, BLOCK_M)
        columns = n + tl.arange(0, BLOCK_N)
        out_offsets = (expert.to(tl.int64) * M + rows)[:, None] * N + columns[None, :]
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(out + out_offsets, accumulator.to(out.dtype.element_ty), mask=mask)
