"""Groups of experts' axes end with the process groups that they are part of."""

import gc
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hf_moe_ted.distributed.mesh import expert_mesh, fold_mesh


def test_meshes_end_with_their_process_groups(tmp_path: Path) -> None:
    roots: list[Any] = []
    for run in range(2):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store{run}", rank=0, world_size=1)
        root = init_device_mesh("cpu", (1, 1), mesh_dim_names=("tp", "ep"))
        axes = expert_mesh(root["ep"], 1)
        assert axes is expert_mesh(root["ep"], 1)  # an axis can be split once, and every layer asks
        assert axes is not fold_mesh(root["tp"], 1)
        for name in ("ted_ep", "etp"):
            dist.all_reduce(torch.ones(1), group=axes.get_group(name))  # an error for a group of the run before
        dist.destroy_process_group()
        roots.append(weakref.ref(root))
        del root, axes
        gc.collect()
    assert [root() for root in roots] == [None, None]
