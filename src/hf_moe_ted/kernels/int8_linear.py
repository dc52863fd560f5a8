"""Linear layers on int8 weights with oneDNN's int8 products: activations are quantized as they come.

Each row of activations is divided by a scale of its own, so that what a token becomes does not depend on the others,
and rounded to 8 bits. Sums are exact in int32; scales and bias come in float32 afterwards.

Shape letters: R rows, O output width, I input width.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .private_torch import count_of_writes, onednn_int8_product, onednn_pack

_LARGEST = 127
_SHIFT = 128  # oneDNN is fast with unsigned activations only; it takes the shift out of the sums again


class PackedInt8Weights:
    """int8 matrices in the order in which oneDNN reads them, made when they are first used.

    A packed matrix takes one byte per weight, beside the original. It is made anew when that has changed. Copies and
    pickles of this object, and so of a module that has it, are empty.
    """

    def __init__(self) -> None:
        self._packed: dict[Any, tuple[tuple[int, int], Tensor]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def linear(self, inputs_RI: Tensor, key: Any, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor) -> Tensor:
        """`inputs @ (weight * scale).T + bias`.

        Args:
            inputs_RI: float[R, I].
            key: of the matrix among those of this object.
            weight_OI: int8[O, I], from -127 to 127.
            scale_O: float[O].
            bias_O: float[O].

        Returns:
            float32[R, O].
        """
        inputs_RI = inputs_RI.float()
        largest_R1 = inputs_RI.abs().amax(dim=-1, keepdim=True)
        step_R1 = largest_R1.div_(_LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        integers_RI = (inputs_RI / step_R1).round_().add_(_SHIFT).to(torch.uint8)
        sums_RO = _product(integers_RI, self._pack(key, weight_OI), scale_O.float())
        return sums_RO.mul_(step_R1).add_(bias_O)

    def _pack(self, key: Any, weight_OI: Tensor) -> Tensor:
        version = (weight_OI.data_ptr(), count_of_writes(weight_OI))
        if key not in self._packed or self._packed[key][0] != version:
            self._packed[key] = (version, onednn_pack(weight_OI))
        return self._packed[key][1]


def _product(integers_RI: Tensor, packed_weight: Tensor, scale_O: Tensor) -> Tensor:
    """float32[R, O], sums of products of `integers - 128` and weights, times the scale."""
    return onednn_int8_product(integers_RI, _SHIFT, packed_weight, scale_O, _zeros(len(scale_O)))


@lru_cache
def _zeros(num_zeros: int) -> Tensor:
    """int64[num_zeros]."""
    return torch.zeros(num_zeros, dtype=torch.int64)


@lru_cache
def has_exact_int8_products() -> bool:
    """Whether this processor adds up int8 products in int32.

    Those without VNNI add pairs in int16, where PyTorch either halves the weights or lets sums overflow.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    weight_OI = torch.full((32, 64), _LARGEST, dtype=torch.int8)  # odd, so that halves are not exact
    integers_RI = torch.full((2, 64), 255, dtype=torch.uint8)  # sums of two products go beyond int16
    packed = onednn_pack(weight_OI)
    expected = (integers_RI.double() - _SHIFT) @ weight_OI.double().T
    return torch.equal(_product(integers_RI, packed, torch.ones(32)).double(), expected)


__all__ = ["PackedInt8Weights", "has_exact_int8_products"]
