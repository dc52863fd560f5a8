"""Triton kernels for ungated experts with biases: moves between tokens and rows, grouped products, gradients.

How slots become rows and tiles: see row_plan.py. No kernel waits for the host. Each element is written by one program,
in one order: results are the same in every run.

Shape letters: T tokens, K slots per token, S = T * K slots and rows, E experts, D model width, F inner width.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_slots", "num_dots"], do_not_specialize_on_alignment=["weights", "dots"])
def gather_rows_kernel(
    tokens,
    rows_out,
    weighted_out,
    slots_out,
    weights,
    bias,
    bias_sums,
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
    num_dots,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tokens to rows, and zeros to what other kernels write for slots with an expert only (`slots_out` and `dots`).

    Rows without a slot are zeros.

    With `WEIGHTED` (the gradient of the output): `weighted_out`, the rows times their weights, and `bias_sums`, what
    the rows of each tile add to the gradient of the second bias. With `DOTS`: products of rows and that bias, which
    are part of the gradient of the weights.
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
        row_mask = (rows < tl.load(offsets + expert + 1))[:, None] & (columns < width)[None, :]
        row_offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
        if expert == num_experts:
            slot_offsets = slots.to(tl.int64)[:, None] * width + columns[None, :]
            tl.store(slots_out + slot_offsets, tl.zeros((BLOCK_M, BLOCK_N), slots_out.dtype.element_ty), mask=mask)
            if DOTS:
                for line in range(part, num_dots, tl.num_programs(1)):
                    tl.store(dots + line * num_slots + slots, tl.zeros((BLOCK_M,), tl.float32), mask=is_row)
        else:
            token_offsets = (slots // TOP_K).to(tl.int64)[:, None] * width + columns[None, :]
            values = tl.load(tokens + token_offsets, mask=mask, other=0.0)
            if DOTS or not WEIGHTED:
                tl.store(rows_out + row_offsets, values, mask=row_mask)
            if WEIGHTED:
                weight = tl.load(weights + slots, mask=is_row, other=0.0).to(tl.float32)
                weighted = values.to(tl.float32) * weight[:, None]
                tl.store(weighted_out + row_offsets, weighted.to(weighted_out.dtype.element_ty), mask=row_mask)
                tl.store(
                    bias_sums + tile.to(tl.int64) * width + columns, tl.sum(weighted, axis=0), mask=columns < width
                )
            if DOTS:
                row_bias = tl.load(bias + expert * width + columns, mask=columns < width, other=0.0).to(tl.float32)
                dot = tl.sum(values.to(tl.float32) * row_bias[None, :], axis=1)
                tl.store(dots + part * num_slots + slots, dot, mask=is_row)


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["weights", "dots"])
def grouped_gemm_kernel(
    a_desc,
    b_desc,
    out,
    bias,
    weights,
    inner_desc,
    bias_sums,
    dots,
    order,
    offsets,
    row_ends,
    tile_ends,
    tile_expert,
    tile_row,
    N,
    K,
    num_slots,
    num_experts,
    KIND: tl.constexpr,
    DOTS: tl.constexpr,
    TRANSPOSED_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`a[rows of e] @ b[e]` for each expert e, or with `b[e]` transposed, and by `KIND`:

    - "up": relu(product + bias), to rows; relu(bias) where there is no slot.
    - "down": (product + bias) * weight, to slots.
    - "grad_inner": gradient at the first product, product * weight where `inner` is positive, to rows, zeros where
      there is no slot; `bias_sums`, what each tile adds to the gradient of the first bias; with `DOTS` products with
      `inner`, for the weights.
    - "grad_input": product, to slots.
    """
    num_columns = tl.cdiv(N, BLOCK_N)
    num_tiles = tl.load(tile_ends + num_experts - 1) * num_columns
    for index in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS, flatten=True):
        tile = index // num_columns
        column = index % num_columns
        expert = tl.load(tile_expert + tile)
        first = tl.load(tile_row + tile)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            a = a_desc.load([first, k])
            if TRANSPOSED_B:
                b = b_desc.load([expert, column * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K).T
            else:
                b = b_desc.load([expert, k, column * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)

        rows = first + tl.arange(0, BLOCK_M)
        is_row = rows < tl.load(row_ends + expert)
        slots = tl.load(order + rows, mask=is_row, other=0)
        TO_SLOTS: tl.constexpr = KIND == "down" or KIND == "grad_input"
        target = slots if TO_SLOTS else rows
        is_target = is_row if TO_SLOTS else rows < tl.load(offsets + expert + 1)
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
        if KIND == "down" or DOTS:
            weight = tl.load(weights + slots, mask=is_row, other=0.0).to(tl.float32)
        bias_row = bias + expert * N if KIND == "up" or KIND == "down" else bias
        sums_row = bias_sums + tile.to(tl.int64) * N if KIND == "grad_inner" else bias_sums
        n = column * BLOCK_N
        if KIND == "grad_inner":  # in two parts: what it reads beside the product does not fit into registers at once
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = accumulator.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
            dot = _finish_tile(
                left,
                out,
                bias_row,
                inner_desc,
                sums_row,
                first,
                target,
                is_row,
                is_target,
                weight,
                n,
                N,
                KIND,
                DOTS,
                HALF,
            )
            n += HALF
            dot += _finish_tile(
                right,
                out,
                bias_row,
                inner_desc,
                sums_row,
                first,
                target,
                is_row,
                is_target,
                weight,
                n,
                N,
                KIND,
                DOTS,
                HALF,
            )
        else:
            dot = _finish_tile(
                accumulator,
                out,
                bias_row,
                inner_desc,
                sums_row,
                first,
                target,
                is_row,
                is_target,
                weight,
                n,
                N,
                KIND,
                DOTS,
                BLOCK_N,
            )
        if DOTS:
            tl.store(dots + column * num_slots + slots, dot, mask=is_row)


@triton.jit
def _finish_tile(
    product,
    out,
    bias,
    inner_desc,
    bias_sums,
    first,
    target,
    is_row,
    is_target,
    weight,
    n,
    N,
    KIND: tl.constexpr,
    DOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What `grouped_gemm_kernel` does to `WIDTH` columns of a product; returns their part of the dots."""
    columns = n + tl.arange(0, WIDTH)
    dot = tl.zeros_like(weight)
    if KIND == "up" or KIND == "down":
        product += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if KIND == "up":
        product = tl.maximum(product, 0.0)
    if KIND == "grad_inner":
        inner_values = inner_desc.load([first, n]).to(tl.float32)
        if DOTS:
            dot = tl.sum(product * inner_values, axis=1)
        product = tl.where((inner_values > 0.0) & is_row[:, None], product, 0.0)
    if KIND == "down" or DOTS:
        product *= weight[:, None]
    if KIND == "grad_inner":
        tl.store(bias_sums + columns, tl.sum(product, axis=0), mask=columns < N)
    out_offsets = target.to(tl.int64)[:, None] * N + columns[None, :]
    out_mask = is_target[:, None] & (columns < N)[None, :]
    tl.store(out + out_offsets, product.to(out.dtype.element_ty), mask=out_mask)
    return dot


@triton.jit
def grad_weight_kernel(
    a_desc,
    b_desc,
    out,
    offsets,
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

    First rows are multiples of `BLOCK_K`; rows without a slot are zeros in `a` and finite in `b`.
    """
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
def sum_tiles_kernel(sums, out, tile_ends, width, BLOCK_N: tl.constexpr, STEP: tl.constexpr):
    """out[e], the sum over the tiles of expert e, zeros for an expert without tiles."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(tile_ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(tile_ends + expert)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, last, STEP):
        tiles = start + tl.arange(0, STEP)[:, None]
        mask = (tiles < last) & (columns < width)[None, :]
        total += tl.sum(tl.load(sums + tiles.to(tl.int64) * width + columns[None, :], mask=mask, other=0.0), axis=0)
    tl.store(out + expert.to(tl.int64) * width + columns, total.to(out.dtype.element_ty), mask=columns < width)
