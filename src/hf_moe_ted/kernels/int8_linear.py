"""Linear layers on int8 weights: activations are quantized during the call, and products use integers.

Each row of activations is divided by its own step and rounded, so a token's result does not depend on other tokens.
Sums are exact in int32; steps, scales and bias are applied in float32 afterwards. This module chooses the kernel by the
processor:

| processor | few rows, or a small matrix | many rows | levels of an activation |
|---|---|---|---|
| x86 with VNNI or AMX | FBGEMM | oneDNN | 255 |
| x86 with AVX2 | FBGEMM | FBGEMM | 127: two products are added up in int16, where more would overflow |
| others | PyTorch's for float32, on weights that were converted to float32 once | the same | all of float32 |

Shape letters: R rows, O output width, I input width.
"""

import platform
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .private_torch import (
    count_of_writes,
    fbgemm_int8_product,
    fbgemm_pack,
    has_fbgemm,
    onednn_int8_product,
    onednn_pack,
)

_ALL_LEVELS = 127  # on each side of 0
_HALF_THE_LEVELS = 63
_MAX_FEW_ROWS = (
    16  # with few rows FBGEMM is faster, because it reads weights faster; with many, oneDNN multiplies faster
)
_MAX_SMALL_NUMEL = 2**18  # weights of a matrix; for fewer, a oneDNN product takes longer to start than to run


class Int8Layer(NamedTuple):
    """A linear layer, `inputs @ (weight * scale).T + bias`.

    Attributes:
        weight_OI: int8[O, I], from -127 to 127.
        scale_O: float[O].
        bias_O: float[O] or `None`.
    """

    weight_OI: Tensor
    scale_O: Tensor
    bias_O: Tensor | None


class Int8Rows(NamedTuple):
    """Rounded activations.

    Attributes:
        rounded_RI: float32[R, I], integers from `-int8_levels()` to `int8_levels()`; if that is `None`, the activations
            themselves.
        step_R1: float32[R, 1], the factor of each row.
    """

    rounded_RI: Tensor
    step_R1: Tensor

    @classmethod
    def of(cls, inputs_RI: Tensor) -> "Int8Rows":
        """Round the rows of float[R, I]."""
        inputs_RI = inputs_RI.float()
        levels = int8_levels()
        if levels is None:
            return cls(inputs_RI, inputs_RI.new_ones(len(inputs_RI), 1))
        step_R1 = inputs_RI.abs().amax(dim=-1, keepdim=True).div_(levels)
        step_R1 = step_R1.clamp_(min=torch.finfo(torch.float32).tiny)
        return cls((inputs_RI / step_R1).round_(), step_R1)


class _Packed(NamedTuple):
    version: tuple[int, ...]
    weight: Any
    scale_O: Tensor
    bias_O: Tensor | None


class PackedInt8Weights:
    """int8 matrices in the order in which kernels read them; each is packed at its first use.

    A packed matrix takes one byte per weight, in addition to the original: with VNNI two, if it is used for few rows
    and for many; without int8 products four. Copies and pickles of this object, and so of a module that has it, are
    empty.

    It is packed again if the original has changed, as far as PyTorch counts changes: it counts `load_state_dict`,
    `weight.copy_` or a new `weight.data`. It does not count writes into the same memory through `weight.data.copy_` or
    NumPy, or into a tensor of `torch.inference_mode`. After such a write call `forget`, or continue with a copy of the
    module.
    """

    def __init__(self) -> None:
        self._packed: dict[Hashable, _Packed] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def linear(
        self, inputs_RI: Tensor, key: Hashable, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None
    ) -> Tensor:
        """`inputs @ (weight * scale).T + bias`.

        Args:
            inputs_RI: float[R, I].
            key: key of the matrix in this object.
            weight_OI, scale_O, bias_O: as in [`Int8Layer`].

        Returns:
            float32[R, O].
        """
        return self.layers(inputs_RI, key, [Int8Layer(weight_OI, scale_O, bias_O)])

    def layers(self, inputs_RI: Tensor, key: Hashable, layers: Sequence[Int8Layer]) -> Tensor:
        """The concatenated outputs of several layers for the same inputs: float32[R, sum of O]."""
        rows = Int8Rows.of(inputs_RI)
        packed, kernel = self._pack(len(inputs_RI), key, layers)
        output_RO = _PRODUCTS[kernel](rows.rounded_RI, packed).mul_(rows.step_R1)
        return output_RO if packed.bias_O is None else output_RO.add_(packed.bias_O)

    def product(self, rounded_RI: Tensor, key: Hashable, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
        """float32[R, O] for rows of [`Int8Rows`], before the factor of each row."""
        packed, kernel = self._pack(len(rounded_RI), key, [Int8Layer(weight_OI, scale_O, None)])
        return _PRODUCTS[kernel](rounded_RI, packed)

    def forget(self, key: Hashable) -> None:
        """Drop the packed copies of a matrix, such as one that was overwritten without PyTorch's notice."""
        for kernel in _PRODUCTS:
            self._packed.pop((key, kernel), None)

    def _pack(self, num_rows: int, key: Hashable, layers: Sequence[Int8Layer]) -> tuple[_Packed, str]:
        numel = sum(layer.weight_OI.numel() for layer in layers)
        kernel = _kernel(num_rows > _MAX_FEW_ROWS and numel > _MAX_SMALL_NUMEL)
        version = tuple(n for layer in layers for tensor in layer if tensor is not None for n in _version(tensor))
        packed = self._packed.get((key, kernel))
        if packed is None or packed.version != version:
            packed = self._packed[key, kernel] = _packed(version, layers, kernel)
        return packed, kernel


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), count_of_writes(tensor)


def _kernel(is_large: bool) -> str:
    """The name of the kernel in `_PRODUCTS`."""
    if int8_levels() is None:
        return "float32"
    if has_exact_int8_products() and (is_large or not has_fbgemm()):
        return "onednn"
    return "fbgemm"


def _packed(version: tuple[int, ...], layers: Sequence[Int8Layer], kernel: str) -> _Packed:
    weights, scales, biases = zip(*layers, strict=True)
    weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
    scale_O = torch.cat(scales).float()
    bias_O = None
    if any(bias is not None for bias in biases):
        of_layers = zip(biases, scales, strict=True)
        bias_O = torch.cat([torch.zeros_like(scale) if bias is None else bias for bias, scale in of_layers]).float()
    if kernel == "onednn":
        return _Packed(version, onednn_pack(weight_OI), scale_O, bias_O)
    if kernel == "fbgemm":
        return _Packed(version, fbgemm_pack(weight_OI, scale_O), scale_O, bias_O)
    return _Packed(version, weight_OI * scale_O.unsqueeze(-1), scale_O, bias_O)


def _onednn_product(rounded_RI: Tensor, packed: _Packed) -> Tensor:
    return onednn_int8_product(rounded_RI, packed.weight, packed.scale_O, _zeros(len(packed.scale_O)))


def _fbgemm_product(rounded_RI: Tensor, packed: _Packed) -> Tensor:
    return fbgemm_int8_product(rounded_RI, (int8_levels() or _ALL_LEVELS) + 1, packed.weight)


def _float_product(rounded_RI: Tensor, packed: _Packed) -> Tensor:
    return torch.nn.functional.linear(rounded_RI, packed.weight)


# float32[R, O], sums of products of rows and weights, times the scale
_PRODUCTS = {"onednn": _onednn_product, "fbgemm": _fbgemm_product, "float32": _float_product}


@lru_cache
def _zeros(num_zeros: int) -> Tensor:
    """int64[num_zeros]."""
    return torch.zeros(num_zeros, dtype=torch.int64)


@lru_cache
def int8_levels() -> int | None:
    """Levels of activations on each side of 0 here; `None` if int8 products are slow or not exact."""
    if not (has_fbgemm() or has_exact_int8_products()):
        return None
    return _ALL_LEVELS if has_exact_int8_products() else _HALF_THE_LEVELS


@lru_cache
def packed_bytes_per_weight() -> int:
    """Most bytes of [`PackedInt8Weights`] per weight, if it is used for few rows and for many."""
    return 4 if int8_levels() is None else int(has_fbgemm()) + int(has_exact_int8_products())


@lru_cache
def has_exact_int8_products() -> bool:
    """Whether this processor adds up int8 products in int32; oneDNN and FBGEMM use this.

    Processors without VNNI add pairs in int16; there PyTorch either halves the weights or lets sums overflow.
    """
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    weight_OI = torch.full((32, 64), _ALL_LEVELS, dtype=torch.int8)  # odd, so that halves are not exact
    integers_RI = torch.full((2, 64), float(_ALL_LEVELS))  # sums of two products go beyond int16
    ones_O = torch.ones(32)
    expected = integers_RI.double() @ weight_OI.double().T
    output = onednn_int8_product(integers_RI, onednn_pack(weight_OI), ones_O, _zeros(32))
    if has_fbgemm():
        fbgemm_output = fbgemm_int8_product(integers_RI, _ALL_LEVELS + 1, fbgemm_pack(weight_OI, ones_O))
        return torch.equal(output.double(), expected) and torch.equal(fbgemm_output.double(), expected)
    return torch.equal(output.double(), expected)


__all__ = [
    "Int8Layer",
    "Int8Rows",
    "PackedInt8Weights",
    "has_exact_int8_products",
    "int8_levels",
    "packed_bytes_per_weight",
]
