"""What PyTorch has no public name for, read in 2.13: products of oneDNN, and counters of writes.

`torch.nn.functional.linear` gives float32 to MKL, and `torch.ao` has int8 products inside quantized models only.
"""

import torch
from torch import Tensor


def onednn_linear(inputs_RI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """`inputs @ weight.T + bias`, without gradients, on CPUs."""
    return torch.ops.mkldnn._linear_pointwise(inputs_RI, weight_OI, bias_O, "none", [], "")


def onednn_pack(weight_OI: Tensor) -> Tensor:
    """An int8 matrix in the order in which [`onednn_int8_product`] reads it."""
    return torch.ops.onednn.qlinear_prepack(weight_OI, None)


def onednn_int8_product(
    integers_RI: Tensor, shift: int, packed_weight: Tensor, scale_O: Tensor, zero_points_O: Tensor
) -> Tensor:
    """float32[R, O], sums of products of `integers - shift`, of uint8, and packed int8 weights, times the scale."""
    return torch.ops.onednn.qlinear_pointwise(
        integers_RI, 1.0, shift, packed_weight, scale_O, zero_points_O, None, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip


def count_of_writes(tensor: Tensor) -> int:
    """Grows with what is written into a tensor in place; 0 for one of `torch.inference_mode`, which has no counter."""
    return 0 if tensor.is_inference() else tensor._version


__all__ = ["count_of_writes", "onednn_int8_product", "onednn_linear", "onednn_pack"]
