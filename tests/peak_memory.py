"""Memory that a piece of code allocates for tensors."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts bytes of the storages that are made inside: those alive, and the most there ever were at once.

    Memory-mapped files do not count. What a kernel allocates for itself is not seen.

    Attributes:
        peak: bytes.
        num_calls: operations that were run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.num_calls = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        known = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            key = storage._cdata
            if key not in known and key not in self._alive and storage.filename is None:
                self._alive[key] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, key)
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
