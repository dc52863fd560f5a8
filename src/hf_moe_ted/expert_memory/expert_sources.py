"""Sources of experts that are not on the device: main memory, or files."""

import mmap
import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .expert_files import ExpertFiles, Span

_ALIGNMENT = 64
_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable
_NUM_BUFFERS = 3  # so that one can be read while others are copied


class ExpertSource(Protocol):
    """Writes the tensors of experts into other tensors of the same shapes and dtypes."""

    def announce(self, layer: str, experts: Sequence[int]) -> None:
        """Announce what is read next."""

    def put(self, layer: str, expert: int, outs: Mapping[str, Tensor]) -> None:
        """Write one expert's tensors to `outs`, by their names in its module; on a GPU in the current stream."""


class ExpertsInMemory:
    """Experts in main memory, pinned if there is a GPU.

    Args:
        layers: name of each MoE layer -> module with all of its experts.
        device: device on which the model computes.

    Raises:
        RuntimeError: the system does not allow pinning so much memory.
    """

    def __init__(self, layers: Mapping[str, "HostStacks"], device: torch.device):
        self.layers = layers
        if device.type == "cuda":
            pinned: list[Tensor] = []
            weakref.finalize(self, _unpin, pinned).atexit = False
            for stacks in layers.values():
                _pin(stacks.memory)
                pinned.append(stacks.memory)

    def announce(self, layer: str, experts: Sequence[int]) -> None:
        """Nothing to do."""

    def put(self, layer: str, expert: int, outs: Mapping[str, Tensor]) -> None:
        """See [`ExpertSource`]."""
        for name, out in outs.items():
            out.copy_(self.layers[layer].tensors[name][expert], non_blocking=True)


class HostStacks:
    """Tensors of all experts of a layer in their own pages of main memory, so that the pages can be pinned.

    Attributes:
        memory: uint8[bytes], the whole memory.
        tensors: tensors by name, [E, ...], uninitialized.
    """

    def __init__(self, specs: Mapping[str, Tensor]):
        """`specs`: names, shapes and dtypes."""
        sizes = [-(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT for spec in specs.values()]
        self.memory = torch.frombuffer(mmap.mmap(-1, sum(sizes)), dtype=torch.uint8)
        self.tensors = {
            name: part[: spec.nbytes].view(spec.dtype).view(spec.shape)
            for (name, spec), part in zip(specs.items(), self.memory.split(sizes), strict=True)
        }


def _pin(memory: Tensor) -> None:
    """Pin the memory, so that copies run beside the processor; `pin_memory` would round up the size."""
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _FOR_ALL_DEVICES))
    if code:
        raise RuntimeError(
            f"{memory.nbytes:,} bytes of main memory cannot be pinned (CUDA error {code}); use experts_in='files'"
        )


def _unpin(pinned: list[Tensor]) -> None:
    for memory in pinned:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    pinned.clear()


class ExpertsInFiles:
    """Experts that stay in their files.

    Args:
        files: the open files.
        spans: name of each MoE layer -> name of each tensor of its experts -> place of each expert's part.
        dtypes: the same -> dtype in the file.
    """

    def __init__(
        self,
        files: ExpertFiles,
        spans: Mapping[str, Mapping[str, Sequence[Span]]],
        dtypes: Mapping[str, Mapping[str, torch.dtype]],
    ):
        self._files, self._spans, self._dtypes = files, spans, dtypes
        self._buffers = [_Buffer() for _ in range(_NUM_BUFFERS)]

    def announce(self, layer: str, experts: Sequence[int]) -> None:
        """See [`ExpertSource`]."""
        self._files.announce(spans[expert] for expert in experts for spans in self._spans[layer].values())

    def put(self, layer: str, expert: int, outs: Mapping[str, Tensor]) -> None:
        """See [`ExpertSource`].

        Raises:
            ExpertFilesChangedError: a file was changed or truncated since it was opened.
        """
        spans = {name: self._spans[layer][name][expert] for name in outs}
        dtypes = self._dtypes[layer]
        direct = {name: out for name, out in outs.items() if out.device.type == "cpu" and out.dtype == dtypes[name]}
        self._buffers.append(self._buffers.pop(0))
        buffer = self._buffers[0]
        others = buffer.like({name: out for name, out in outs.items() if name not in direct}, dtypes)
        self._files.read_into(spans, direct | others)
        for name, tensor in others.items():
            outs[name].copy_(tensor, non_blocking=True)
        if others:
            buffer.is_read_by(next(iter(outs.values())).device)


class _Buffer:
    """Main memory for data from files on its way to a GPU or to another dtype."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._is_free: torch.cuda.Event | None = None

    def like(self, outs: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Tensors with the shapes of others; no copy reads them any more."""
        if self._is_free is not None:
            self._is_free.synchronize()
        for name, out in outs.items():
            old = self._tensors.get(name)
            if old is None or old.shape != out.shape or old.dtype != dtypes[name]:
                is_pinned = out.device.type == "cuda"
                self._tensors[name] = torch.empty(out.shape, dtype=dtypes[name], pin_memory=is_pinned)
        return {name: self._tensors[name] for name in outs}

    def is_read_by(self, device: torch.device) -> None:
        """Record that the current stream of a GPU copies the tensors."""
        if device.type == "cuda":
            self._is_free = torch.cuda.Event()
            self._is_free.record()


__all__ = ["ExpertSource", "ExpertsInFiles", "ExpertsInMemory", "HostStacks"]
