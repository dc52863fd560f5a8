"""Which rank computes which rows: shares by hand, and what must hold for any loads."""

import itertools

import numpy as np
import pytest

from hf_moe_ted.distributed.least_loaded import ExpertVisits, RowShares, check_least_loaded, share_loads

# loads by expert, ranks, bound, least rows that move; rows of each expert by rank, or None if nothing moves
BY_HAND = {
    "balanced": ([8, 8, 8, 8], 4, 1.0, 1, None),
    "no rows": ([0, 0, 0, 0], 2, 1.0, 1, None),
    "at the bound": ([13, 0, 7, 0], 2, 1.3, 1, None),
    "over the bound": ([14, 0, 6, 0], 2, 1.3, 1, [[10, 0, 0, 0], [4, 0, 6, 0]]),
    "one expert": ([0, 32, 0, 0], 4, 1.3, 1, [[0, 8, 0, 0], [0, 8, 0, 0], [0, 8, 0, 0], [0, 8, 0, 0]]),
    "one expert, large chunks": ([0, 32, 0, 0], 4, 1.3, 9, [[0, 9, 0, 0], [0, 14, 0, 0], [0, 9, 0, 0], [0, 0, 0, 0]]),
    "chunks that would not help": ([0, 32, 0, 0], 4, 1.3, 32, None),
    # the largest expert of the first rank goes first, and the second stays
    "largest first": ([6, 20, 2, 4], 2, 1.3, 1, [[6, 10, 0, 0], [0, 10, 2, 4]]),
    # 30 rows and a mean of 10: two ranks are over it, and what is over goes to the third
    "two over the mean": ([14, 14, 2], 3, 1.3, 1, [[10, 0, 0], [0, 10, 0], [4, 4, 2]]),
    # a helper is filled up to the mean, no further, and the next one has the rest
    "fewer rows than they have room": ([21, 6, 3], 3, 1.3, 1, [[10, 0, 0], [4, 6, 0], [7, 0, 3]]),
    "what is left is less than a chunk": (
        [21, 8, 7, 4], 4, 1.3, 4, [[11, 0, 0, 0], [0, 8, 0, 0], [4, 0, 7, 0], [6, 0, 0, 4]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_shares_by_hand(name: str) -> None:
    loads, num_ranks, bound, min_tokens, expected = BY_HAND[name]
    shares = share_loads(np.array(loads), num_ranks, bound=bound, min_tokens=min_tokens)
    assert (None if shares is None else shares.tolist()) == expected


def random_loads(seed: int) -> tuple[np.ndarray, int, int]:
    """Rows of each expert by source, the number of ranks, and the least rows that move."""
    generator = np.random.default_rng(seed)
    num_ranks, num_local, num_sources = (int(generator.integers(1, 6)) for _ in range(3))
    probabilities = generator.dirichlet(np.full(num_ranks * num_local, 0.2))
    return generator.multinomial(int(generator.integers(0, 400)), probabilities, num_sources), num_ranks, 1 + seed % 30


@pytest.mark.parametrize("seed", range(60))
def test_all_rows_go_somewhere_once(seed: int) -> None:
    counts, num_ranks, min_tokens = random_loads(seed)
    loads = counts.sum(axis=0)
    at_home = np.arange(len(loads)) * num_ranks // len(loads)
    before = np.bincount(at_home, weights=loads, minlength=num_ranks)
    shares = share_loads(loads, num_ranks, bound=1.0, min_tokens=min_tokens)
    if shares is None:
        mean = -(-loads.sum() // num_ranks)
        is_over = [rank for rank in range(num_ranks) if before[rank] - mean >= min_tokens]
        # no rank has a chunk to give, or it would only make another one the slowest
        assert all(
            loads[at_home == rank].max() < min_tokens or before.min() + min_tokens >= before[rank] for rank in is_over
        )
        return
    assert shares.min() >= 0 and (shares.sum(axis=0) == loads).all()
    after = shares.sum(axis=1)
    mean = -(-loads.sum() // num_ranks)
    assert after.max() <= before.max() and (after <= np.maximum(before, mean + min_tokens)).all()
    moved = [shares[rank, e] for rank in range(num_ranks) for e in range(len(loads)) if at_home[e] != rank]
    assert all(rows == 0 or rows >= min_tokens for rows in moved)

    rows = RowShares(counts, shares)
    queues = [[[(source, row) for row in range(n)] for source, n in enumerate(counts[:, e])] for e in range(len(loads))]
    for expert, by_source in enumerate(queues):
        queue, start = list(itertools.chain(*by_source)), 0
        for rank in range(num_ranks):
            expected = queue[start : start + shares[rank, expert]]
            start += shares[rank, expert]
            found = []
            for source in range(len(counts)):
                first, size = (part[rank, expert] for part in rows.sent_by(source))
                assert rows.received_by(rank)[source, expert] == size
                found += [(source, row) for row in range(first, first + size)]
            assert found == expected


def test_visits_are_the_same_for_both_sides() -> None:
    shares = np.array([[10, 0, 0, 0, 3, 1], [4, 0, 6, 0, 0, 9], [2, 5, 0, 0, 2, 0]])
    visits = [ExpertVisits.of(shares, rank) for rank in range(3)]
    assert visits[0] == ExpertVisits(sent=[0, 0, 1], send_sizes=[0, 1, 2], received=[4, 5], receive_sizes=[0, 0, 2])
    assert visits[1] == ExpertVisits(sent=[], send_sizes=[0, 0, 0], received=[0, 5], receive_sizes=[1, 0, 1])
    assert visits[2] == ExpertVisits(sent=[0, 1, 1], send_sizes=[2, 1, 0], received=[0, 1], receive_sizes=[2, 0, 0])


@pytest.mark.parametrize("bound", [0.9, float("inf"), float("nan"), "1.3"])
def test_bounds_that_cannot_be(bound: object) -> None:
    with pytest.raises(ValueError, match=r"least_loaded_bound \(.*\) must be a number of at least 1"):
        check_least_loaded(bound, 1)


@pytest.mark.parametrize("min_tokens", [0, -1, 1.5])
def test_chunks_that_cannot_be(min_tokens: object) -> None:
    with pytest.raises(ValueError, match=r"least_loaded_min_tokens \(.*\) must be a whole number of at least 1"):
        check_least_loaded(1.3, min_tokens)
