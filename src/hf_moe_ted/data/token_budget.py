"""Batches of similar length with a token budget."""

from itertools import chain
from typing import Any

import numpy as np

from .collator import DataCollatorForMultitaskSeq2Seq
from .length_buckets import check_length_buckets, in_buckets

_CHUNK = 10_000  # number of examples whose lengths are Python numbers at once


def padded_lengths(
    lengths: np.ndarray, collator: DataCollatorForMultitaskSeq2Seq, max_tokens: int, buckets: list[int] | None = None
) -> np.ndarray:
    """Padded lengths int[N, 2] of source and target, up to buckets or as in the collator.

    Raises:
        ValueError: an example is longer than a batch of `max_tokens` or than all buckets, or its bucket exceeds the
            model's positions.
    """
    multiple = collator.pad_to_multiple_of or 1
    padded = -(-lengths // multiple) * multiple if buckets is None else in_buckets(lengths, buckets)
    longest = int(padded.sum(axis=1).max())
    if longest > max_tokens:
        raise ValueError(
            f"max_tokens_per_batch ({max_tokens}) is less than the tokens of one example, {longest} of source and "
            f"target with padding; raise it, or lower max_length ({collator.max_length}) of the collator"
        )
    if buckets is not None and padded.max() > (max_positions := collator.max_positions or np.inf):
        raise ValueError(
            f"length_buckets pads a text of {lengths.max()} tokens to {padded.max()}, but the model has positions for "
            f"{max_positions} (max_position_embeddings); add a bucket between them"
        )
    return padded


def checked_buckets(length_buckets: Any, collator: DataCollatorForMultitaskSeq2Seq) -> list[int] | None:
    """The checked buckets; `None` without buckets.

    Raises:
        ValueError: see `check_length_buckets`; or the collator would pad a bucket further.
    """
    if length_buckets is None:
        return None
    buckets = check_length_buckets(length_buckets)
    multiple = collator.pad_to_multiple_of or 1
    if odd := [bucket for bucket in buckets if bucket % multiple]:
        raise ValueError(
            f"length_buckets ({odd}) must be multiples of pad_to_multiple_of ({multiple}) of the collator; leave "
            "pad_to_multiple_of out, because length_buckets replace it"
        )
    return buckets


def batches_by_length(lengths: np.ndarray, max_tokens: int, random: np.random.Generator) -> list[np.ndarray]:
    """Numbers of examples in batches of similar length, in random order.

    Args:
        lengths: int[N, 2], padded tokens of source and target of each example.
        max_tokens: most tokens of a batch, see `batch_ends`.
        random: generator for the order of examples of equal length and of batches.
    """
    # Sort by the longer side. Sorting by both sides would save some more padding, but then a batch would have few
    # languages and tasks, because one language is usually longer in tokens than the other.
    order = np.lexsort((random.random(len(lengths)), lengths.max(axis=1)))
    batches = np.split(order, batch_ends(lengths[order], max_tokens)[:-1])
    return [batches[number] for number in random.permutation(len(batches))]


def batch_ends(lengths: np.ndarray, max_tokens: int, num_ranks: int = 1) -> list[int]:
    """Ends of batches that take as many consecutive examples as fit with padding.

    Args:
        lengths: int[N, 2], tokens of source and target.
        max_tokens: at most `(longest source + longest target) * examples` of a batch; only a single example may exceed
            it.
        num_ranks: ranks that share the examples of a batch, each with at most `max_tokens`.
    """
    ends = []
    start = source = target = 0
    chunks = (lengths[first : first + _CHUNK].tolist() for first in range(0, len(lengths), _CHUNK))
    for place, (example_source, example_target) in enumerate(chain.from_iterable(chunks)):
        source, target = max(source, example_source), max(target, example_target)
        if place > start and (source + target) * -(-(place + 1 - start) // num_ranks) > max_tokens:
            ends.append(place)
            start, source, target = place, example_source, example_target
    return [*ends, len(lengths)]


__all__ = ["batch_ends", "batches_by_length", "checked_buckets", "padded_lengths"]
