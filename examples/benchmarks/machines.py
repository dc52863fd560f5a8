"""The machines that the ranks of a benchmark are on: those of a launcher, or emulated on one host.

NCCL takes ranks with different `NCCL_HOSTID` for ranks of different hosts: they talk over sockets, and those with the
same one over NVLink. So tensor parallelism inside machines and experts across them can be tried where there is one
machine. The slow links then are the loopback device, whose rate depends on the host's processors, and no network.
"""

import os
from dataclasses import dataclass

import torch.distributed as dist

# the most sockets that NCCL opens between two ranks: one gets a tenth of what the loopback device can carry
_SOCKETS = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_NTHREADS": "8",
    "NCCL_NSOCKS_PERTHREAD": "8",
}


@dataclass(frozen=True)
class Machines:
    """
    Attributes:
        number: of machines, each with as many ranks; neighbours in rank are in the same one.
        is_emulated: whether they are one host.
        world_size: ranks that a launcher has started; `None` if the benchmark starts its own.
    """

    number: int = 1
    is_emulated: bool = False
    world_size: int | None = None

    def __str__(self) -> str:
        if self.number == 1:
            return "one machine"
        if self.is_emulated:
            return f"{self.number} machines, emulated on one host: sockets on its loopback device between them"
        return f"{self.number} machines of the launcher"


def machines_of(num_nodes: int | None) -> Machines:
    """Those of the launcher, such as torchrun, if there is one; else as many as asked for, emulated.

    Args:
        num_nodes: `--nodes`, `None` where it is not given.

    Raises:
        ValueError: fewer than one, or others than the launcher's.
    """
    if num_nodes is not None and num_nodes < 1:
        raise ValueError(f"--nodes ({num_nodes}) must be at least 1")
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return Machines(num_nodes or 1, is_emulated=(num_nodes or 1) > 1)
    world_size = int(os.environ["WORLD_SIZE"])
    number = world_size // int(os.environ["LOCAL_WORLD_SIZE"])
    if num_nodes not in (None, number):
        raise ValueError(
            f"--nodes ({num_nodes}) must be the {number} of the launcher: leave it out, or start the script without a "
            "launcher to emulate machines on one host"
        )
    return Machines(number, world_size=world_size)


def check_ranks(num_ranks: int, machines: Machines) -> None:
    """
    Raises:
        ValueError: they do not fill the machines.
    """
    if num_ranks % machines.number:
        raise ValueError(
            f"{num_ranks} GPUs cannot be divided between --nodes ({machines.number}): give a number that divides them"
        )


def emulate(num_nodes: int) -> None:
    """Make this process, of a launcher, one of an emulated machine. Before it makes a group: NCCL looks only then.

    What the environment says of sockets stays as it is.

    Raises:
        ValueError: the ranks do not fill the machines.
        RuntimeError: there is a group already.
    """
    if dist.is_initialized():
        raise RuntimeError("machines are emulated before the first process group, and there is one")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_ranks(world_size, Machines(num_nodes, is_emulated=True))
    os.environ["NCCL_HOSTID"] = f"node{rank * num_nodes // world_size}"
    for name, value in _SOCKETS.items():
        os.environ.setdefault(name, value)


__all__ = ["Machines", "check_ranks", "emulate", "machines_of"]
