"""A recorder without a GPU: it computes again where a CUDA graph would replay, and is as careless with memory."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree


class FakeRecorder:
    """As `CudaRecorder`: what a call returned is in memory that the next replay of any call writes over.

    Args:
        errors: raised by the calls of `record`, in turn, after their work; `None` for none.
    """

    def __init__(self, errors: list[Exception | None] | None = None):
        self.errors = errors or []
        self.num_recorded = 0
        self.is_cleared = 0
        self._outputs: list[list[Tensor]] = []

    def eager(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        state = torch.get_rng_state()
        returned = call()
        torch.set_rng_state(state)  # a capture draws nothing
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        self.num_recorded += 1
        fixed = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
        self._outputs.append(fixed)

        def replay() -> None:
            again = [leaf for leaf in pytree.tree_leaves(call()) if isinstance(leaf, Tensor)]
            self._poison()
            for output, computed in zip(fixed, again, strict=True):
                _local(output).copy_(_local(computed))

        self._poison()
        return returned, replay

    def borrow(self, tensor: Tensor) -> Tensor:
        return tensor

    def forget(self) -> None:
        self.is_cleared += 1

    @torch.no_grad()
    def _poison(self) -> None:
        for output in (output for outputs in self._outputs for output in outputs):
            if output.is_floating_point():
                _local(output).fill_(torch.nan)
            else:
                _local(output).fill_(1)


class RecordsWithoutGpu:
    """Before a Trainer that records its steps: on any device, by [`FakeRecorder`]."""

    recorder: FakeRecorder

    def _check_can_capture(self) -> None:
        pass

    def _make_recorder(self) -> FakeRecorder:
        self.recorder = FakeRecorder()
        return self.recorder


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
