"""TokenBudgetBatchSampler: epochs of a multitask mixture, in batches of similar length with a budget of tokens."""

from collections.abc import Iterator
from itertools import chain

import numpy as np
from torch.utils.data import Sampler

from .collator import DataCollatorForMultitaskSeq2Seq
from .mixture import Mixture, apportion
from .multitask_dataset import Draw, MultitaskDataset
from .number_checks import require_integer
from .progress import progress_bar

_CHUNK = 10_000  # examples that are tokenized at once, or whose lengths are Python numbers at once


class TokenBudgetBatchSampler(Sampler[list[Draw]]):
    """Batches of a [`MultitaskDataset`] with at most `max_tokens_per_batch` tokens, source and target and padding.

    An epoch draws `examples_per_epoch` examples, of each component its share by the mixture. A component goes through
    all its examples in a random order before one comes again, from one epoch to the next, too; with a temperature of 1
    and no weights every example comes once per epoch. Examples of similar lengths make a batch and batches come in
    random order.

    All of it follows from `seed` and the epoch, so that skipping batches resumes exactly, noise included. Every epoch
    has as many batches as the first: what later ones have more (with a temperature, as lengths differ) is left out, and
    what they lack is repeated.

    It is a batch sampler for a `DataLoader`, which Accelerate spreads over data-parallel ranks; ranks of a
    tensor-parallel group get the same batches. If there are fewer batches than ranks, some are repeated.

    Args:
        dataset: what is drawn from.
        collator: that of the data loader.
        max_tokens_per_batch: tokens of one batch of one data-parallel rank.
        mixture: how often components are drawn.
        examples_per_epoch: by default those of the dataset.
        seed: of everything random.
        lengths: int[len(dataset), 2], what `token_lengths` counts, which it does if they are not given.

    Raises:
        ValueError: a budget that is less than the longest example, an epoch without examples, lengths that are none, or
            what `Mixture.probabilities` raises.
    """

    def __init__(
        self,
        dataset: MultitaskDataset,
        collator: DataCollatorForMultitaskSeq2Seq,
        max_tokens_per_batch: int,
        *,
        mixture: Mixture | None = None,
        examples_per_epoch: int | None = None,
        seed: int = 0,
        lengths: np.ndarray | None = None,
    ):
        self.dataset = dataset
        self.max_tokens_per_batch = max_tokens_per_batch
        self.mixture = Mixture() if mixture is None else mixture
        self.examples_per_epoch = len(dataset) if examples_per_epoch is None else examples_per_epoch
        self.seed = seed
        require_integer("examples_per_epoch", self.examples_per_epoch, 1)
        require_integer("max_tokens_per_batch", max_tokens_per_batch, 1)
        require_integer("seed", seed, 0)
        self.lengths = token_lengths(dataset, collator) if lengths is None else np.asarray(lengths)
        if self.lengths.shape != (len(dataset), 2):
            raise ValueError(f"lengths has the shape {self.lengths.shape}, it must be ({len(dataset)}, 2)")
        if self.lengths.dtype.kind not in "iu" or self.lengths.min() < 1:
            raise ValueError(f"lengths ({self.lengths.dtype}) must be integers from 1 up, tokens of source and target")
        self.padded_lengths = padded_lengths(self.lengths, collator, max_tokens_per_batch)
        order = np.argsort(dataset.component_numbers, kind="stable")
        self._examples_of = np.split(order, np.cumsum(dataset.sizes)[:-1])
        self._num_batches = len(self._batches_of(0))

    def __len__(self) -> int:
        return self._num_batches

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate and the Trainer; the dataset keeps it, as they do not always reach a batch sampler."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Draw]]:
        batches = self._batches_of(self.dataset.epoch)
        for number in range(self._num_batches):
            yield [Draw(*draw) for draw in batches[number % len(batches)].tolist()]

    def component_counts(self, epoch: int) -> np.ndarray:
        """int64[num_components], examples that an epoch draws of each."""
        tasks = [component.task for component in self.dataset.components]
        probabilities = self.mixture.probabilities(tasks, self.dataset.sizes, epoch)
        return apportion(probabilities, self.examples_per_epoch)

    def draws(self, epoch: int) -> np.ndarray:
        """int64[examples_per_epoch, 2], fields of the [`Draw`]s of an epoch, by component."""
        counts = self.component_counts(epoch)
        num_before = np.zeros_like(counts)  # that earlier epochs drew, as the order of a component goes on from there
        for earlier in range(epoch):
            num_before += self.component_counts(earlier)
        drawn = []
        for number, (start, count) in enumerate(zip(num_before.tolist(), counts.tolist(), strict=True)):
            noise_seeds = np.random.default_rng([self.seed, 1, number, epoch]).integers(2**63, size=count)
            drawn.append(np.stack([self._examples_in_turn(number, start, count), noise_seeds], axis=1))
        return np.concatenate(drawn)

    def _examples_in_turn(self, number: int, start: int, count: int) -> np.ndarray:
        """int64[count], examples of a component from a place on in its endless order, a shuffle after the other."""
        examples = self._examples_of[number]
        first, last = start // len(examples), -(-(start + count) // len(examples))
        shuffled = [
            np.random.default_rng([self.seed, 0, number, cycle]).permutation(examples) for cycle in range(first, last)
        ]
        skipped = start - first * len(examples)
        return np.concatenate([examples[:0], *shuffled])[skipped : skipped + count]

    def _batches_of(self, epoch: int) -> list[np.ndarray]:
        """int64[size, 2] arrays of draws, in the order of the epoch."""
        random = np.random.default_rng([self.seed, 2, epoch])
        draws = self.draws(epoch)
        lengths = self.padded_lengths[draws[:, 0]]
        return [draws[batch] for batch in batches_by_length(lengths, self.max_tokens_per_batch, random)]


def padded_lengths(lengths: np.ndarray, collator: DataCollatorForMultitaskSeq2Seq, max_tokens: int) -> np.ndarray:
    """Lengths int[N, 2] of source and target as the collator pads them.

    Raises:
        ValueError: one is longer than a batch of `max_tokens`.
    """
    multiple = collator.pad_to_multiple_of or 1
    padded = -(-lengths // multiple) * multiple
    longest = int(padded.sum(axis=1).max())
    if longest > max_tokens:
        raise ValueError(
            f"max_tokens_per_batch ({max_tokens}) is less than the tokens of one example, {longest} of source and "
            f"target with padding; raise it, or lower max_length ({collator.max_length}) of the collator"
        )
    return padded


def batches_by_length(lengths: np.ndarray, max_tokens: int, random: np.random.Generator) -> list[np.ndarray]:
    """Numbers of examples in batches of similar length, in random order.

    Args:
        lengths: int[N, 2], padded tokens of source and target of each example.
        max_tokens: of a batch, as of `batch_ends`.
        random: for examples of equal length, and the order of the batches.
    """
    # By the longer side: to sort by both saves some padding more, but then a batch has few languages and tasks, as the
    # one that is longer in tokens mostly stands on the same side.
    order = np.lexsort((random.random(len(lengths)), lengths.max(axis=1)))
    batches = np.split(order, batch_ends(lengths[order], max_tokens)[:-1])
    return [batches[number] for number in random.permutation(len(batches))]


def batch_ends(lengths: np.ndarray, max_tokens: int) -> list[int]:
    """Where batches end that take as many examples, in their order, as fit with padding.

    Args:
        lengths: int[N, 2], tokens of source and target.
        max_tokens: at most `(longest source + longest target) * examples` of a batch; more only for one example alone.
    """
    ends = []
    start = source = target = 0
    chunks = (lengths[first : first + _CHUNK].tolist() for first in range(0, len(lengths), _CHUNK))
    for place, (example_source, example_target) in enumerate(chain.from_iterable(chunks)):
        source, target = max(source, example_source), max(target, example_target)
        if place > start and (source + target) * (place + 1 - start) > max_tokens:
            ends.append(place)
            start, source, target = place, example_source, example_target
    return [*ends, len(lengths)]


def token_lengths(dataset: MultitaskDataset, collator: DataCollatorForMultitaskSeq2Seq) -> np.ndarray:
    """int32[len(dataset), 2], tokens of source and target of each example, tags included."""
    lengths = np.empty((len(dataset), 2), dtype=np.int32)
    with progress_bar(total=len(dataset), desc="Counting tokens", unit="example") as progress:
        for start in range(0, len(dataset), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(dataset)))
            lengths[chunk.start : chunk.stop] = collator.lengths(dataset.__getitems__(chunk))
            progress.update(len(chunk))
    return lengths


__all__ = ["TokenBudgetBatchSampler", "batch_ends", "batches_by_length", "padded_lengths", "token_lengths"]
