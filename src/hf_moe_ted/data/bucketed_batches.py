"""Batches of a few shapes: in a step all data-parallel ranks have the same shape, and no example is left out.

Shape letters: N examples, K signatures.
"""

from dataclasses import dataclass

import numpy as np

from .length_buckets import BatchSignature
from .token_budget import batch_ends

PADDING = -1  # instead of an example: a row of padding only


@dataclass(frozen=True)
class Batch:
    """A batch of one data-parallel rank.

    Attributes:
        places: int64[num_rows], the examples; -1 for a row of padding.
        padded_lengths: tokens to which source and target are padded; `None` for those of the longest.
    """

    places: np.ndarray
    padded_lengths: tuple[int, int] | None = None


def bucketed_batches(
    padded_N2: np.ndarray,
    signatures: list[BatchSignature],
    max_tokens: int,
    num_ranks: int,
    random: np.random.Generator,
) -> list[Batch]:
    """Runs of `num_ranks` batches of the same shape, in random order; every rank takes one batch of each run.

    Each example goes to the signature with the fewest tokens per row that it fits. Examples that do not fill a batch
    for each rank go to the next signature that all of them fit. Examples that remain at the end come in batches of
    other shapes, which are still the same for all ranks; ranks with one example less have a row of padding.

    Args:
        padded_N2: lengths of source and target of each example, rounded up to buckets.
        signatures: signatures in the order of `choose_signatures`.
        max_tokens: most tokens of a batch.
        num_ranks: number of data-parallel ranks.
        random: generator for the grouping of examples and the order of runs.
    """
    homes_N = signature_numbers(padded_N2, signatures)
    shuffled = random.permutation(len(padded_N2))
    waiting = [shuffled[homes_N[shuffled] == number] for number in range(len(signatures) + 1)]
    lengths_K2 = np.array([signature[1:] for signature in signatures]).reshape(-1, 2)
    runs: list[list[Batch]] = []
    for number, (num_rows, *lengths) in enumerate(signatures):
        num_runs, num_over = divmod(len(waiting[number]), num_ranks * num_rows)
        filled, rest = np.split(waiting[number], [len(waiting[number]) - num_over])
        source, target = lengths
        for places in filled.reshape(num_runs, num_ranks, num_rows):
            runs.append([Batch(of_rank, (source, target)) for of_rank in places])
        larger = number + 1 + signature_numbers(lengths_K2[number : number + 1], signatures[number + 1 :])[0]
        waiting[larger] = np.concatenate([rest, waiting[larger]])  # first, so that they do not move again
    runs += _leftover_runs(waiting[-1], padded_N2[waiting[-1]], max_tokens, num_ranks)
    return [batch for number in random.permutation(len(runs)) for batch in runs[number]]


def signature_numbers(lengths_N2: np.ndarray, signatures: list[BatchSignature]) -> np.ndarray:
    """int64[N], the first signature that each example fits; `len(signatures)` for none."""
    numbers_N = np.full(len(lengths_N2), len(signatures))
    for number, (_, source, target) in reversed([*enumerate(signatures)]):
        numbers_N[(lengths_N2[:, 0] <= source) & (lengths_N2[:, 1] <= target)] = number
    return numbers_N


def _leftover_runs(places_N: np.ndarray, padded_N2: np.ndarray, max_tokens: int, num_ranks: int) -> list[list[Batch]]:
    """Runs with as many rows as fit, from examples (in random order) sorted by length."""
    order = np.argsort(padded_N2.max(axis=1), kind="stable")
    runs = []
    start = 0
    for end in batch_ends(padded_N2[order], max_tokens, num_ranks) if len(order) else ():
        of_run, start = order[start:end], end
        dealt = np.full((-(-len(of_run) // num_ranks), num_ranks), PADDING)
        dealt.flat[: len(of_run)] = places_N[of_run]
        source, target = padded_N2[of_run].max(axis=0).tolist()
        runs.append([Batch(of_rank, (source, target)) for of_rank in dealt.T])
    return runs


__all__ = ["PADDING", "Batch", "bucketed_batches", "signature_numbers"]
