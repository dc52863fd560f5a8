"""Few shapes for many lengths: buckets of source and target lengths, and the pairs of buckets for batches.

Shape letters: N examples, C pairs of buckets in which examples are ("cells"), K pairs of batches.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from .number_checks import require_integer

MAX_SIGNATURES = 24
_MAX_BUCKETS = 64  # pairs of them are compared with each other, 64 ** 4 comparisons
_EAGER_COST = 2.0  # a token of a batch that is no signature costs about as much as two of one that is


class BatchSignature(NamedTuple):
    """The shape of a batch of one data-parallel rank.

    Attributes:
        num_rows: number of examples and rows of padding.
        source_length: padded tokens of each source.
        target_length: padded tokens of each target.
    """

    num_rows: int
    source_length: int
    target_length: int

    @property
    def num_tokens(self) -> int:
        """Tokens of source, target and padding."""
        return self.num_rows * (self.source_length + self.target_length)


def check_length_buckets(buckets: Iterable[Any]) -> list[int]:
    """Check the buckets, and return them as a list of ints.

    Raises:
        ValueError: there are no buckets or more than 64, one is not a positive integer, or they do not ascend.
    """
    if isinstance(buckets, str) or not isinstance(buckets, Iterable):
        raise ValueError(f"length_buckets ({buckets!r}) must be a list of lengths in tokens, such as [16, 32, 64]")
    checked = [require_integer("a length of length_buckets", bucket, 1) for bucket in buckets]
    if not 0 < len(checked) <= _MAX_BUCKETS:
        raise ValueError(f"length_buckets has {len(checked)} lengths, but must have 1 to {_MAX_BUCKETS}")
    if checked != sorted({*checked}):
        raise ValueError(f"length_buckets ({checked}) must be in ascending order, each length once")
    return checked


def in_buckets(lengths_N2: np.ndarray, buckets: list[int]) -> np.ndarray:
    """int64[N, 2], lengths of source and target, rounded up to buckets.

    Raises:
        ValueError: a length is greater than the last bucket.
    """
    longest = int(lengths_N2.max(initial=0))
    if longest > buckets[-1]:
        raise ValueError(
            f"length_buckets ends at {buckets[-1]}, but a text has {longest} tokens; add a bucket of {longest} or "
            "more, or let the collator truncate texts to the last bucket (max_length)"
        )
    return np.array(buckets)[np.searchsorted(buckets, lengths_N2)]


def choose_signatures(
    padded_N2: np.ndarray,
    max_tokens: int,
    *,
    weights_N: np.ndarray | None = None,
    max_signatures: int = MAX_SIGNATURES,
    num_ranks: int = 1,
) -> list[BatchSignature]:
    """Choose batch shapes for the least padding; those with fewer tokens per row come first.

    A batch of a signature takes examples of its lengths and shorter ones. Signatures are added one by one, each time
    the one that saves most tokens. Then each is exchanged for a better one as long as that saves tokens. A signature
    that would save less than a batch of each rank is not added; the few examples that are longer than all signatures
    come in batches of other shapes. The result follows from the arguments alone, so all ranks choose the same.

    Args:
        padded_N2: lengths of source and target from `in_buckets`.
        max_tokens: most tokens of a batch.
        weights_N: how often each example comes; by default once.
        max_signatures: largest number of signatures.
        num_ranks: data-parallel ranks; in a step all have a batch of the same signature.
    """
    pairs_C2, counts_C = count_pairs(padded_N2, weights_N)
    chosen = _choose_pairs(pairs_C2, counts_C, max_signatures, min_gain=float(num_ranks * max_tokens))
    signatures = [
        BatchSignature(max_tokens // (source + target), source, target) for source, target in pairs_C2[chosen].tolist()
    ]
    return sorted(signatures, key=lambda signature: (signature.source_length + signature.target_length, signature))


def _choose_pairs(pairs_C2: np.ndarray, counts_C: np.ndarray, max_pairs: int, min_gain: float) -> list[int]:
    """Indices of the pairs to keep (facility location: open one by one, then exchange)."""
    tokens_C = pairs_C2.sum(axis=1)
    covers_CC = (pairs_C2[None] >= pairs_C2[:, None]).all(axis=2)  # [example, pair to which it may be padded]
    cost_CC = np.where(covers_CC, tokens_C[None], np.inf) * counts_C[:, None]
    eager_C = _EAGER_COST * tokens_C * counts_C
    chosen: list[int] = []
    cost_C = eager_C
    while len(chosen) < min(max_pairs, len(pairs_C2)):
        best, total = _best_addition(cost_C, cost_CC)
        if chosen and cost_C.sum() - total < min_gain:
            break
        chosen.append(best)
        cost_C = np.minimum(cost_C, cost_CC[:, best])
    return _exchange(chosen, cost_CC, eager_C)


def _exchange(chosen: list[int], cost_CC: np.ndarray, eager_C: np.ndarray) -> list[int]:
    """Exchange pairs in turn for better ones, until a round saves less than one part in 1,000."""
    total = np.inf
    while True:
        before = total
        for place in range(len(chosen)):
            others = chosen[:place] + chosen[place + 1 :]
            cost_C = np.minimum(eager_C, cost_CC[:, others].min(axis=1, initial=np.inf))
            chosen[place], total = _best_addition(cost_C, cost_CC)
        if not total < (1 - 1e-3) * before:
            return chosen


def _best_addition(cost_C: np.ndarray, cost_CC: np.ndarray) -> tuple[int, float]:
    """The best pair to add, if each example now costs `cost_C`, and the total cost with it."""
    totals_C = np.minimum(cost_C[:, None], cost_CC).sum(axis=0)
    best = int(totals_C.argmin())
    return best, float(totals_C[best])


def propose_length_buckets(lengths: Any, *, max_signatures: int = MAX_SIGNATURES, multiple_of: int = 2) -> list[int]:
    """Propose `length_buckets` that leave little padding in batches of `max_signatures` shapes.

    They are the lengths in the best shapes if a length may be any multiple, with up to 1/16 extra for long texts. More
    signatures and a smaller multiple leave less padding.

    Args:
        lengths: int[num_examples, 2], tokens of source and target, from [`token_lengths`].
        max_signatures: number of batch shapes.
        multiple_of: all buckets are multiples of it.

    Raises:
        ValueError: `lengths` are invalid, or a number is not positive.
    """
    lengths_N2 = check_lengths(lengths)
    require_integer("max_signatures", max_signatures, 1)
    require_integer("multiple_of", multiple_of, 1)
    longest = int(lengths_N2.max())
    last = -(-longest // multiple_of) * multiple_of
    grid = [multiple_of]
    while grid[-1] < last:
        step = max(multiple_of, grid[-1] // 16 // multiple_of * multiple_of)
        grid.append(min(grid[-1] + step, last))
    pairs_C2, counts_C = count_pairs(in_buckets(lengths_N2, grid))
    chosen = _choose_pairs(pairs_C2, counts_C, max_signatures, min_gain=0.0)
    return sorted(
        {*pairs_C2[chosen].ravel().tolist(), last}
    )  # the last bucket is for texts that are longer than all others


def count_pairs(padded_N2: np.ndarray, weights_N: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs of lengths int64[C, 2], and how often each occurs, float64[C]."""
    numbers_N = padded_N2[:, 0].astype(np.int64) * (int(padded_N2.max(initial=0)) + 1) + padded_N2[:, 1]
    numbers_C, inverse_N = np.unique(numbers_N, return_inverse=True)
    counts_C = np.bincount(inverse_N, weights=weights_N, minlength=len(numbers_C)).astype(np.float64)
    return np.stack(np.divmod(numbers_C, int(padded_N2.max(initial=0)) + 1), axis=1), counts_C


def check_lengths(lengths: Any) -> np.ndarray:
    """Check lengths int[N, 2] of source and target.

    Raises:
        ValueError: they have another form.
    """
    lengths_N2 = np.asarray(lengths)
    if lengths_N2.ndim != 2 or lengths_N2.shape[1] != 2 or not len(lengths_N2):
        raise ValueError(f"lengths has the shape {lengths_N2.shape}, but must have (number of examples, 2)")
    if lengths_N2.dtype.kind not in "iu" or lengths_N2.min() < 1:
        raise ValueError(f"lengths ({lengths_N2.dtype}) must be integers of at least 1, tokens of source and target")
    return lengths_N2


__all__ = [
    "MAX_SIGNATURES",
    "BatchSignature",
    "check_length_buckets",
    "check_lengths",
    "choose_signatures",
    "count_pairs",
    "in_buckets",
    "propose_length_buckets",
]
