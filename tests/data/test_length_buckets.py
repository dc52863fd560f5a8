"""Buckets and signatures: against all choices there are, bounds, what is wrong with buckets."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from hf_moe_ted import propose_length_buckets
from hf_moe_ted.data.length_buckets import (
    BatchSignature,
    check_length_buckets,
    choose_signatures,
    count_pairs,
    in_buckets,
)

BUDGET = 512


def skewed_lengths(num_examples: int, seed: int = 0) -> np.ndarray:
    """Source and target lengths that go together, most of them short, from 3 to 100."""
    random = np.random.default_rng(seed)
    source = random.lognormal(3, 0.6, num_examples)
    target = source * random.lognormal(0, 0.25, num_examples)
    return np.clip(np.stack([source, target], axis=1), 3, 100).astype(int)


def tokens_of(padded: np.ndarray, pairs: Any) -> float:
    """Tokens with padding of all examples, each in the best of `pairs`; twice its own in none."""
    best = 2.0 * padded.sum(axis=1)
    for source, target in pairs:
        fits = (padded[:, 0] <= source) & (padded[:, 1] <= target)
        best = np.where(fits, np.minimum(best, source + target), best)
    return float(best.sum())


def test_lengths_go_up_to_the_next_bucket() -> None:
    lengths = np.array([[1, 16], [17, 32], [33, 64]])
    assert in_buckets(lengths, [16, 32, 64]).tolist() == [[16, 16], [32, 32], [64, 64]]
    with pytest.raises(ValueError, match="length_buckets ends at 32, but a text has 64 tokens; add a bucket of 64"):
        in_buckets(lengths, [16, 32])


def test_pairs_are_counted() -> None:
    padded = np.array([[16, 32], [32, 16], [16, 32]])
    pairs, counts = count_pairs(padded)
    assert dict(zip(map(tuple, pairs.tolist()), counts, strict=True)) == {(16, 32): 2, (32, 16): 1}
    assert count_pairs(padded, np.array([0.5, 3.0, 0.25]))[1].tolist() == [0.75, 3.0]


@pytest.mark.parametrize("seed", range(6))
def test_signatures_are_about_the_best_there_are(seed: int) -> None:
    padded = in_buckets(skewed_lengths(2000, seed), [16, 32, 48, 128])
    signatures = choose_signatures(padded, BUDGET, max_signatures=3)
    pairs = count_pairs(padded)[0].tolist()
    best = min(tokens_of(padded, choice) for choice in combinations(pairs, 3))
    assert tokens_of(padded, [signature[1:] for signature in signatures]) <= 1.02 * best


def test_signatures_fill_the_budget_and_are_few() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        buckets = [*np.unique(random.integers(8, 100, size=random.integers(1, 12))).tolist(), 100]
        padded = in_buckets(skewed_lengths(500, int(random.integers(99))), buckets)
        most, num_ranks = int(random.integers(1, 30)), int(random.integers(1, 4))
        budget = int(random.integers(200, 2000))
        options: dict[str, Any] = {"max_signatures": most, "num_ranks": num_ranks}
        signatures = choose_signatures(padded, budget, **options)
        assert 0 < len(signatures) == len({*signatures}) <= most
        assert signatures == choose_signatures(padded[::-1], budget, **options)  # the order of examples says nothing
        lengths = [signature[1:] for signature in signatures]
        assert [sum(pair) for pair in lengths] == sorted(sum(pair) for pair in lengths)
        for rows, source, target in signatures:
            assert {source, target} <= {*buckets}
            assert rows * (source + target) <= budget < (rows + 1) * (source + target)


def test_a_signature_is_not_worth_less_than_a_step() -> None:
    padded = in_buckets(skewed_lengths(12_000), [*range(8, 105, 8)])
    few, many = (choose_signatures(padded, budget) for budget in (8 * BUDGET, BUDGET))
    assert 1 <= len(few) < len(many) == 24
    assert len(choose_signatures(padded, BUDGET, num_ranks=32)) < 24
    assert len(choose_signatures(padded[:2], BUDGET)) == 1


def test_weights_are_how_often_examples_come() -> None:
    padded = np.array([[16, 16]] * 99 + [[16, 64]])
    signature = BatchSignature(BUDGET // 32, 16, 16)
    assert choose_signatures(padded, BUDGET, max_signatures=1) == [signature]
    weights = np.array([0.01] * 99 + [99.0])
    assert choose_signatures(padded, BUDGET, weights_N=weights, max_signatures=1) == [(BUDGET // 80, 16, 64)]


def test_proposed_buckets_pad_less() -> None:
    lengths = skewed_lengths(4000)

    def padding_of(buckets: list[int], most: int = 24) -> float:
        padded = in_buckets(lengths, buckets)
        signatures = choose_signatures(padded, BUDGET, max_signatures=most)
        return 1 - lengths.sum() / tokens_of(padded, [signature[1:] for signature in signatures])

    proposed = propose_length_buckets(lengths)
    assert proposed == check_length_buckets(proposed) and proposed[-1] == 100
    assert all(bucket % 2 == 0 for bucket in proposed)
    assert padding_of(proposed) < 0.7 * padding_of([16, 32, 48, 64, 96, 128])
    assert padding_of(propose_length_buckets(lengths, max_signatures=48), 48) < padding_of(proposed) < 0.17
    assert padding_of(propose_length_buckets(lengths, multiple_of=16)) > padding_of(proposed)
    assert propose_length_buckets(lengths, multiple_of=16)[-1] == 112
    assert propose_length_buckets([[7, 7]] * 3, multiple_of=1) == [7]
    assert propose_length_buckets(50 * lengths)[-1] == 5000


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([], "length_buckets has 0 lengths, but must have 1 to 64"),
        ([*range(1, 66)], "length_buckets has 65 lengths"),
        ([16, 16], r"length_buckets \(\[16, 16\]\) must be in ascending order"),
        ([32, 16], "must be in ascending order"),
        ([0, 16], r"a length of length_buckets \(0\) must be at least 1"),
        ([16.5], r"a length of length_buckets \(16.5\) must be an integer"),
        ("auto", r"length_buckets \('auto'\) must be a list of lengths"),
        (16, r"length_buckets \(16\) must be a list of lengths"),
    ],
)
def test_bad_buckets(buckets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_length_buckets(buckets)
    assert check_length_buckets(np.array([16, 32])) == check_length_buckets(range(16, 33, 16)) == [16, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2],), r"lengths has the shape \(2,\), but must have \(number of examples, 2\)"),
        ((np.zeros((0, 2), dtype=int),), r"lengths has the shape \(0, 2\)"),
        (([[0, 1]],), r"lengths \(int64\) must be integers of at least 1"),
        (([[0.5, 1]],), r"lengths \(float64\) must be integers of at least 1"),
    ],
)
def test_lengths_that_are_none(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        propose_length_buckets(*arguments)
    with pytest.raises(ValueError, match=r"max_signatures \(0\) must be at least 1"):
        propose_length_buckets([[1, 1]], max_signatures=0)
    with pytest.raises(ValueError, match=r"multiple_of \(0\) must be at least 1"):
        propose_length_buckets([[1, 1]], multiple_of=0)
