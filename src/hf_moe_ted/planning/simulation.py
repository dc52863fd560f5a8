"""One rank of any number of them, in one process: torch's fake process group, and a model without memory.

What comes out is what `from_pretrained(distributed_config=...)` would make on that rank, not what the planner's
formulas say of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake", too
from transformers import initialization as init
from transformers.distributed.utils import initialize_distributed_mesh

from ..distributed.layout import Layout
from ..distributed.ted_config import TedConfig
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration


def local_numels_of_rank(config: ZCodeM3Config, layout: Layout, rank: int) -> dict[str, int]:
    """Elements that a rank stores of each parameter, by name, as the sharded model says.

    Raises:
        RuntimeError: this process is in a process group.
        ValueError: the model cannot be sharded so.
    """
    model = sharded_model_of_rank(config, layout, rank)
    numels = {}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        numels[name] = local.numel()
    return numels


def sharded_model_of_rank(config: ZCodeM3Config, layout: Layout, rank: int) -> Any:
    """The model of a rank on the meta device, in bfloat16; its process group has ended."""
    world_size = layout.tensor_parallel_size * layout.data_parallel_size
    config = type(config).from_dict(config.to_dict())
    with _fake_process_group(rank, world_size):
        distributed_config = TedConfig.of_layout(layout)
        _, meshes = initialize_distributed_mesh(distributed_config)
        with torch.device("meta"), init.no_tie_weights():
            whole: Any = ZCodeM3ForConditionalGeneration(config)
            model = whole.to(torch.bfloat16)
        model.config.distributed_config = distributed_config
        return type(model).maybe_distribute_model(model, distributed_config, meshes)


@contextmanager
def _fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    if dist.is_initialized():
        raise RuntimeError("a rank is simulated in a process that is in no process group")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


__all__ = ["local_numels_of_rank", "sharded_model_of_rank"]
