"""Private names of PyTorch: the kernels of `torch.optim.AdamW`, and counters of writes.

docs/private_names.md lists the versions in which they were read.

`torch.optim` runs these kernels for whole parameters only; a tiled step runs them for parts. `ClippedAdamW` also calls
its own `_init_group`, which makes and lists the states.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

foreach_add_ = torch._foreach_add_
foreach_addcdiv_ = torch._foreach_addcdiv_
foreach_addcmul_ = torch._foreach_addcmul_
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul_ = torch._foreach_mul_
foreach_sqrt = torch._foreach_sqrt
fused_adamw_ = torch._fused_adamw_


def count_of_writes(tensor: Tensor) -> int:
    """A counter of in-place writes to a tensor."""
    return tensor._version


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, without the autograd function of `to_local`; else the tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
