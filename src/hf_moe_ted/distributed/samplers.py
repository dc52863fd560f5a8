"""The Trainer's samplers, for ranks that share batches and for runs that continue in another layout."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Samples of similar length together, in an order that depends only on the seed and the epoch.

    The parent draws from the generator of the process. Ranks may have different generators, and a resumed run has lost
    its state.

    Args:
        lengths: length of each sample.
        batch_size: samples per step, over all data-parallel ranks.
        seed: seed of the data.
    """

    def __init__(self, lengths: list[int], *, batch_size: int, seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


def for_data_parallel_ranks(
    sampler: Any, *, seed: int, batch_size: int, data_parallel_size: int, data_parallel_rank: int
) -> Sampler | None:
    """A Trainer's sampler in a form that gives all ranks that share a batch the same order.

    Args:
        sampler: the sampler that the Trainer made, or `None`.
        batch_size: samples per step, over all data-parallel ranks.
    """
    if isinstance(sampler, LengthGroupedSampler) and sampler.generator is None:
        return SeededLengthGroupedSampler(sampler.lengths, batch_size=batch_size, seed=seed)
    if isinstance(sampler, BatchRebalanceSampler):  # its ranks are processes, each with its own samples
        return BatchRebalanceSampler(
            sampler.lengths,
            effective_batch_size=batch_size,
            dp_size=data_parallel_size,
            grad_accum=sampler.grad_accum,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            rank=data_parallel_rank,
            drop_last=sampler.drop_last,
        )
    return sampler


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader's sampler the epoch, even if accelerate wrapped it twice, such as to skip batches."""
    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


__all__ = ["SeededLengthGroupedSampler", "for_data_parallel_ranks", "set_epoch"]
