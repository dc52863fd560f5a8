"""The experts functions of this package by their names, for `experts_implementation`.

models/expert_computation.py says what each of them can compute.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .cpu_ffn import cpu_ffn_experts_forward
from .grouped_ffn import grouped_ffn_experts_forward

EXPERTS_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "zcode_cpu": cpu_ffn_experts_forward,
    "zcode_grouped": grouped_ffn_experts_forward,
}
QUANTIZED_EXPERTS_FORWARD: Callable[..., Tensor] | None = None  # by Triton's kernels, if Triton is there
TRITON_DEVICES: tuple[str, ...] = ()  # the types of devices that Triton's kernels run on

try:
    import triton

    from .fused_ffn import fused_ffn_experts_forward
    from .quantized_ffn import quantized_experts_forward
except ImportError:  # Triton comes with PyTorch for GPUs
    pass
else:
    EXPERTS_IMPLEMENTATIONS["zcode_fused"] = fused_ffn_experts_forward
    QUANTIZED_EXPERTS_FORWARD = quantized_experts_forward
    TRITON_DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)


@functools.cache
def runs_quantized_experts(device: torch.device) -> bool:
    """Whether `QUANTIZED_EXPERTS_FORWARD` runs on this device."""
    return device.type in TRITON_DEVICES and (
        device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    )


__all__ = ["EXPERTS_IMPLEMENTATIONS", "QUANTIZED_EXPERTS_FORWARD", "TRITON_DEVICES", "runs_quantized_experts"]
