"""Triton kernels of a step of beam search: the best words of each row of logits, and the update of beams.

Each number is written by one program, in one order, so results are the same in every run. Of equal numbers the one with
the lower index comes first.

Shape letters: B sentences, N beams of each, C candidates of each row and of each sentence, R = B * N rows, V words,
L tokens, K = N * L keys, E tokens that end a translation.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

_LEAST = tl.constexpr(-3.0e38)  # above -inf, which marks words that were taken already
_IMPOSSIBLE = tl.constexpr(-1.0e9)  # the number that transformers uses


@triton.jit
def block_maxima_kernel(
    logits,
    ends,
    forbids,
    maxima_out,
    allowed_maxima_out,
    sums_out,
    num_words,
    num_blocks,
    E: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """For blocks of words in a row: the maximum, the maximum over allowed words, and the sum of `exp(x - maximum)`."""
    row = tl.program_id(1)
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    words = blocks[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    values = _load_logits(logits, row, words, num_words)
    maxima = tl.max(values, axis=1)
    sums = tl.sum(tl.exp(values - tl.where(maxima == -float("inf"), 0.0, maxima)[:, None]), axis=1)
    offsets = row * num_blocks + blocks
    is_block = blocks < num_blocks
    tl.store(maxima_out + offsets, maxima, mask=is_block)
    tl.store(sums_out + offsets, sums, mask=is_block)
    values = _without_ends(values, words, ends, forbids, E)
    tl.store(allowed_maxima_out + offsets, tl.max(values, axis=1), mask=is_block)


@triton.jit
def best_words_kernel(
    logits,
    ends,
    forbids,
    forced,
    maxima,
    allowed_maxima,
    sums,
    best_out,
    words_out,
    has_nan_out,
    num_words,
    num_blocks,
    N: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The best words of a row and their log-probabilities, found in the blocks with the largest maxima."""
    row = tl.program_id(0)
    blocks = tl.arange(0, BLOCK_B)
    is_block = blocks < num_blocks
    block_maxima = tl.load(maxima + row * num_blocks + blocks, mask=is_block, other=-float("inf"))
    block_sums = tl.load(sums + row * num_blocks + blocks, mask=is_block, other=0.0)
    largest = tl.max(block_maxima, axis=0)
    log_sum = largest + tl.log(tl.sum(block_sums * tl.exp(block_maxima - largest), axis=0))
    if log_sum != log_sum:
        tl.store(has_nan_out, 1)

    keys = tl.load(allowed_maxima + row * num_blocks + blocks, mask=is_block, other=-float("inf"))
    keys = tl.where(is_block, tl.maximum(keys, _LEAST), -float("inf"))
    places = tl.arange(0, BLOCK_C)
    chosen = tl.zeros((BLOCK_C,), tl.int32)
    for place in range(C):
        block = tl.argmax(keys, axis=0)
        chosen = tl.where(places == place, block, chosen)
        keys = tl.where(blocks == block, -float("inf"), keys)

    words = chosen[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    values = _load_logits(logits, row, words, num_words)
    values = _without_ends(values, words, ends, forbids, E)
    is_there = (places < C)[:, None] & (words < num_words)
    keys = tl.reshape(tl.where(is_there, tl.maximum(values, _LEAST), -float("inf")), (BLOCK_C * WORDS,))
    values = tl.reshape(values, (BLOCK_C * WORDS,))
    words = tl.reshape(words, (BLOCK_C * WORDS,))
    index = tl.arange(0, BLOCK_C * WORDS)
    forced_word = tl.load(forced + row // N)
    for place in range(C):
        best = tl.argmax(keys, axis=0)
        is_best = index == best
        keys = tl.where(is_best, -float("inf"), keys)
        score = tl.max(tl.where(is_best, values, -float("inf")), axis=0) - log_sum
        word = tl.sum(tl.where(is_best, words, 0), axis=0).to(tl.int64)
        if forced_word >= 0:
            score = tl.where(place == 0, 0.0, -float("inf"))
            word = forced_word
        tl.store(best_out + row * C + place, score)
        tl.store(words_out + row * C + place, word)


@triton.jit
def _load_logits(logits, row, words, num_words):
    is_word = words < num_words
    return tl.load(logits + row.to(tl.int64) * num_words + words, mask=is_word, other=-float("inf")).to(tl.float32)


@triton.jit
def _without_ends(values, words, ends, forbids, E: tl.constexpr):
    if tl.load(forbids) != 0:
        for e in tl.static_range(E):
            values = tl.where(words == tl.load(ends + e), -float("inf"), values)
    return values


@triton.jit
def advance_kernel(
    best,
    words,
    ends,
    divisors,
    possible_divisors,
    stops_when_full,
    last_place,
    place,
    row_place,
    goes_on,
    sentences,
    running,
    running_rows,
    running_scores,
    ended,
    ended_rows,
    ended_scores,
    has_ended,
    may_improve,
    is_done,
    next_words,
    mask,
    width,
    mask_width,
    N: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One sentence: candidates of its rows -> its beams and ended translations, like `Hypotheses.advance`.

    `goes_on[place]` is set if any sentence continues; if none did at the previous place, all are done.
    """
    sentence = tl.program_id(0)
    at = tl.load(place)
    row_at = tl.load(row_place)
    is_last = at == tl.load(last_place)
    beams = tl.arange(0, BLOCK_N)
    is_beam = beams < N
    slots = sentence * N + beams

    # the best candidates of all rows; pool: first the places of ended translations, then the candidates
    flat = tl.arange(0, BLOCK_F)
    is_flat = flat < N * C
    scores = tl.load(best + sentence * N * C + flat, mask=is_flat, other=0.0)
    scores += tl.load(running_scores + sentence * N + flat // C, mask=is_flat, other=0.0)
    all_words = tl.load(words + sentence * N * C + flat, mask=is_flat, other=0)
    keys = tl.where(is_flat, tl.maximum(scores, _LEAST), -float("inf"))
    pool = tl.arange(0, BLOCK_P)
    pool_scores = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    pool_parents = tl.zeros((BLOCK_P,), tl.int32)
    pool_words = tl.zeros((BLOCK_P,), tl.int64)
    for candidate in range(C):
        best_one = tl.argmax(keys, axis=0)
        is_best = flat == best_one
        keys = tl.where(is_best, -float("inf"), keys)
        is_here = pool == N + candidate
        pool_scores = tl.where(is_here, tl.max(tl.where(is_best, scores, -float("inf")), axis=0), pool_scores)
        pool_parents = tl.where(is_here, best_one // C, pool_parents)
        pool_words = tl.where(is_here, tl.sum(tl.where(is_best, all_words, 0), axis=0), pool_words)
    is_old = pool < N
    is_candidate = (pool >= N) & (pool < N + C)
    hits = is_last & is_candidate
    for e in tl.static_range(E):
        hits = hits | (is_candidate & (pool_words == tl.load(ends + e)))
    was_done = tl.load(is_done + sentence) != 0
    if (tl.sum((is_candidate & (hits == 0)).to(tl.int32), axis=0) > 0) & (was_done == 0):
        tl.store(goes_on + at, 1)

    # ended translations
    old_has = tl.load(has_ended + sentence * N + pool, mask=is_old, other=0) != 0
    stops = tl.load(stops_when_full) != 0
    nothing_goes_on = tl.load(goes_on + at - 1) == 0
    improves = (tl.load(may_improve + sentence) != 0) & (nothing_goes_on == 0)
    num_ended = tl.sum((old_has & is_old).to(tl.int32), axis=0)
    is_closed = (improves == 0) | (stops & (num_ended == N))
    is_taken = hits & (pool < 2 * N)
    old_scores = tl.load(ended_scores + sentence * N + pool, mask=is_old, other=0.0)
    ranked = pool_scores / tl.load(divisors + at + 1) + tl.where(is_taken, 0.0, _IMPOSSIBLE)
    ranked = tl.where(is_old, old_scores, ranked)
    keys = tl.where(is_old | is_candidate, tl.maximum(ranked, _LEAST), -float("inf"))
    new_scores = tl.zeros((BLOCK_N,), tl.float32)
    new_has = tl.zeros((BLOCK_N,), tl.int32)
    sources = tl.zeros((BLOCK_N,), tl.int32)  # for ended translations: the previous place, or the beam of a candidate
    are_kept = tl.zeros((BLOCK_N,), tl.int32)
    source_words = tl.zeros((BLOCK_N,), tl.int64)
    for beam in range(N):
        chosen = tl.argmax(keys, axis=0)
        chosen = tl.where(is_closed, beam, chosen)
        is_chosen = pool == chosen
        keys = tl.where(is_chosen, -float("inf"), keys)
        is_here = beams == beam
        new_scores = tl.where(is_here, tl.max(tl.where(is_chosen, ranked, -float("inf")), axis=0), new_scores)
        has = tl.sum((is_chosen & ((is_old & old_has) | is_taken)).to(tl.int32), axis=0)
        new_has = tl.where(is_here, has, new_has)
        kept = (chosen < N).to(tl.int32)
        are_kept = tl.where(is_here, kept, are_kept)
        parent = tl.sum(tl.where(is_chosen, pool_parents, 0), axis=0)
        sources = tl.where(is_here, tl.where(kept != 0, chosen, parent), sources)
        source_words = tl.where(is_here, tl.sum(tl.where(is_chosen, pool_words, 0), axis=0), source_words)

    # running beams
    going = pool_scores + tl.where(hits, _IMPOSSIBLE, 0.0)
    keys = tl.where(is_candidate, tl.maximum(going, _LEAST), -float("inf"))
    going_scores = tl.zeros((BLOCK_N,), tl.float32)
    parents = tl.zeros((BLOCK_N,), tl.int32)
    going_words = tl.zeros((BLOCK_N,), tl.int64)
    for beam in range(N):
        is_chosen = pool == tl.argmax(keys, axis=0)
        keys = tl.where(is_chosen, -float("inf"), keys)
        is_here = beams == beam
        going_scores = tl.where(is_here, tl.max(tl.where(is_chosen, going, -float("inf")), axis=0), going_scores)
        parents = tl.where(is_here, tl.sum(tl.where(is_chosen, pool_parents, 0), axis=0), parents)
        going_words = tl.where(is_here, tl.sum(tl.where(is_chosen, pool_words, 0), axis=0), going_words)

    possible = tl.max(tl.where(beams == 0, going_scores, -float("inf")), axis=0)
    possible = possible / tl.load(possible_divisors + at + 1)
    lowest = tl.min(tl.where(is_beam, new_scores, float("inf")), axis=0)
    worst = tl.where(new_has != 0, lowest, _IMPOSSIBLE)
    can_improve = tl.sum((is_beam & (possible > worst)).to(tl.int32), axis=0) > 0
    improves = improves & can_improve
    is_full = tl.sum(tl.where(is_beam, new_has, 0), axis=0) == N
    first_row = (tl.load(sentences + sentence) * N).to(tl.int32)
    tl.debug_barrier()  # everything was read
    tl.store(may_improve + sentence, improves.to(tl.int8))
    tl.store(is_done + sentence, ((improves == 0) | (stops & is_full)).to(tl.int8))
    tl.store(running_scores + slots, going_scores, mask=is_beam)
    tl.store(next_words + slots, going_words, mask=is_beam)
    tl.store(ended_scores + slots, new_scores, mask=is_beam)
    tl.store(has_ended + slots, new_has.to(tl.int8), mask=is_beam)

    # their tokens and rows
    first = sentence * N
    is_kept = (are_kept != 0)[:, None]
    is_open = is_beam & ((tl.zeros((BLOCK_N,), tl.int32) + tl.where(is_closed, 0, 1)) != 0)
    for start in range(0, at + 1, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        _move(
            running, ended, first, beams, parents, sources, is_kept, going_words, source_words, columns, at, width,
            is_beam, is_open,
        )  # fmt: skip
        _move(
            running_rows, ended_rows, first, beams, parents, sources, is_kept, first_row + parents, first_row + sources,
            columns, row_at, width, is_beam, is_open,
        )  # fmt: skip

    # the keys to which they attend, and the key that each writes next
    for start in range(0, N * (at + 1), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = is_beam[:, None] & (columns < mask_width)[None, :]
        values = tl.load(mask + (first + parents[:, None]) * mask_width + columns[None, :], mask=is_column, other=0.0)
        values = tl.where(columns[None, :] == (N * at + beams)[:, None], 0.0, values)
        tl.debug_barrier()
        tl.store(mask + (first + beams[:, None]) * mask_width + columns[None, :], values, mask=is_column)


@triton.jit
def _move(
    running,
    ended,
    first,
    beams,
    parents,
    sources,
    is_kept,
    going_values,
    ended_values,
    columns,
    at,
    width,
    is_beam,
    is_open,
):
    """Move some columns of beams and ended translations, with their own values at `at`."""
    is_place = is_beam[:, None] & (columns < width)[None, :]
    is_new = (columns == at)[None, :]
    going = tl.load(running + (first + parents[:, None]) * width + columns[None, :], mask=is_place, other=0)
    kept = tl.load(ended + (first + sources[:, None]) * width + columns[None, :], mask=is_place & is_kept, other=0)
    taken = tl.load(
        running + (first + sources[:, None]) * width + columns[None, :], mask=is_place & (is_kept == 0), other=0
    )
    going = tl.where(is_new, going_values[:, None].to(going.dtype), going)
    taken = tl.where(is_new, ended_values[:, None].to(taken.dtype), taken)
    tl.debug_barrier()
    offsets = (first + beams[:, None]) * width + columns[None, :]
    tl.store(running + offsets, going, mask=is_place)
    tl.store(ended + offsets, tl.where(is_kept, kept, taken), mask=is_place & is_open[:, None])
