"""The experts functions of this package by their names, for `experts_implementation`."""

from .cpu_ffn import cpu_ffn_experts_forward
from .grouped_ffn import grouped_ffn_experts_forward

try:
    from .fused_ffn import fused_ffn_experts_forward
except ImportError:  # Triton comes with PyTorch for GPUs
    fused_ffn_experts_forward = grouped_ffn_experts_forward

EXPERTS_IMPLEMENTATIONS = {
    "zcode_grouped": grouped_ffn_experts_forward,
    "zcode_cpu": cpu_ffn_experts_forward,
    "zcode_fused": fused_ffn_experts_forward,
}

__all__ = ["EXPERTS_IMPLEMENTATIONS"]
