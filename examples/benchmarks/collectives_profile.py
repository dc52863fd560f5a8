"""What the collectives of a training step move, and how long they and other kernels take."""

from collections import defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = {
    "all_to_all": ("all_to_all", "alltoall", "SendRecv"),
    "all_gather": ("all_gather", "allgather", "AllGather"),
    "reduce_scatter": ("reduce_scatter", "ReduceScatter"),
    "all_reduce": ("all_reduce", "allreduce", "AllReduce"),
}


def kind_of(name: str) -> str | None:
    return next((kind for kind, words in _KINDS.items() if any(word in name for word in words)), None)


class CollectiveBytes(TorchDispatchMode):
    """Bytes of the inputs of this rank's collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, torch.distributed.tensor.DTensor) for t in types):
            return NotImplemented
        kind = kind_of(func.name()) if func.namespace in ("c10d", "_c10d_functional") else None
        if kind is not None:
            inputs = (
                args[1] if func._opname in ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_") else args[0]
            )
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
            self.bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def collectives_of(step: Any, counts_bytes: bool = True) -> dict[str, Any]:
    """Bytes and device milliseconds of one step by kind of collective, and kernel time in all.

    Args:
        counts_bytes: not for a replayed CUDA graph, of which Python sees no operation.
    """
    result: dict[str, Any] = {}
    if counts_bytes:
        with CollectiveBytes() as counter:
            step()
        result["collective_mb"] = {kind: size / 1e6 for kind, size in counter.bytes.items()}
    if not torch.cuda.is_available():
        return result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    milliseconds: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent = event.device_time_total / 1e3
            kind = kind_of(event.name) if "nccl" in event.name.lower() else None
            milliseconds[kind or "compute"] += spent
            kernels[event.name[:80]] += spent
    top = dict(sorted(kernels.items(), key=lambda item: -item[1])[:12])
    return result | {"device_ms": dict(milliseconds), "top_kernels_ms": top}


__all__ = ["collectives_of"]
