"""Private names of PyTorch: products of oneDNN and FBGEMM, and counters of writes.

docs/private_names.md lists the versions in which they were read.

`torch.nn.functional.linear` uses MKL for float32, and `torch.ao` has int8 products only inside quantized models.
"""

import threading
import warnings
from typing import Any

import torch
from torch import Tensor

_SHIFT = 128
_engine_switch = threading.Lock()


def onednn_linear(inputs_RI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """`inputs @ weight.T + bias`, without gradients, on CPUs."""
    return torch.ops.mkldnn._linear_pointwise(inputs_RI, weight_OI, bias_O, "none", [], "")


def onednn_pack(weight_OI: Tensor) -> Tensor:
    """Pack an int8 matrix in the order in which [`onednn_int8_product`] reads it."""
    return torch.ops.onednn.qlinear_prepack(weight_OI, None)


def onednn_int8_product(rounded_RI: Tensor, packed_weight: Any, scale_O: Tensor, zero_points_O: Tensor) -> Tensor:
    """float32[R, O], sums of products of float32 integers from -128 to 127 and packed weights, times the scale."""
    # oneDNN is fast only with unsigned numbers; it subtracts the shift from the sums again
    num_rows = len(rounded_RI)
    # oneDNN takes milliseconds to compile a kernel for each new number of rows: pad; extra rows are never read
    integers_RI = rounded_RI.new_empty((_rounded_up(num_rows), rounded_RI.shape[1]), dtype=torch.uint8)
    integers_RI[:num_rows] = rounded_RI + _SHIFT
    output_RO = torch.ops.onednn.qlinear_pointwise(
        integers_RI, 1.0, _SHIFT, packed_weight, scale_O, zero_points_O, None, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip
    return output_RO[:num_rows]


def _rounded_up(num_rows: int) -> int:
    """Round up to at least 16, and to one of four numbers between a power of two and the next."""
    step = max(16, 1 << max(0, (num_rows - 1).bit_length() - 3))
    return -(-num_rows // step) * step


def has_fbgemm() -> bool:
    """Whether PyTorch has FBGEMM's kernels here, which is true on x86 with AVX2."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def fbgemm_pack(weight_OI: Tensor, scale_O: Tensor) -> Any:
    """Pack an int8 matrix and its scales in the order in which [`fbgemm_int8_product`] reads them."""
    zero_points_O = torch.zeros(len(scale_O), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor", category=UserWarning)  # FBGEMM accepts no other
        quantized = torch._make_per_channel_quantized_tensor(weight_OI.contiguous(), scale_O.double(), zero_points_O, 0)
    with _engine_switch:
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = (
            "fbgemm"  # the engine for packing; products find theirs through the packed weight
        )
        try:
            return torch.ops.quantized.linear_prepack(quantized, None)
        finally:
            torch.backends.quantized.engine = engine


def fbgemm_int8_product(rounded_RI: Tensor, shift: int, packed_weight: Any) -> Tensor:
    """float32[R, O], sums of products of float32 integers, at least `-shift`, and weights, times their scale."""
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return product(rounded_RI, 1.0, shift, packed_weight)


def count_of_writes(tensor: Tensor) -> int:
    """A counter of in-place writes to a tensor; 0 for a tensor of `torch.inference_mode`, which has no counter."""
    return 0 if tensor.is_inference() else tensor._version


__all__ = [
    "count_of_writes",
    "fbgemm_int8_product",
    "fbgemm_pack",
    "has_fbgemm",
    "onednn_int8_product",
    "onednn_linear",
    "onednn_pack",
]
