"""Many tensors of one device in one launch (Triton): the sum of squares of all, and a step of AdamW for all.

Kernels find tensors by addresses in a table on the device. A table does not own the memory: it is valid as long as all
of its tensors keep their addresses.

Letters: N tensors, C chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_guard import on_device_of_first
from .triton_adamw import adamw_kernel, count_steps_kernel, squares_kernel

# by their names in torch
DTYPES: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
# Elements of a program, and its warps, measured on an H200: norms are fast with many loads in flight, steps with many
# programs.
NORM_CHUNK, STEP_CHUNK = 8192, 2048
_NORM_WARPS, _STEP_WARPS = 4, 8
_BLOCK_BYTES = 4096  # elements of each tensor that a step's program holds at once: 16 bytes per thread
_TENSOR_BLOCK = 128
_NUM_NUMBERS = 6  # columns that count_steps_kernel writes


class Part(NamedTuple):
    """The chunks of one dtype."""

    dtype: torch.dtype
    first_chunk: int
    num_chunks: int


@dataclass(frozen=True)
class Chunks:
    """How N tensors are cut into pieces of at most `chunk_numel` elements.

    Attributes:
        numels: int64[N].
        tensors, places: int32[C], the tensor of each chunk, and the index among its chunks; chunks of a dtype are
            consecutive.
        parts: the range of chunks of each dtype.
    """

    chunk_numel: int
    numels: Tensor
    tensors: Tensor
    places: Tensor
    parts: tuple[Part, ...]


def cut_into_chunks(tensors: Sequence[Tensor], chunk_numel: int) -> Chunks:
    """
    Args:
        tensors: tensors on one device with dtypes of `DTYPES`; only their sizes matter.
        chunk_numel: elements of a chunk, a power of two.
    """
    numels = torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64)
    counts = (numels + chunk_numel - 1) // chunk_numel
    order: list[int] = []
    parts: list[Part] = []
    num_chunks = 0
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        own = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        num_own = int(counts[own].sum())
        parts.append(Part(dtype, num_chunks, num_own))
        order += own
        num_chunks += num_own
    counts = counts[order]
    starts = counts.cumsum(0) - counts
    device = tensors[0].device
    return Chunks(
        chunk_numel,
        numels=_moved(numels, device),
        tensors=_moved(torch.tensor(order, dtype=torch.int32).repeat_interleave(counts), device),
        places=_moved((torch.arange(num_chunks) - starts.repeat_interleave(counts)).int(), device),
        parts=tuple(parts),
    )


def addresses_of(rows: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """int64[rows, N], the addresses for the kernels; the tensors must keep them."""
    return _moved(torch.tensor([[tensor.data_ptr() for tensor in row] for row in rows], dtype=torch.int64), device)


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy a small tensor to the device without waiting for it."""
    return _moved(torch.tensor(values, dtype=dtype), device)


@on_device_of_first
def sum_of_squares(addresses: Tensor, weights: Tensor, chunks: Chunks) -> Tensor:
    """The sum of the squares of all elements, each times the weight of its tensor, always in the same order.

    Args:
        addresses: int64[1, N].
        weights: float32[N].

    Returns:
        float32 scalar.
    """
    sums = torch.empty(len(chunks.tensors), dtype=torch.float32, device=addresses.device)
    for part in chunks.parts:
        if part.num_chunks:
            squares_kernel[(part.num_chunks,)](
                addresses, chunks.numels, weights, chunks.tensors, chunks.places, sums, part.first_chunk,
                DTYPE=DTYPES[part.dtype], CHUNK=chunks.chunk_numel, num_warps=_NORM_WARPS,
            )  # fmt: skip
    return sums.sum()


@on_device_of_first
def adamw_step(addresses: Tensor, groups: Tensor, group_options: Tensor, chunks: Chunks, factor: Tensor) -> None:
    """One step of AdamW with gradients multiplied by a factor. The gradients in memory do not change.

    Args:
        addresses: int64[5, N], of parameters, gradients, both moments, and step counts, which are float32 scalars and
            grow by 1. The first four of a tensor are contiguous and have the same dtype.
        groups: int32[N].
        group_options: float32[groups, 5], learning rate, weight decay, both betas and eps of each group.
        factor: float32 scalar.
    """
    num_tensors = addresses.shape[1]
    numbers = torch.empty(num_tensors, _NUM_NUMBERS, dtype=torch.float32, device=addresses.device)
    count_steps_kernel[(triton.cdiv(num_tensors, _TENSOR_BLOCK),)](
        addresses, groups, group_options, numbers, num_tensors, BLOCK=_TENSOR_BLOCK
    )
    for part in chunks.parts:
        if part.num_chunks:
            adamw_kernel[(part.num_chunks,)](
                addresses, chunks.numels, numbers, chunks.tensors, chunks.places, factor, part.first_chunk, num_tensors,
                DTYPE=DTYPES[part.dtype], CHUNK=chunks.chunk_numel, BLOCK=_BLOCK_BYTES // part.dtype.itemsize,
                IS_EXACT=part.dtype == torch.float32, num_warps=_STEP_WARPS,
            )  # fmt: skip


def _moved(values: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)  # a copy from pageable memory would wait


__all__ = [
    "DTYPES",
    "NORM_CHUNK",
    "STEP_CHUNK",
    "Chunks",
    "Part",
    "adamw_step",
    "addresses_of",
    "cut_into_chunks",
    "on_device",
    "sum_of_squares",
]
