"""What PyTorch has no public name for; docs/private_names.md says in which versions it was read."""

import torch

foreach_add_ = torch._foreach_add_


def end_allocate_to_pool(device: int, pool: tuple[int, int]) -> None:
    """Tell the allocator that a capture into a pool is over; PyTorch does it only for captures that CUDA did not end.

    Raises:
        RuntimeError: there is none under way.
    """
    torch._C._cuda_endAllocateToPool(device, pool)
