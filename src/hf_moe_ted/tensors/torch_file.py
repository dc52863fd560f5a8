"""Open files of `torch.save` without executing anything in them, and check them before use.

A file is untrusted: it may be damaged or malicious. Its archive must have the form that `torch.save` writes and match
its checksums, and the cost of opening it is bounded by its size.
"""

import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..files.messages import UnreadableFileError, check_is_file, shorten

MAX_PICKLE_BYTES = 256 * 2**20
MAX_PICKLE_OPERATIONS = 5_000_000  # a tensor takes about 40 operations
MAX_NESTING = 64
MAX_EMPTY_SIZE = 2**24  # bound for a dimension of a tensor without elements, which the file's size does not bound

_CHUNK_BYTES = 2**22
_ZIP_MAGIC = b"PK\x03\x04"
_NUM_LEGACY_PICKLES = 5  # before the numbers: magic, protocol, system, content, keys
# `torch.load(weights_only=True)` allows them, but they take any amount of memory, and no checkpoint has them
_ALLOCATING = re.compile(r"(__builtin__|builtins)\.bytearray|torch\.(cuda\.)?(sparse\.)?\w*Tensor")


def load_torch_file(path: Path, stand_ins: Iterable[Any] = ()) -> Any:
    """The content of a file of `torch.save`. Its tensors are mapped from disk, not read.

    It verifies the checksum of the pickle, which has names, shapes and everything else except tensor data; see
    [`check_checksums`] for that. Files of PyTorch before 1.6 have no checksums, and their tensors are read at once.

    Args:
        path: the file.
        stand_ins: pairs of a class and the full name of the class in the file that it replaces.

    Raises:
        UnreadableFileError: the file is missing, unreadable, or damaged; it names a class that is not allowed, or has a
            tensor that is larger than its data.
    """
    check_is_file(path)
    try:
        is_archive = _check_pickles(path)
        with torch.serialization.safe_globals(list(stand_ins)):
            content = torch.load(path, map_location="cpu", mmap=is_archive, weights_only=True)
        _check_content(path, content)
    except UnreadableFileError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|unrecognized function|Unsupported class) (<.*?>|[\w.]+)", str(error))
        if refused is not None:
            raise _refused(path, refused[1]) from error
        raise _damaged(path, error) from error
    except Exception as error:  # a damaged pickle can raise any exception
        raise _damaged(path, error) from error
    return content


def check_checksums(path: Path) -> None:
    """Read a whole file once and verify the CRC-32 checksums of its archive, if it has them.

    Files of PyTorch before 1.6 have none, and with `torch.serialization.set_crc32_options(False)` all are 0.

    Raises:
        UnreadableFileError: a bit has changed, or the file cannot be read.
    """
    check_is_file(path)
    if not _is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(path, archive)
            for entry in entries if any(entry.CRC for entry in entries) else ():
                _read_through(archive, entry)
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _read_through(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    with archive.open(entry) as file:  # compares the checksum at the end
        while file.read(_CHUNK_BYTES):
            pass


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def _entries(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The entries of an archive, none of them compressed, so none is larger than the file."""
    entries = archive.infolist()
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise UnreadableFileError(
            f"{path} has compressed entries such as {packed[0].filename}, which torch.save never writes; load the "
            "file at its origin and save it again"
        )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UnreadableFileError(f"{path} cannot be read; it may be truncated or damaged: its entries overlap")
    return entries


def _check_pickles(path: Path) -> bool:
    """Check the pickles of a file without running them; return whether it is an archive.

    Raises:
        UnreadableFileError: they are damaged, too long, or allocate more than the file has.
    """
    if not _is_archive(path):
        with path.open("rb") as file:
            for _ in range(_NUM_LEGACY_PICKLES):
                _check_operations(path, file)
        return False
    with zipfile.ZipFile(path) as archive:
        pickles = [entry for entry in _entries(path, archive) if entry.filename.split("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise UnreadableFileError(f"{path} cannot be read: it is an archive, but not of torch.save")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise UnreadableFileError(
                f"{path} has {pickles[0].file_size:,} bytes besides its tensors, more than {MAX_PICKLE_BYTES:,}; this "
                "is no checkpoint of weights"
            )
        if not any(entry.CRC for entry in archive.infolist()):
            pickles[0].CRC = None  # type: ignore[assignment]  # then zipfile checks nothing
        _check_operations(path, archive.read(pickles[0]))
    return True


def _check_operations(path: Path, file: IO[bytes] | bytes) -> None:
    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if number >= MAX_PICKLE_OPERATIONS:
            raise UnreadableFileError(
                f"{path} cannot be read: its pickle has more than {MAX_PICKLE_OPERATIONS:,} operations, far more than "
                "weights need"
            )
        if operation.name == "GLOBAL" and _ALLOCATING.fullmatch(name := str(argument).replace(" ", ".")):
            raise _refused(path, name)


def _check_content(path: Path, content: Any) -> None:
    """Check that every tensor is dense and within its data, and that nothing is nested too deeply."""
    num_bytes = path.stat().st_size
    seen: set[int] = set()
    level: list[Any] = [content]
    for _ in range(MAX_NESTING):
        below: list[Any] = []
        for value in level:
            if isinstance(value, Tensor):
                _check_tensor(path, value, num_bytes)
            elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
                seen.add(id(value))
                below += value.values() if isinstance(value, Mapping) else value
        level = below
        if not level:
            return
    raise UnreadableFileError(f"{path} cannot be read: it is nested more than {MAX_NESTING} deep; it is damaged")


def _check_tensor(path: Path, tensor: Tensor, num_bytes: int) -> None:
    kind = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        raise UnreadableFileError(
            f"{path} holds a tensor ({kind}) that is not a plain, dense tensor; save it as a dense tensor"
        )
    if not tensor.numel() and max(tensor.shape) > MAX_EMPTY_SIZE:
        raise UnreadableFileError(f"{path} holds a tensor ({kind}) without numbers; it is damaged")
    if not tensor.nbytes <= tensor.untyped_storage().nbytes() <= num_bytes:
        raise UnreadableFileError(
            f"{path} holds a tensor ({kind}) of {tensor.nbytes:,} bytes, but fewer numbers; it is damaged, or the "
            "tensor was expanded: save it with .contiguous()"
        )


def _refused(path: Path, name: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{path} names {name}, which no checkpoint of weights needs; nothing in the file was executed. If you trust "
        "it, load it yourself and save it again without that object"
    )


def _damaged(path: Path, error: Exception) -> UnreadableFileError:
    return UnreadableFileError(f"{path} cannot be read; it may be truncated or damaged: {shorten(error)}")


__all__ = ["check_checksums", "load_torch_file"]
