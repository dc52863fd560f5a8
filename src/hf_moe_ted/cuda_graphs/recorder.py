"""Record work on a GPU and replay it in the same memory: CUDA graphs, which all share one memory pool."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from .private_torch import end_allocate_to_pool

logger = logging.get_logger(__name__)

T = TypeVar("T")


class Recorder(Protocol):
    """Records calls and replays them."""

    def eager(self) -> contextlib.AbstractContextManager[None]:
        """Context for work that is not replayed."""

    def record(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record a call, without computing. Returns its result, in memory that replays overwrite, and the replay.

        Raises:
            torch.OutOfMemoryError: the memory of the device is too small.
            RuntimeError: the call does something that cannot be recorded, such as waiting for the device.
        """

    def borrow(self, tensor: Tensor) -> Tensor:
        """The same memory without ownership: it is valid until the next replay or record."""

    def forget(self) -> None:
        """Free the memory; recorded calls can no longer be replayed."""


class CudaRecorder:
    """[`Recorder`] with CUDA graphs in one memory pool, which is as large as the largest graph.

    Graphs share their working memory, so only one runs at a time, and its results must be used before the next one
    runs.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        # the stream of captures: autograd adds up gradients on the stream that first used the parameter, and a capture
        # must not depend on another stream
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        # "thread_local": NCCL's watchdog thread queries events during the capture
        options: Any = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        # a failed capture leaves its own stream as the current one
        current = torch.cuda.stream(torch.cuda.current_stream())
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._end_failed_capture, graph)
            with current, _without_garbage_collection(), torch.cuda.graph(graph, **options):
                returned = call()
            on_failure.pop_all()
        return returned, graph.replay

    def _end_failed_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        """Clean up after a capture that CUDA ended, which happens if the call waits for the device.

        The allocator still believes that the capture is running, with a pointer to the graph. Up to PyTorch 2.11 the
        random generator also waits for its end: "Offset increment outside graph capture encountered unexpectedly".
        """
        self._failed.append(graph)
        try:
            end_allocate_to_pool(self._stream.device_index, self._pool)
        except RuntimeError:
            logger.debug("the capture that failed had ended before")
        finished = torch.cuda.CUDAGraph()
        number = torch.ones((), device=self._stream.device)
        with torch.cuda.graph(finished, stream=self._stream, capture_error_mode="thread_local"):
            number.zero_()

    def borrow(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return _view_of_memory(tensor)
        return DTensor.from_local(
            _view_of_memory(tensor.to_local()),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Turn garbage collection off: no object of a stream or a graph may be freed during a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class _Memory:
    """Bytes on a GPU in the interface for other libraries' memory, which PyTorch does not own."""

    __cuda_array_interface__: dict[str, Any]


def _view_of_memory(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    interface = {
        "shape": (span * tensor.element_size(),),
        "typestr": "|u1",
        "data": (tensor.data_ptr(), False),
        "strides": None,
        "version": 2,
    }
    flat = torch.as_tensor(_Memory(interface), device=tensor.device).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride())


__all__ = ["CudaRecorder", "Recorder"]
