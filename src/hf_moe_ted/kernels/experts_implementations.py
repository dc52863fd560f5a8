"""The experts functions of this package by their names, for `experts_implementation`.

What each can compute stands in models/expert_computation.py, which asks none of them for anything else.
"""

from collections.abc import Callable

from torch import Tensor

from .cpu_ffn import cpu_ffn_experts_forward
from .grouped_ffn import grouped_ffn_experts_forward

EXPERTS_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "zcode_cpu": cpu_ffn_experts_forward,
    "zcode_grouped": grouped_ffn_experts_forward,
}
TRITON_DEVICES: tuple[str, ...] = ()  # the types of devices that Triton's kernels run on

try:
    import triton

    from .fused_ffn import fused_ffn_experts_forward
except ImportError:  # Triton comes with PyTorch for GPUs
    pass
else:
    EXPERTS_IMPLEMENTATIONS["zcode_fused"] = fused_ffn_experts_forward
    TRITON_DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)

__all__ = ["EXPERTS_IMPLEMENTATIONS", "TRITON_DEVICES"]
