"""How an Accelerator handles data if the ranks of a tensor-parallel group share a batch."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import recursively_apply
from torch import Tensor


class SharedBatchesMixin(Accelerator):
    """Splits data loaders, metrics and lists of inputs by data-parallel rank; the parent splits by process.

    `gather`, `reduce` and `pad_across_processes` work over all processes, as in the parent: their results contain the
    values of each tensor-parallel group `tensor_parallel_size` times.
    """

    def prepare_data_loader(self, *args: Any, **kwargs: Any) -> Any:
        """Like the parent's.

        Raises:
            ValueError: `dispatch_batches=True` with tensor parallelism, or `even_batches=False`.
        """
        if self.parallelism_config.tp_size > 1:
            if self.dataloader_config.dispatch_batches:
                raise ValueError(
                    f"dispatch_batches (True) would give all data-parallel ranks the same batch with "
                    f"tensor_parallel_size {self.parallelism_config.tp_size}; leave it None"
                )
            # None would mean True for an IterableDataset: docs/upstream/accelerate_dispatched_batches.md
            self.dataloader_config.dispatch_batches = False
        if self.num_processes > 1 and not self.even_batches:
            raise ValueError(
                "even_batches (False) lets ranks have different numbers of batches, and those with more would wait for "
                "the others in their collectives; leave it True: gather_for_metrics drops the samples that are added"
            )
        return super().prepare_data_loader(*args, **kwargs)

    def join_uneven_inputs(self, joinables: Any, even_batches: bool | None = None) -> Any:
        """Like the parent's, on one process only.

        Raises:
            ValueError: on several processes: a sharded model has collectives in its forward, in which all ranks must
                take part.
        """
        if self.num_processes > 1:
            raise ValueError(
                "join_uneven_inputs is for DistributedDataParallel, but a sharded model needs all ranks in each "
                "forward; leave it out: data loaders give all ranks the same number of batches"
            )
        return super().join_uneven_inputs(joinables, even_batches)

    @contextlib.contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """Split inputs between data-parallel ranks; ranks of a tensor-parallel group get the same inputs.

        Every rank must call the model the same number of times, so there must be inputs for all, or `apply_padding`.
        """
        tp_size = self.parallelism_config.tp_size
        rank: Any = SimpleNamespace(
            num_processes=self.num_processes // tp_size, process_index=self.process_index // tp_size, device=self.device
        )
        with PartialState.split_between_processes(rank, inputs, apply_padding) as share:
            yield share

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather the values of each sample once, in the order of the data, on all ranks."""
        tp_size = self.parallelism_config.tp_size
        if tp_size == 1:
            return super().gather_for_metrics(input_data, use_gather_object)
        if use_gather_object or not _has_only_tensors(input_data):
            own = input_data if self.process_index % tp_size == 0 else []
            return super().gather_for_metrics(own, use_gather_object=True)
        state = self.gradient_state
        end = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

        def once(gathered: Tensor) -> Tensor:
            by_rank = gathered.unflatten(0, (self.num_processes // tp_size, tp_size, -1))
            return by_rank[:, 0].flatten(0, 1)[:end]

        return recursively_apply(once, self.gather(input_data))


def _has_only_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


__all__ = ["SharedBatchesMixin"]
