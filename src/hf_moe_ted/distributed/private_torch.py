"""Private names of torch that TED uses, each with the reason.

`docs/private_names.md` lists all such names of the package, with the versions that were read.
"""

from dataclasses import dataclass
from datetime import timedelta
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import (
    _set_pg_timeout as set_group_timeout,
)  # meshes make groups without a timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import (
    _StridedShard as StridedShard,  # FSDP2's own parameters of weights that have shards already
)

# the functional collectives as operations, because their Python wrappers cost the host several times as much
c10d: Any = torch.ops._c10d_functional
# the assertion that does not wait for the device
assert_async = torch._assert_async
# one kernel for many tensors
foreach_norm, foreach_mul_ = torch._foreach_norm, torch._foreach_mul_
# slices of a mesh are new objects each time; only their root stays the same. No public function divides an axis
root_mesh, unflatten = DeviceMesh._get_root_mesh, DeviceMesh._unflatten
# where a module looks for its parameters; plain tensors can replace them there for a while
parameter_table = attrgetter("_parameters")


def world_timeout(device_type: str) -> timedelta | None:
    """The timeout given to `init_process_group`, not public; `None` for torch's fake group, which never waits."""
    world: Any = dist.group.WORLD
    options = world._get_backend(torch.device(device_type)).options
    return None if options is None else options._timeout


def local_of(param: Tensor) -> tuple[Tensor, Any]:
    """The local tensor of a DTensor and its spec, without the autograd function of `to_local`; else itself."""
    return (param._local_tensor, param._spec) if isinstance(param, DTensor) else (param, None)


@dataclass(frozen=True)
class FSDPParameter:
    """A parameter of FSDP2, which has two forms and shows one of them at a time.

    Attributes:
        sharded: the shard; it has the gradient that the optimizer sees.
        whole: the gathered parameter; it has the gradients of an accumulation that are not reduced yet. `None` before
            the first gather.
        state: its `unsharded_accumulated_grad` holds these gradients if the reduction has another dtype.
    """

    sharded: nn.Parameter
    whole: nn.Parameter | None
    state: Any


def fsdp_group(module: Any) -> Any:
    """FSDP2's group of a module, or `None`; its `_partial_reduce_output` has gradients not yet summed over replicas."""
    return module._get_fsdp_state()._fsdp_param_group


def fsdp_parameters(module: Any) -> list[FSDPParameter]:
    """The parameters that FSDP2 manages with this module itself, not with a module inside."""
    group = fsdp_group(module)
    return [
        FSDPParameter(state.sharded_param, getattr(state, "_unsharded_param", None), state)
        for state in (group.fsdp_params if group is not None else ())
    ]


def forget_root(model: Any) -> None:
    """Make the next forward search the modules of FSDP2 in a model again; otherwise only the first forward does."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    for state in states:
        state._is_root = None
        state._state_ctx.all_states = []


__all__ = [
    "FSDPParameter",
    "StridedShard",
    "assert_async",
    "c10d",
    "foreach_mul_",
    "foreach_norm",
    "forget_root",
    "fsdp_group",
    "fsdp_parameters",
    "local_of",
    "parameter_table",
    "root_mesh",
    "set_group_timeout",
    "unflatten",
    "world_timeout",
]
