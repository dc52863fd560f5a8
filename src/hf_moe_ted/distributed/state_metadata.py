"""Read the metadata of a torch.distributed.checkpoint folder without executing anything in it.

torch writes the metadata as a pickle and reads it with `pickle.load`, which runs any code that a file names
(docs/upstream/torch_checkpoint_metadata_pickle.md). Here a pickle may name only the classes of such metadata, in plain
structures. Everything in it is checked afterwards: no chunk is outside its file, none is compressed, and none is larger
than its tensor.
"""

import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from enum import EnumMeta
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

MAX_METADATA_BYTES = 2**30
_MAX_CHUNK_OVERHEAD = 2**20  # bytes that torch.save adds to the numbers of one tensor

_CHECKPOINT = "torch.distributed.checkpoint"
_CLASSES = {
    (f"{_CHECKPOINT}.metadata", "Metadata"),
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "TensorProperties"),
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "StorageMeta"),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    *(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}
_OPCODES = re.findall(
    r"\w+",
    "PROTO FRAME STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 NEWOBJ REDUCE BUILD GLOBAL "
    "STACK_GLOBAL MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET SHORT_BINUNICODE BINUNICODE BININT BININT1 BININT2 "
    "LONG1 NONE NEWTRUE NEWFALSE SETITEM SETITEMS APPEND APPENDS",
)


_LOADERS: dict[int, Any] = pickle._Unpickler.dispatch


def _member(*arguments: Any) -> Any:
    """`getattr` of a member of an enumeration among `_CLASSES`, and of nothing else."""
    if len(arguments) != 2 or not isinstance(arguments[0], EnumMeta):
        raise pickle.UnpicklingError(f"it names builtins.getattr{arguments}, which no training state needs")
    enumeration, name = arguments
    return enumeration[name]


# the unpickler in Python: the one in C allocates memory for as many objects as the file claims to have
class _Unpickler(pickle._Unpickler):
    """Reads the structures in pickled metadata dataclasses, and refuses everything else."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: _LOADERS[getattr(pickle, name)[0]] for name in _OPCODES
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # so Python 3.11.2 pickles members of enumerations
            return _member
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no training state needs")
        if module == "pathlib":  # where it was saved; this is not needed
            return lambda *parts: "/".join(map(str, parts))
        return super().find_class(module, name)

    def load_build(self) -> None:
        state, target = self.stack[-1], self.stack[-2]
        is_state = isinstance(state, dict) or isinstance(target, TensorProperties)  # this class has a __setstate__
        if not is_state or callable(target):
            raise pickle.UnpicklingError("it changes an object that is not metadata")
        _LOADERS[pickle.BUILD[0]](self)

    def _check_tuple(self) -> None:
        """Refuse a deeply nested tuple: hashing it would overflow the stack of the interpreter."""
        items = [inner for item in self.stack[-1] if isinstance(item, tuple) for inner in item]
        if any(isinstance(inner, tuple) for inner in items):
            raise pickle.UnpicklingError("its tuples are nested too deeply")

    dispatch[pickle.BUILD[0]] = load_build


def _checked_tuple(load: Callable[[_Unpickler], None]) -> Callable[[_Unpickler], None]:
    def checked(self: _Unpickler) -> None:
        load(self)
        self._check_tuple()

    return checked


for _opcode in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Unpickler.dispatch[_opcode[0]] = _checked_tuple(_Unpickler.dispatch[_opcode[0]])


class SafeReader(FileSystemReader):
    """[`FileSystemReader`] for folders from untrusted sources."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """
        Raises:
            ValueError: there is no metadata, it names something that metadata does not need, or it disagrees with the
                files.
        """
        folder = Path(self.path)
        metadata = _read(folder / ".metadata")
        try:
            _check(metadata, folder)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / '.metadata'} is damaged: {error!r}") from error
        metadata.storage_meta = None
        return metadata

    def _slice_file(self, file: IO[bytes], info: Any) -> IO[bytes]:
        """The part of a file that holds one chunk."""
        part = _Part(file, info.offset, info.length)
        check_archive(io.BufferedReader(part), Path(self.path) / info.relative_path)
        return super()._slice_file(file, info)


class _Part(io.RawIOBase):
    """A part of a file as a file; torch's own class cannot be read from its end, where archives have their list."""

    def __init__(self, file: IO[bytes], start: int, size: int):
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (0, self._position, self._size)[whence] + offset
        if self._position < 0:
            raise OSError(f"the position {self._position} is before the beginning")
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        data = self._file.read(max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def check_archive(file: IO[bytes], path: Path) -> None:
    """Refuse a compressed archive of `torch.save`, which could grow when it is read; torch never compresses one.

    Raises:
        ValueError: it has compressed content, or is no archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            odd = next((i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED), None)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read; it may be truncated or damaged: {error}") from error
    if odd is not None:
        raise ValueError(f"{path} has compressed content ({odd}), which torch.save never writes; it is damaged")
    file.seek(0)


def _read(path: Path) -> Metadata:
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file")
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise ValueError(
            f"{path} is larger than {MAX_METADATA_BYTES:,} bytes, more than any list of tensors; it is damaged"
        )
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(
            f"{path} cannot be read, and nothing in it was executed: {error or type(error).__name__}"
        ) from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} holds no metadata of torch.distributed.checkpoint")
    return metadata


def _check(metadata: Metadata, folder: Path) -> None:
    """
    Raises:
        ValueError, AttributeError, KeyError, TypeError: a part of it is not what torch writes.
    """
    sizes: dict[str, int] = {}
    for index, info in _items(metadata.storage_data):
        _check_place(info, folder, sizes)
        spec = metadata.state_dict_metadata[index.fqn]
        if isinstance(spec, TensorStorageMetadata):
            num_bytes = math.prod(_counts(spec.size)) * spec.properties.dtype.itemsize
            if info.length > num_bytes + _MAX_CHUNK_OVERHEAD:
                path = folder / info.relative_path
                raise ValueError(f"{path} has {info.length} bytes for {index.fqn}, which is smaller; it is damaged")
    for name, spec in _items(metadata.state_dict_metadata):
        if isinstance(spec, TensorStorageMetadata) and not all(_is_inside(chunk, spec) for chunk in spec.chunks):
            raise ValueError(f"a chunk of {name} is outside of the tensor; {folder / '.metadata'} is damaged")


def _check_place(info: Any, folder: Path, sizes: dict[str, int]) -> None:
    """Check that a file has the part that an entry names; `sizes` caches the sizes of files."""
    name = info.relative_path
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{folder / '.metadata'} names a file outside its folder: {name!r}")
    path = folder / name
    if name not in sizes:
        if not path.is_file():
            raise ValueError(f"{path} is missing or is no file")
        sizes[name] = path.stat().st_size
    offset, length = _counts((info.offset, info.length))
    if info.transform_descriptors or offset + length > sizes[name]:
        raise ValueError(f"{path} is shorter than its list of tensors says, or is encoded; it is damaged")


def _is_inside(chunk: Any, spec: TensorStorageMetadata) -> bool:
    ends = [a + b for a, b in zip(_counts(chunk.offsets), _counts(chunk.sizes), strict=True)]
    return len(ends) == len(spec.size) and all(a <= b for a, b in zip(ends, spec.size, strict=True))


def _items(mapping: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(mapping, dict):
        raise TypeError(f"{type(mapping).__name__} instead of a dict")
    yield from mapping.items()


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(isinstance(value, int) and value >= 0 for value in values):
        raise TypeError(f"{values!r:.80} instead of sizes")
    return values


__all__ = ["SafeReader", "check_archive"]
