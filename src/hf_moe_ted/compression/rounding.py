"""Round weights to integers of 8 or 4 bits, symmetric around 0, with a scale per channel or group.

Shape letters: E experts, O output width, I input width, G weights per scale.
"""

import math

import torch
from torch import Tensor

_PART_NUMEL = 2**22  # number of weights that are rounded at once; their error takes 32 MiB in float64


def quantize_weight(weight_EOI: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Round weights to integers in `[-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1]` times a scale.

    Args:
        weight_EOI: float[..., I].
        bits: 8 or 4.
        group_size: number of weights along I that share a scale, a divisor of I; `None` is I.

    Returns:
        int8[..., I], or for 4 bits uint8[..., I / 2] with two numbers plus 8 in each byte, the first in its low half;
        and the scales [..., I / G] in the dtype of the weights.
    """
    largest = 2 ** (bits - 1) - 1
    grouped = weight_EOI.unflatten(-1, (-1, group_size or weight_EOI.shape[-1])).float()
    scale = (grouped.abs().amax(dim=-1) / largest).to(weight_EOI.dtype)
    # round with the stored scale; if that is 0, all weights of the group are 0 or too small for the dtype
    divisor = scale.float().masked_fill(scale == 0, torch.inf).unsqueeze(-1)
    integers = (grouped / divisor).round().clamp(-largest, largest).flatten(-2).to(torch.int8)
    return (integers if bits == 8 else _pack_pairs(integers)), scale


def dequantize_weight(packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Weights float[..., I] from the output of `quantize_weight`, in the dtype of the scales."""
    integers = packed if bits == 8 else _unpack_pairs(packed)
    groups = integers.unflatten(-1, (scale.shape[-1], -1))
    return (groups.to(scale.dtype) * scale.unsqueeze(-1)).flatten(-2)


def _pack_pairs(integers: Tensor) -> Tensor:
    pairs = (integers + 8).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def _unpack_pairs(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8) - 8


def relative_error(squared_error: float, squared_norm: float) -> float:
    """`||rounded - exact|| / ||exact||` (Frobenius norm); 0 if all weights are 0."""
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


def round_into(
    weight_OI: Tensor, packed: Tensor, scale: Tensor, bits: int, group_size: int | None, name: str
) -> tuple[float, float]:
    """Round a matrix as `quantize_weight` does, in parts that bound the memory.

    Args:
        weight_OI: float[O, I].
        packed, scale: outputs, with the shapes and dtypes of `quantize_weight`.
        bits, group_size: as in `quantize_weight`.
        name: name of the matrix, for messages.

    Returns:
        the sums of squares of `rounded - exact` and of `exact`, in float64.

    Raises:
        ValueError: a weight is not finite, or is too large to be rounded in its dtype.
    """
    rows = max(1, _PART_NUMEL // weight_OI.shape[-1])
    squared_error = squared_norm = 0.0
    for exact, packed_out, scale_out in zip(weight_OI.split(rows), packed.split(rows), scale.split(rows), strict=True):
        packed_part, scale_part = quantize_weight(exact, bits, group_size)
        packed_out.copy_(packed_part)
        scale_out.copy_(scale_part)
        weight = exact.double()
        error = (dequantize_weight(packed_part, scale_part, bits).double() - weight).square().sum().item()
        if not math.isfinite(error):
            raise ValueError(
                f"{name} has NaN or infinity, or weights that are too large for {exact.dtype}; quantize an undamaged "
                "model"
            )
        squared_error += error
        squared_norm += weight.square().sum().item()
    return squared_error, squared_norm


__all__ = ["dequantize_weight", "quantize_weight", "relative_error", "round_into"]
