"""The axes of TED over the ranks of a job, and the groups made of them.

transformers makes two views of the ranks, (dp_replicate, fsdp, tp) for all that is not an expert and (dp_replicate,
efsdp, ep) for experts, where its `ep` is ours times `etp`. Expert tensor parallelism divides that axis once more, and
folding the `tp` axis:

| axis | names here | size | ranks of a group |
|---|---|---|---|
| tensor | tp | tp | share a batch; hold slices of the dense layers |
| data | dp_replicate, fsdp | dp | hold different batches |
| expert tensor | etp | etp | hold slices of the same experts; part of a tensor-parallel group |
| expert | ted_ep | ep | hold different experts |
| expert data | dp_replicate, efsdp | edp | hold the same slices of the same experts |
| fold | fold | tp / etp | of a tensor-parallel group, but hold other experts |

`tp * dp = etp * ep * edp` (https://huggingface.co/papers/2303.06318, section 3.1).

With replicas (HSDP) FSDP2 gets meshes of two axes, the second of which it shards over. Where experts are spread over
several replicas, their view cannot have a `dp_replicate` axis; that of transformers is 1 then in both views, and `fsdp`
is divided into (dense_replicate, dense_shard).
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
    """Among all ranks with different batches, those of other replicas included; `meshes` are of transformers."""
    replica, shard = meshes.get_mesh("dp_replicate"), meshes.get_mesh("fsdp")
    return int(replica.get_local_rank() * shard.size() + shard.get_local_rank())


def zero_mesh(meshes: Any, layout: Layout) -> DeviceMesh:
    """What `fully_shard` takes for all that is no expert: one axis, or replicas and shards."""
    if layout.dp_replicate_size == 1:
        return meshes.get_mesh("fsdp")
    if layout.expert_dp_replicate_size > 1:
        return meshes.get_mesh(("dp_replicate", "fsdp"))
    return _split(meshes.get_mesh("fsdp"), layout.zero_size, ("dense_replicate", "dense_shard"))


def expert_zero_mesh(meshes: Any, layout: Layout) -> DeviceMesh:
    """As `zero_mesh`, for experts."""
    return meshes.get_mesh(("dp_replicate", "efsdp") if layout.expert_dp_replicate_size > 1 else "efsdp")


def inherit_timeout(mesh: DeviceMesh) -> None:
    """Give the groups of a mesh the timeout of the world, in place of torch's 10 or 30 minutes."""
    timeout = world_timeout(mesh.device_type)
    if timeout is None:
        return
    for group in mesh.get_all_groups():
        set_group_timeout(timeout, group)


def _split(mesh: DeviceMesh, inner_size: int, names: tuple[str, str]) -> DeviceMesh:
    """An axis can be split once, and every layer asks; the root keeps the result, which ends with its groups."""
    splits = root_mesh(mesh).__dict__.setdefault("ted_splits", {})
    key = names[0], inner_size
    if key not in splits:
        splits[key] = unflatten(mesh, 0, (mesh.size() // inner_size, inner_size), names)
        inherit_timeout(splits[key])
    return splits[key]


__all__ = ["data_parallel_rank", "expert_mesh", "expert_zero_mesh", "fold_mesh", "inherit_timeout", "zero_mesh"]
