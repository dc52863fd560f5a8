"""Private names of PyTorch; docs/private_names.md lists the versions in which they were read."""

import torch

foreach_add_ = torch._foreach_add_


def end_allocate_to_pool(device: int, pool: tuple[int, int]) -> None:
    """Tell the allocator that a capture into a pool is over; PyTorch does this only if CUDA did not end the capture.

    Raises:
        RuntimeError: there is no capture into this pool.
    """
    torch._C._cuda_endAllocateToPool(device, pool)
