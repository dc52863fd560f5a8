"""Find and read experts in the safetensors files of a folder.

Files are read, not mapped. So the reader owns its memory, and a file that is truncated during use causes an error
instead of a crash. Files stay open, so the folder may be renamed, replaced or removed.
"""

import json
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files.messages import UnreadableFileError
from ..tensors.safetensors_io import read_weight_map

_LENGTH_BYTES = 8


class ExpertFilesChangedError(ValueError):
    """A file has changed since the model was loaded, but the model still reads experts from it."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file.

    Attributes:
        file: index among the open files.
        offset: offset of the first byte.
        num_bytes: number of bytes.
    """

    file: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class _OpenFile:
    path: Path
    descriptor: int
    size: int
    modified_ns: int


class ExpertFiles:
    """Tensors of a folder by name, read from open files.

    Args:
        folder: folder with one safetensors file, or with shards and an index.

    Raises:
        ValueError: there are no files, or one is damaged.
    """

    def __init__(self, folder: Path):
        if not hasattr(os, "preadv"):
            raise ValueError("experts cannot be read from files on this system; use experts_in='memory'")
        self._files: list[_OpenFile] = []
        weakref.finalize(self, _close, self._files)
        self._spans: dict[str, Span] = {}
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            names = sorted(set(read_weight_map(index).values()))
        elif (folder / SAFE_WEIGHTS_NAME).is_file():
            names = [SAFE_WEIGHTS_NAME]
        else:
            raise ValueError(
                f"{folder} has no safetensors files to read experts from; make some with hf-moe-ted quantize or "
                "hf-moe-ted convert, or keep the experts in memory"
            )
        for name in names:
            self._open(folder / name)

    def _open(self, path: Path) -> None:
        number = len(self._files)
        descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(descriptor)
        self._files.append(_OpenFile(path, descriptor, status.st_size, status.st_mtime_ns))
        length = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
        try:
            header = json.loads(os.pread(descriptor, min(length, status.st_size), _LENGTH_BYTES))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    self._spans[name] = Span(number, _LENGTH_BYTES + length + start, end - start)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnreadableFileError(f"{path} is not a safetensors file: {error}") from error

    def span(self, name: str, index: int | None = None, num_indices: int = 1) -> Span:
        """The bytes of a tensor, or of one index of its first dimension, which has `num_indices`."""
        whole = self._spans[name]
        if index is None:
            return whole
        num_bytes = whole.num_bytes // num_indices
        return Span(whole.file, whole.offset + index * num_bytes, num_bytes)

    def announce(self, spans: Iterable[Span]) -> None:
        """Tell the system what is read next, so that the disk can start early; this is a hint."""
        if hasattr(os, "posix_fadvise"):
            for span in spans:
                file = self._files[span.file]
                os.posix_fadvise(file.descriptor, span.offset, span.num_bytes, os.POSIX_FADV_WILLNEED)

    def read_into(self, spans: Mapping[str, Span], outs: Mapping[str, Tensor]) -> None:
        """Read spans into tensors of the same sizes, contiguous and in main memory.

        Raises:
            ExpertFilesChangedError: a file was changed or truncated since it was opened.
        """
        for number in {span.file for span in spans.values()}:
            self._require_unchanged(self._files[number])
        for name, span in spans.items():
            buffer = memoryview(outs[name].view(torch.uint8).flatten().numpy())  # type: ignore[arg-type]
            assert len(buffer) == span.num_bytes, (name, len(buffer), span)
            self._fill(self._files[span.file], buffer, span.offset)

    def _fill(self, file: _OpenFile, buffer: memoryview, offset: int) -> None:
        while buffer:
            num_read = os.preadv(file.descriptor, [buffer], offset)
            if not num_read:
                raise _changed(file)
            buffer, offset = buffer[num_read:], offset + num_read

    def _require_unchanged(self, file: _OpenFile) -> None:
        status = os.fstat(file.descriptor)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):
            raise _changed(file)


def _changed(file: _OpenFile) -> ExpertFilesChangedError:
    return ExpertFilesChangedError(
        f"{file.path} has changed since the model was loaded, but the model reads experts from it while it runs; load "
        "the model again"
    )


def _close(files: list[_OpenFile]) -> None:
    for file in files:
        os.close(file.descriptor)
    files.clear()


__all__ = ["ExpertFiles", "ExpertFilesChangedError", "Span"]
