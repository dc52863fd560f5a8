"""Tensors by name that are read on access, and their files."""

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.messages import UnreadableFileError, check_is_file
from .torch_file import check_checksums, load_torch_file

MAX_MAPPED_BYTES = 256 * 2**20

_CHUNK_NUMEL = 2**22

_MADV_POPULATE_READ = 22  # Linux 5.14; the module mmap does not name it yet


class LazyTensors(Mapping[str, Tensor]):
    """Tensors whose names, shapes and dtypes are known at once and whose values are read on access.

    Args:
        specs: a tensor on the meta device for each name.
        read: function that reads one tensor. The caller owns the result; nothing else uses its memory.
        read_row: function that reads one index or a slice of the first dimension, if that is cheaper than the whole
            tensor.
        read_into: function that reads one tensor into another of the same shape and dtype. One of `read` and
            `read_into` is enough; give both if each saves a copy in its case.
        where: function that names the file of a tensor, for messages.
    """

    def __init__(
        self,
        specs: Mapping[str, Tensor],
        read: Callable[[str], Tensor] | None = None,
        read_row: Callable[[str, int | slice], Tensor] | None = None,
        read_into: Callable[[str, Tensor], None] | None = None,
        where: Callable[[str], object] | None = None,
    ):
        assert read is not None or read_into is not None, "read or read_into is required"
        self.specs = dict(specs)
        self.where = where or (lambda name: "the checkpoint")
        self._read = read
        self._read_row = read_row
        self._read_into = read_into

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise KeyError(name)
        if self._read is not None:
            return self._read(name)
        out = torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
        self.into(name, out)
        return out

    def row(self, name: str, index: int | slice) -> Tensor:
        """`self[name][index]`, if possible without reading the rest of the tensor."""
        return self[name][index].clone() if self._read_row is None else self._read_row(name, index)

    def parts(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the first dimension with their values, in parts that bound the memory."""
        num_rows, numel = self.specs[name].shape[0], self.specs[name].numel()
        step = max(1, num_rows if self._read_row is None else _CHUNK_NUMEL * num_rows // max(1, numel))
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            yield rows, self.row(name, rows)

    def into(self, name: str, out: Tensor) -> None:
        """Write `self[name]` to `out`, a tensor of the same shape and dtype."""
        if self._read_into is None:
            out.copy_(self[name])
        else:
            self._read_into(name, out)

    def under_names(self, names: Mapping[str, str]) -> "LazyTensors":
        """Some of these tensors under other names and in another order: new name -> name here."""
        return LazyTensors(
            {new: self.specs[name] for new, name in names.items()},
            lambda new: self[names[new]],
            lambda new, index: self.row(names[new], index),
            lambda new, out: self.into(names[new], out),
            lambda new: self.where(names[new]),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs


def checked_weights(tensors: LazyTensors) -> LazyTensors:
    """The same tensors; reading one that cannot be a weight raises, see [`check_weight`].

    All tensors that are copied to an output go through this, so no command copies damaged weights.
    """

    def checked(name: str, tensor: Tensor, row: int | slice | None = None) -> Tensor:
        check_weight(name, tensor, tensors.where(name), row=row)
        return tensor

    def read_into(name: str, out: Tensor) -> None:
        tensors.into(name, out)
        checked(name, out)

    return LazyTensors(
        tensors.specs,
        lambda name: checked(name, tensors[name]),
        lambda name, index: checked(name, tensors.row(name, index), index),
        read_into,
        tensors.where,
    )


def check_all(tensors: LazyTensors) -> None:
    """Read every tensor once, one at a time, so that [`checked_weights`] checks all of them.

    Raises:
        ValueError: see `check_weight`.
    """
    for name in tensors:
        tensors[name]


def check_floating(specs: Mapping[str, Tensor], where: object) -> None:
    """Check only dtypes; tensors may be on the meta device.

    Raises:
        ValueError: a tensor is not floating-point; the message names the first one.
    """
    for name, spec in specs.items():
        if not spec.is_floating_point():
            raise ValueError(
                f"{name} in {where} is {spec.dtype}, but weights must be floating-point numbers; give the model "
                "before quantization or conversion"
            )


def check_weight(name: str, tensor: Tensor, where: object, *, row: int | slice | None = None) -> None:
    """Check that a tensor has only finite floating-point numbers.

    Args:
        name: name of the tensor, for the message.
        tensor: a tensor of any shape and dtype; it is read once.
        where: its file, for the message.
        row: index of the row if it is only one row of the tensor, or the first index if it is several.

    Raises:
        ValueError: the dtype is wrong, or a number is NaN or infinite; the message gives the place of the first one.
    """
    check_floating({name: tensor}, where)
    first = _first_not_finite(tensor)
    if first is not None:
        if isinstance(row, slice):
            first[0] += row.start
        index = [row, *first] if isinstance(row, int) else first
        expert = f" (expert {index[0]})" if ".experts." in name and len(index) > 1 else ""
        raise ValueError(
            f"{name} in {where} has numbers that are NaN or infinite, the first at {index}{expert}; the file is "
            "damaged, or the model diverged in training: use an earlier checkpoint"
        )


def check_rounded(name: str, source: Tensor, rounded: Tensor) -> None:
    """Check that every finite number stays finite in another dtype.

    Args:
        name: name of the tensor, for the message.
        source: a tensor of any dtype.
        rounded: the same numbers in the other dtype.

    Raises:
        ValueError: a number is too large; the message shows it.
    """
    index = _first_not_finite(rounded) if rounded.is_floating_point() else None
    if index is not None and _first_not_finite(source) is None:
        raise ValueError(
            f"{name} has {source[tuple(index)].item():.3g} at {index}, which {rounded.dtype} cannot hold; choose "
            "another dtype, such as bfloat16 or float32"
        )


def copy_rounded(name: str, source: Tensor, out: Tensor) -> None:
    """Copy a tensor to another of the same shape and any dtype; with another dtype, check as in `check_rounded`."""
    out.copy_(source)
    if out.dtype != source.dtype:
        check_rounded(name, source, out)


def _first_not_finite(tensor: Tensor) -> list[int] | None:
    """The index of the first number that is NaN or infinite, read in parts that bound the memory."""
    start = 0
    for part in tensor.reshape(-1).split(_CHUNK_NUMEL):
        part = part.float() if part.itemsize == 1 else part  # few operations support 8 bits
        if not part.sum().isfinite():  # a sum can be too large, too
            bad = part.isfinite().logical_not_()
            if bad.any():
                flat = start + int(bad.to(torch.uint8).argmax())
                return [int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape)]
        start += part.numel()
    return None


class TensorFile:
    """A file of tensors that is memory-mapped while it is read.

    Pages of a mapped file stay in memory after they were read, so the file is unmapped after every `MAX_MAPPED_BYTES`.

    Args:
        path: a `.safetensors` file, or one of `torch.save` with a flat dict of tensors. Nothing in the latter is
            executed, and its checksums are verified before the first tensor is read.

    Raises:
        ValueError: the file is missing, truncated, or holds something else.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_checked = path.suffix == ".safetensors"  # safetensors has no checksums
        self.specs = {name: tensor.to("meta") for name, tensor in self._map().items()}
        self._mapped: Mapping[str, Tensor] = {}
        self._num_bytes_read = 0

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """A contiguous copy of one tensor, or of an index or slice of its first dimension."""
        return self._mapped_tensor(name, index).clone(memory_format=torch.contiguous_format)

    def read_into(self, name: str, out: Tensor) -> None:
        """Write one tensor to another of its shape and dtype."""
        out.copy_(self._mapped_tensor(name))

    def close(self) -> None:
        """Unmap the file; reading opens it again."""
        self._mapped = {}

    def _mapped_tensor(self, name: str, index: int | slice | None = None) -> Tensor:
        if not self._is_checked:
            check_checksums(self.path)
            self._is_checked = True
        if not self._mapped or self._num_bytes_read > MAX_MAPPED_BYTES:
            self._mapped = {}
            self._mapped, self._num_bytes_read = self._map(), 0
        mapped = self._mapped[name] if index is None else self._mapped[name][index]
        prefault(mapped)
        self._num_bytes_read += mapped.nbytes
        return mapped

    def _map(self) -> Mapping[str, Tensor]:
        if self.path.suffix == ".safetensors":
            check_is_file(self.path)
            try:
                with safe_open(self.path, framework="pt") as file:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
                raise UnreadableFileError(
                    f"{self.path} cannot be read; it may be truncated or no checkpoint: {error}"
                ) from error
        content = load_torch_file(self.path)
        if not isinstance(content, Mapping) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        ):
            raise UnreadableFileError(f"{self.path} is not a dict of tensors by name")
        return content


def prefault(mapped: Tensor) -> None:
    """Map all pages of a tensor in a mapped file at once, which is several times faster than page by page.

    It is a hint; a system without it ignores it.
    """
    if sys.platform == "linux" and mapped.nbytes >= mmap.PAGESIZE and mapped.is_contiguous():
        start = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        num_bytes = mapped.data_ptr() + mapped.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), _MADV_POPULATE_READ)


def num_parameters(weights: Mapping[str, Tensor]) -> int:
    """Number of elements of all tensors."""
    return sum(weight.numel() for weight in weights.values())


def num_bytes(weights: Mapping[str, Tensor]) -> int:
    """Size of all tensors."""
    return sum(weight.nbytes for weight in weights.values())
