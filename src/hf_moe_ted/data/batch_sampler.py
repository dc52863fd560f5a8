"""TokenBudgetBatchSampler: epochs of a multitask mixture, in batches of similar length with a token budget."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from .batch_statistics import BatchStatistics, batch_statistics
from .bucketed_batches import PADDING, Batch, bucketed_batches
from .collator import DataCollatorForMultitaskSeq2Seq
from .length_buckets import MAX_SIGNATURES, BatchSignature, choose_signatures
from .mixture import Mixture, apportion
from .multitask_dataset import Draw, MultitaskDataset
from .number_checks import require_integer
from .progress import progress_bar
from .token_budget import batch_ends, batches_by_length, checked_buckets, padded_lengths

_CHUNK = 10_000  # number of examples that are tokenized at once


class TokenBudgetBatchSampler(Sampler[list[Draw]]):
    """Batches of a [`MultitaskDataset`] with at most `max_tokens_per_batch` tokens of source, target and padding.

    An epoch draws `examples_per_epoch` examples; the mixture gives each component its share. A component goes through
    all its examples in a random order before it repeats one, also across epochs. With a temperature of 1 and no
    weights, every example comes once per epoch. A batch has examples of similar lengths, and batches come in random
    order.

    With `length_buckets` batches have few shapes, the `signatures`: each has a fixed number of rows, and its lengths
    are buckets to which the collator pads. They are chosen once, for the least padding with the mixture after its
    warmup. In each run of `data_parallel_size` batches, one per rank, all have the same shape. Examples that remain at
    the end of an epoch, and a few long texts, are in batches of other shapes, in which a rank may have a row of
    padding.

    Everything follows from `seed` and the epoch, so a run resumes exactly by skipping batches, with the same noise.
    Every epoch has as many batches as the first: extra batches of later epochs (with a temperature lengths differ) are
    left out, and missing ones are repeated.

    It is a batch sampler for a `DataLoader`; Accelerate spreads its batches over data-parallel ranks, and ranks of a
    tensor-parallel group get the same batches. If there are fewer batches than ranks, some are repeated.

    Args:
        dataset: the dataset from which examples are drawn.
        collator: the collator of the data loader.
        max_tokens_per_batch: most tokens of one batch of one data-parallel rank.
        mixture: says how often components are drawn.
        examples_per_epoch: number of examples; by default that of the dataset.
        seed: seed of all random choices.
        length_buckets: lengths in tokens, ascending, to which sources and targets are padded; by default they are
            padded to the longest of a batch.
        max_signatures: largest number of batch shapes with `length_buckets`, without those of remaining examples.
        data_parallel_size: number of ranks over which batches are spread, for `length_buckets`.
        lengths: int[len(dataset), 2] from `token_lengths`; counted here if not given.

    Raises:
        ValueError: the budget is less than the longest example, an epoch has no examples, `lengths` are invalid, a text
            is longer than the last bucket; see also `Mixture.probabilities`.
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
        length_buckets: Sequence[int] | None = None,
        max_signatures: int = MAX_SIGNATURES,
        data_parallel_size: int = 1,
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
        require_integer("max_signatures", max_signatures, 1)
        require_integer("data_parallel_size", data_parallel_size, 1)
        self.data_parallel_size = data_parallel_size
        self.length_buckets = checked_buckets(length_buckets, collator)
        self.lengths = token_lengths(dataset, collator) if lengths is None else np.asarray(lengths)
        if self.lengths.shape != (len(dataset), 2):
            raise ValueError(f"lengths has the shape {self.lengths.shape}, but must have ({len(dataset)}, 2)")
        if self.lengths.dtype.kind not in "iu" or self.lengths.min() < 1:
            raise ValueError(
                f"lengths ({self.lengths.dtype}) must be integers of at least 1, tokens of source and target"
            )
        self.padded_lengths = padded_lengths(self.lengths, collator, max_tokens_per_batch, self.length_buckets)
        self.signatures = [] if self.length_buckets is None else self._choose_signatures(max_signatures)
        order = np.argsort(dataset.component_numbers, kind="stable")
        self._examples_of = np.split(order, np.cumsum(dataset.sizes)[:-1])
        self._num_batches = len(self._batches_of(0))

    def __len__(self) -> int:
        return self._num_batches

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Accelerate and the Trainer call it. The dataset keeps it: they may not reach a sampler."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Draw]]:
        batches = self._batches_of(self.dataset.epoch)
        for number in range(self._num_batches):
            draws, lengths = batches[number % len(batches)]
            yield [Draw(None if example == PADDING else example, seed, lengths) for example, seed in draws.tolist()]

    def statistics(self, epoch: int = 0) -> BatchStatistics:
        """Shapes, batches and padding of an epoch."""
        batches = self._batches_of(epoch)
        taken = [batches[number % len(batches)] for number in range(self._num_batches)]
        of_dataset = [Batch(draws[:, 0], lengths) for draws, lengths in taken]
        return batch_statistics(of_dataset, self.lengths, self.signatures, self.data_parallel_size)

    def component_counts(self, epoch: int) -> np.ndarray:
        """int64[num_components], number of examples that an epoch draws from each."""
        tasks = [component.task for component in self.dataset.components]
        probabilities = self.mixture.probabilities(tasks, self.dataset.sizes, epoch)
        return apportion(probabilities, self.examples_per_epoch)

    def draws(self, epoch: int) -> np.ndarray:
        """int64[examples_per_epoch, 2], fields of the [`Draw`]s of an epoch, by component."""
        counts = self.component_counts(epoch)
        num_before = np.zeros_like(
            counts
        )  # number drawn in earlier epochs; the order of a component continues from there
        for earlier in range(epoch):
            num_before += self.component_counts(earlier)
        drawn = []
        for number, (start, count) in enumerate(zip(num_before.tolist(), counts.tolist(), strict=True)):
            noise_seeds = np.random.default_rng([self.seed, 1, number, epoch]).integers(2**63, size=count)
            drawn.append(np.stack([self._examples_in_turn(number, start, count), noise_seeds], axis=1))
        return np.concatenate(drawn)

    def _examples_in_turn(self, number: int, start: int, count: int) -> np.ndarray:
        """int64[count], examples of a component from a place in its endless order of shuffles."""
        examples = self._examples_of[number]
        first, last = start // len(examples), -(-(start + count) // len(examples))
        shuffled = [
            np.random.default_rng([self.seed, 0, number, cycle]).permutation(examples) for cycle in range(first, last)
        ]
        skipped = start - first * len(examples)
        return np.concatenate([examples[:0], *shuffled])[skipped : skipped + count]

    def _batches_of(self, epoch: int) -> list[tuple[np.ndarray, tuple[int, int] | None]]:
        """Draws int64[num_rows, 2] and padded lengths of each batch, in the order of the epoch."""
        random = np.random.default_rng([self.seed, 2, epoch])
        draws = self.draws(epoch)
        lengths = self.padded_lengths[draws[:, 0]]
        if self.length_buckets is None:
            return [(draws[batch], None) for batch in batches_by_length(lengths, self.max_tokens_per_batch, random)]
        batches = bucketed_batches(lengths, self.signatures, self.max_tokens_per_batch, self.data_parallel_size, random)
        draws = np.concatenate([draws, [[PADDING, 0]]])  # the last row, which the place PADDING selects
        return [(draws[batch.places], batch.padded_lengths) for batch in batches]

    def _choose_signatures(self, max_signatures: int) -> list[BatchSignature]:
        tasks = [component.task for component in self.dataset.components]
        warm = math.ceil(self.mixture.temperature_warmup_epochs)
        probabilities = self.mixture.probabilities(tasks, self.dataset.sizes, warm)
        weights = self.examples_per_epoch * probabilities / self.dataset.sizes
        return choose_signatures(
            self.padded_lengths,
            self.max_tokens_per_batch,
            weights_N=weights[self.dataset.component_numbers],
            max_signatures=max_signatures,
            num_ranks=self.data_parallel_size,
        )


def token_lengths(dataset: MultitaskDataset, collator: DataCollatorForMultitaskSeq2Seq) -> np.ndarray:
    """int32[len(dataset), 2], tokens of source and target of each example, tags included."""
    lengths = np.empty((len(dataset), 2), dtype=np.int32)
    with progress_bar(total=len(dataset), desc="Counting tokens", unit="example") as progress:
        for start in range(0, len(dataset), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(dataset)))
            lengths[chunk.start : chunk.stop] = collator.lengths(dataset.__getitems__(chunk))
            progress.update(len(chunk))
    return lengths


__all__ = ["TokenBudgetBatchSampler", "batch_ends", "token_lengths"]
