"""What TED uses of torch under private names, with the reason; read in torch 2.13.0.

Named elsewhere, where a name from here would say nothing more:

- `FileSystemReader._slice_file`, overridden in state_metadata.py: the only place that every read of a chunk passes.
- `torch.serialization._get_layout`, `_MEM_FORMAT_ENCODING`, `_StorageInfo`: strings in the pickles of checkpoints.
- `_last_lr`, `_schedulers`: keys of what schedulers return as their `state_dict`.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout as set_group_timeout  # no public one changes a timeout
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard  # what FSDP2 makes of a shard

# the functional collectives as operations: their wrappers in Python cost the host several times as much
c10d: Any = torch.ops._c10d_functional

# an assertion that does not wait for the device
assert_async = torch._assert_async

# one kernel for a list of tensors
foreach_norm = torch._foreach_norm
foreach_mul_ = torch._foreach_mul_


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that another one is a slice of; slices are made anew each time, and only the root stays the same."""
    return mesh._get_root_mesh()


def unflatten(mesh: DeviceMesh, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of one axis as one of several, with their groups."""
    return mesh._unflatten(0, sizes, names)


def world_timeout(device_type: str) -> timedelta:
    """That of the process group that all ranks are in, which `init_process_group` got."""
    world: Any = dist.group.WORLD
    return world._get_backend(torch.device(device_type)).options._timeout


def local_of(param: Tensor) -> tuple[Tensor, Any]:
    """The local tensor of a parameter and its spec, `None` for no DTensor: `to_local` without its autograd function."""
    return (param._local_tensor, param._spec) if isinstance(param, DTensor) else (param, None)


def dtensor_of(local: Tensor, spec: Any) -> DTensor:
    """The reverse of [`local_of`], without a gradient: `from_local` without its."""
    return DTensor(local, spec, requires_grad=False)


def parameter_table(module: nn.Module) -> dict[str, Any]:
    """The parameters of a module as it looks them up: here plain tensors can stand in their place for a while."""
    return module._parameters


__all__ = [
    "StridedShard",
    "assert_async",
    "c10d",
    "dtensor_of",
    "foreach_mul_",
    "foreach_norm",
    "local_of",
    "parameter_table",
    "root_mesh",
    "set_group_timeout",
    "unflatten",
    "world_timeout",
]
