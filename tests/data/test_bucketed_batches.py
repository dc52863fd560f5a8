"""What holds for batches of few shapes, whatever the lengths, and for their statistics."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from hf_moe_ted.data.batch_statistics import batch_statistics
from hf_moe_ted.data.bucketed_batches import PADDING, Batch, bucketed_batches, signature_numbers
from hf_moe_ted.data.length_buckets import BatchSignature, choose_signatures, in_buckets


def case_of(seed: int) -> tuple[np.ndarray, list[BatchSignature], int, int, np.random.Generator]:
    """Padded lengths, signatures, tokens of a batch, ranks, and what is random."""
    random = np.random.default_rng(seed)
    num_examples = int(random.choice([1, 2, 5, 40, 1000]))
    buckets = [*np.unique(random.integers(1, 60, size=random.integers(1, 8))).tolist(), 60]
    padded = in_buckets(random.integers(1, 61, size=(num_examples, 2)), buckets)
    max_tokens, num_ranks = int(random.integers(120, 900)), int(random.integers(1, 5))
    signatures = choose_signatures(padded, max_tokens, max_signatures=int(random.integers(1, 9)), num_ranks=num_ranks)
    return padded, signatures, max_tokens, num_ranks, random


@pytest.mark.parametrize("seed", range(60))
def test_what_holds_for_all_lengths(seed: int) -> None:
    padded, signatures, max_tokens, num_ranks, random = case_of(seed)
    batches = bucketed_batches(padded, signatures, max_tokens, num_ranks, random)
    places = np.concatenate([batch.places for batch in batches])
    assert sorted(places[places != PADDING].tolist()) == [*range(len(padded))]  # each example once
    assert len(batches) % num_ranks == 0
    for start in range(0, len(batches), num_ranks):
        shapes = {(len(batch.places), batch.padded_lengths) for batch in batches[start : start + num_ranks]}
        assert len(shapes) == 1  # all ranks alike
        run = np.concatenate([batch.places for batch in batches[start : start + num_ranks]])
        assert (run == PADDING).sum() < num_ranks and (run != PADDING).any()
    for batch in batches:
        source, target = batch.padded_lengths
        assert len(batch.places) * (source + target) <= max_tokens
        assert (padded[batch.places[batch.places != PADDING]] <= [source, target]).all()
    # what is no signature is less than a step of each signature, and what fits none of them
    num_left = sum(len(b.places) for b in batches if (len(b.places), *b.padded_lengths) not in {*signatures})
    num_homeless = (signature_numbers(padded, signatures) == len(signatures)).sum()
    rest_of_each = sum(num_ranks * rows for rows, _, _ in signatures)
    assert num_left <= rest_of_each + num_homeless + num_ranks * len(batches)


def test_what_is_over_goes_on_to_larger_signatures() -> None:
    signatures = [BatchSignature(4, 10, 10), BatchSignature(4, 20, 10), BatchSignature(2, 20, 20)]
    padded = np.array([[10, 10]] * 5 + [[20, 10]] * 4 + [[20, 20]] * 1)
    batches = bucketed_batches(padded, signatures, 80, 1, np.random.default_rng(0))
    shapes = Counter((len(batch.places), *batch.padded_lengths) for batch in batches)
    assert shapes == {(4, 10, 10): 1, (4, 20, 10): 1, (2, 20, 20): 1}
    by_shape = {batch.padded_lengths: batch.places for batch in batches}
    assert (by_shape[20, 10] < 5).sum() == 1  # the fifth short one, in the first batch that it fits
    assert sorted(by_shape[20, 20].tolist())[-1] == 9  # and one of its neighbours went on in its place


def test_batches_follow_from_the_random_numbers() -> None:
    padded, signatures, max_tokens, num_ranks, _ = case_of(3)
    first, again, other = (
        bucketed_batches(padded, signatures, max_tokens, num_ranks, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert [batch.places.tolist() for batch in first] == [batch.places.tolist() for batch in again]
    assert [batch.places.tolist() for batch in first] != [batch.places.tolist() for batch in other]


def test_statistics_are_those_of_the_padded_batches() -> None:
    lengths = np.array([[3, 4], [5, 2], [1, 1], [8, 9]])
    batches: list[Any] = [
        Batch(np.array([0, 1]), (8, 8)),
        Batch(np.array([2, PADDING]), (8, 8)),
        Batch(np.array([3]), (8, 12)),
        Batch(np.array([0, 2])),  # as long as its longest
    ]
    statistics = batch_statistics(batches, lengths, [BatchSignature(2, 8, 8), BatchSignature(9, 9, 9)], num_ranks=2)
    assert [shape.signature for shape in statistics.signatures] == [(2, 8, 8)]
    assert [shape.signature for shape in statistics.leftovers] == [(1, 8, 12), (2, 3, 4)]
    assert (statistics.num_batches, statistics.num_steps) == (4, 2)
    assert (statistics.num_tokens, statistics.num_padded_tokens) == (14 + 2 + 17 + 9, 2 * 32 + 20 + 14)
    assert statistics.padding_share == pytest.approx(1 - 42 / 98)
    assert statistics.leftover_share == 0.5
    assert statistics.rows()[0] == {
        "num_rows": 2,
        "source_length": 8,
        "target_length": 8,
        "num_batches": 2,
        "share_of_steps": 0.5,
        "padding_share": 0.75,
    }
    assert statistics.rows()[1]["num_rows"] == "2 other shapes"
    assert "1 signatures, 57.1% padding, 2 steps of 2 data-parallel ranks, 50.0% of them" in str(statistics)
    assert len(str(statistics).splitlines()) == 4
