"""The axes of TED over the ranks of a job, and their process groups.

transformers makes two views of the ranks: (dp_replicate, fsdp, tp) for weights outside of experts, and (dp_replicate,
efsdp, ep) for experts. Its `ep` is our `ep` times `etp`. Expert tensor parallelism divides that axis once more, and
folding divides the `tp` axis:

| axis | names here | size | ranks of a group |
|---|---|---|---|
| tensor | tp | tp | share a batch; hold slices of the dense layers |
| data | dp_replicate, fsdp | dp | hold different batches |
| expert tensor | etp | etp | hold slices of the same experts; part of a tensor-parallel group |
| expert | ted_ep | ep | hold different experts |
| expert data | dp_replicate, efsdp | edp | hold the same slices of the same experts |
| fold | fold | tp / etp | of a tensor-parallel group, but hold other experts |

`tp * dp = etp * ep * edp` (https://huggingface.co/papers/2303.06318, section 3.1).

With replicas (HSDP) FSDP2 gets meshes of two axes and shards over the second. If experts are spread over several
replicas, their view cannot have a `dp_replicate` axis. Then the `dp_replicate` of transformers is 1 in both views, and
`fsdp` is divided into (dense_replicate, dense_shard).
"""

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from .layout import Layout
from .private_torch import root_mesh, set_group_timeout, unflatten, world_timeout


def expert_mesh(ep_mesh: DeviceMesh, expert_tensor_parallel_size: int) -> DeviceMesh:
    """The axes ("ted_ep", "etp") of transformers' `ep` axis; ranks of an `etp` group are neighbours."""
    return _split(ep_mesh, expert_tensor_parallel_size, ("ted_ep", "etp"))


def fold_mesh(tp_mesh: DeviceMesh, expert_tensor_parallel_size: int) -> DeviceMesh:
    """The axes ("fold", "etp_in_tp") of the `tp` axis; ranks of a `fold` group hold the same slices of experts."""
    return _split(tp_mesh, expert_tensor_parallel_size, ("fold", "etp_in_tp"))


def data_parallel_rank(meshes: Any) -> int:
    """This rank's index among all ranks with different batches, in all replicas; `meshes` are those of transformers."""
    replica, shard = meshes.get_mesh("dp_replicate"), meshes.get_mesh("fsdp")
    return int(replica.get_local_rank() * shard.size() + shard.get_local_rank())


def zero_mesh(meshes: Any, layout: Layout) -> DeviceMesh:
    """The mesh of `fully_shard` for weights outside of experts: one axis, or replicas and shards."""
    if layout.dp_replicate_size == 1:
        return meshes.get_mesh("fsdp")
    if layout.expert_dp_replicate_size > 1:
        return meshes.get_mesh(("dp_replicate", "fsdp"))
    return _split(meshes.get_mesh("fsdp"), layout.zero_size, ("dense_replicate", "dense_shard"))


def expert_zero_mesh(meshes: Any, layout: Layout) -> DeviceMesh:
    """Like `zero_mesh`, for experts."""
    return meshes.get_mesh(("dp_replicate", "efsdp") if layout.expert_dp_replicate_size > 1 else "efsdp")


def inherit_timeout(mesh: DeviceMesh) -> None:
    """Give the groups of a mesh the timeout of the world, instead of torch's 10 or 30 minutes."""
    timeout = world_timeout(mesh.device_type)
    if timeout is None:
        return
    for group in mesh.get_all_groups():
        set_group_timeout(timeout, group)


def _split(mesh: DeviceMesh, inner_size: int, names: tuple[str, str]) -> DeviceMesh:
    """Split an axis, once: every layer asks, so the root mesh keeps the result as long as its groups exist."""
    splits = root_mesh(mesh).__dict__.setdefault("ted_splits", {})
    key = names[0], inner_size
    if key not in splits:
        splits[key] = unflatten(mesh, 0, (mesh.size() // inner_size, inner_size), names)
        inherit_timeout(splits[key])
    return splits[key]


__all__ = ["data_parallel_rank", "expert_mesh", "expert_zero_mesh", "fold_mesh", "inherit_timeout", "zero_mesh"]
