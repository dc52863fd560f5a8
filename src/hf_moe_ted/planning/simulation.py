"""Simulate one rank of many in one process, with torch's fake process group and a model without memory.

The results show what `from_pretrained(distributed_config=...)` would make on that rank, and what a training step would
do there. They do not use the planner's formulas.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # also registers the backend "fake"
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import initialization as init
from transformers.distributed.utils import initialize_distributed_mesh

from ..distributed.activation_checkpoint import communication_aware_context_fn
from ..distributed.layout import Layout
from ..distributed.ted_config import TedConfig
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from ..optim.tiled_adamw import TiledAdamW
from .communication import Operation
from .workload import Workload


def local_numels_of_rank(config: ZCodeM3Config, layout: Layout, rank: int) -> dict[str, int]:
    """Number of elements of each parameter that a rank stores, by name, from the sharded model.

    Raises:
        RuntimeError: this process is in a process group.
        ValueError: the model cannot be sharded in this way.
    """
    with _sharded_model(config, layout, rank) as model:
        return {name: _local(parameter).numel() for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class SimulatedStep:
    """The work of a rank in one step of one micro-batch, after a first step in which FSDP2 sets itself up.

    Attributes:
        collectives: kind and bytes of the rank's input -> how often.
        optimizer_bytes: bytes of the states of [`TiledAdamW`].
    """

    collectives: Counter[tuple[Operation, int]]
    optimizer_bytes: int


def simulated_step(config: ZCodeM3Config, layout: Layout, workload: Workload, rank: int) -> SimulatedStep:
    """Run forward, backward and optimizer of a rank on tensors without data, in bfloat16.

    Args:
        config: config of a model of any size.
        layout: a layout; with expert parallelism it needs `pad_expert_input_to_capacity`, because without data the
            number of tokens of an expert is unknown.
        workload: work of the rank; `accumulation` counts as 1.
        rank: rank in the world.

    Raises:
        RuntimeError: this process is in a process group.
        ValueError: the model cannot be sharded in this way, the layout does not pad, or it offloads (its exchange is
            the same as without offload).
    """
    if layout.expert_parallel_size > 1 and not layout.pad_expert_input_to_capacity:
        raise ValueError("pad_expert_input_to_capacity (False) must be True: tensors without data have no routing")
    if layout.offload is not None:
        raise ValueError(f"offload ({layout.offload!r}) must be None: tensors without data are on no device")
    with _sharded_model(config, layout, rank) as model:
        with FakeTensorMode(allow_non_fake_inputs=True):
            counter = _counted_step(model, workload)
        optimizer = TiledAdamW(model.parameters(), lr=1e-3)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by which tiles are known
            optimizer.step()  # out of that mode, as the number of the step is read; weights stay without numbers
        states = (value for state in optimizer.state.values() for value in state.values())
        moments = [_local(value) for value in states if isinstance(value, Tensor) and value.ndim]
        return SimulatedStep(counter.log, sum(moment.nbytes for moment in moments))


def _counted_step(model: Any, workload: Workload) -> "_CollectiveCounter":
    """Count the second of two forwards and backwards."""
    model.to_empty(device="cpu")
    model.tie_weights(recompute_mapping=False)
    model.train()
    # ranks except the first would wait for this
    model.ted_random_state.load_state_dict({"num_forwards": 0, "base_seed": 0})
    if workload.checkpointing is not None:
        kwargs: dict[str, Any] = {"use_reentrant": False}
        if workload.checkpointing == "communication-aware":
            kwargs["context_fn"] = communication_aware_context_fn
        model.activation_checkpointing_enable(kwargs)
    source, target = (
        torch.full((workload.batch_size, length), 5) for length in (workload.source_length, workload.target_length)
    )
    for _ in range(2):
        model.zero_grad()
        with _CollectiveCounter() as counter:
            output = model(input_ids=source, labels=target, num_items_in_batch=target.numel(), use_cache=False)
            output.loss.backward()
    return counter


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _CollectiveCounter(TorchDispatchMode):
    """Counts functional collectives, and those of `torch.distributed`, which FSDP2 uses."""

    _OPERATIONS: dict[str, Operation] = {
        "all_reduce": "all_reduce",
        "all_gather_into_tensor": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
        "all_to_all_single": "all_to_all",
        "_allgather_base_": "all_gather",
        "_reduce_scatter_base_": "reduce_scatter",
    }

    def __init__(self) -> None:
        super().__init__()
        self.log: Counter[tuple[Operation, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.name().partition("::")[2].partition(".")[0]
        if func.namespace in ("_c10d_functional", "c10d") and operation != "wait_tensor":
            source = args[1] if operation.endswith("_base_") else args[0]
            num_bytes = sum(leaf.nbytes for leaf in tree_leaves(source) if isinstance(leaf, Tensor))
            self.log[self._OPERATIONS[operation], num_bytes] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _sharded_model(config: ZCodeM3Config, layout: Layout, rank: int) -> Iterator[Any]:
    """The model of a rank on the meta device, in bfloat16, as long as its process group exists."""
    world_size = layout.tensor_parallel_size * layout.data_parallel_size
    config = type(config).from_dict(config.to_dict())
    with _fake_process_group(rank, world_size):
        distributed_config = TedConfig.of_layout(layout)
        _, meshes = initialize_distributed_mesh(distributed_config)
        with torch.device("meta"), init.no_tie_weights():
            whole: Any = ZCodeM3ForConditionalGeneration(config)
            model = whole.to(torch.bfloat16)
        model.config.distributed_config = distributed_config
        yield type(model).maybe_distribute_model(model, distributed_config, meshes)


@contextmanager
def _fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    if dist.is_initialized():
        raise RuntimeError("a rank can only be simulated in a process without a process group; start another process")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


__all__ = ["SimulatedStep", "local_numels_of_rank", "simulated_step"]
