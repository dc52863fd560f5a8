"""Find the files of a DeepSpeed checkpoint, and open them without executing anything in them."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files.json_file import read_text
from ...files.messages import UnreadableFileError, shorten
from ...tensors.lazy_tensors import MAX_MAPPED_BYTES, prefault
from ...tensors.torch_file import check_checksums, load_torch_file

MAX_MAPPED_FILES = 16
MAX_RANKS = 2**17  # more than any cluster has

_MAX_TAG_BYTES = 4096
_MAIN = re.compile(r"mp_rank_(?P<mp>\d+)_model_states\.pt")
# DeepSpeed writes `layer_{L}_` since 0.6; before, one file held an expert of every layer.
_EXPERT = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_(?P<mp>\d+)_model_states\.pt")
_ZERO = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt")
_EXPERT_OPTIMIZER = re.compile(r"expp_rank_(?P<ep>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
_ZERO3 = re.compile(r"(?:bf16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_KINDS = (_MAIN, _EXPERT, _ZERO, _EXPERT_OPTIMIZER)


class _StandIn:
    """Replaces a class whose objects a checkpoint holds. It keeps their state and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# Megatron-DeepSpeed adds these to the main files: its arguments and the states of the random number generators.
_MEGATRON_CLASSES = (
    "argparse.Namespace",
    *(
        f"megatron.{module}.{name}"
        for module in ("enums", "model.enums", "core.enums")
        for name in ("AttnMaskType", "AttnType", "LayerType", "ModelType", "PositionEmbeddingType")
    ),
    *(f"numpy.{module}.multiarray.{name}" for module in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "numpy.dtype",
    "numpy.ndarray",
)
ALLOWED_CLASSES = (*_DEEPSPEED_CLASSES, *_MEGATRON_CLASSES)
"""Full names of classes that a checkpoint may name, in addition to those of `torch.load(weights_only=True)`.

They are not imported: their objects become objects without behaviour.
"""


def load_file(path: Path) -> Any:
    """The content of a file of `torch.save`. Its tensors are mapped from disk, not read.

    Raises:
        UnreadableFileError: the file is missing or unreadable, is a renamed file of another rank, or names a class
            outside `ALLOWED_CLASSES`.
    """
    _check_original_name(path)
    return load_torch_file(path, [(_StandIn, name) for name in ALLOWED_CLASSES])


def _check_original_name(path: Path) -> None:
    """Refuse a file that was renamed to that of another rank; only the name tells the order of shards.

    `torch.save` gives the archive in a file the name of the file.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        header = file.read(30)
        if header[:4] != b"PK\x03\x04":
            return
        name_in_archive = file.read(int.from_bytes(header[26:28], "little")).decode("utf-8", "replace")
    original = name_in_archive.split("/")[0] + ".pt"
    for kind in _KINDS:
        written, found = kind.fullmatch(original), kind.fullmatch(path.name)
        if written is not None and (found is None or written.groupdict() != found.groupdict()):
            raise UnreadableFileError(f"{path} was written as {original} and renamed; give it that name again")


class FilePool:
    """Files that are mapped while tensors are read. Each file's checksums are verified once, before its first tensor.

    At most `MAX_MAPPED_FILES` stay mapped. After `MAX_MAPPED_BYTES` all are unmapped, because pages that were read stay
    in memory until then.
    """

    def __init__(self) -> None:
        self._contents: OrderedDict[Path, Any] = OrderedDict()
        self._num_bytes_read = 0
        self._checked: set[Path] = set()

    def view(self, path: Path, select: Callable[[Any], Tensor]) -> Tensor:
        """A tensor of a file in mapped memory; use it and drop it soon.

        Args:
            path: the file.
            select: function that takes the tensor from the file's content.

        Raises:
            ValueError: see `load_file` and `check_checksums`; or the file has changed and lacks the tensor.
        """
        if self._num_bytes_read > MAX_MAPPED_BYTES:
            self.close()
        if path not in self._contents:
            while len(self._contents) >= MAX_MAPPED_FILES:
                self._contents.popitem(last=False)
            if path not in self._checked:
                check_checksums(path)
                self._checked.add(path)
            self._contents[path] = load_file(path)
        self._contents.move_to_end(path)
        try:
            tensor = select(
                self._contents[path]
            ).detach()  # masters require gradients; the graph of gradients would keep the file mapped
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has changed since the checkpoint was opened: {error!r}; open it again") from error
        self._num_bytes_read += tensor.nbytes
        prefault(tensor)
        return tensor

    def close(self) -> None:
        """Unmap all files; reading maps them again."""
        self._contents.clear()
        self._num_bytes_read = 0


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one tag, by their content.

    Attributes:
        folder: `checkpoint_dir/tag`.
        tag: the name of the folder.
        mains: `mp_rank_*_model_states.pt` by model-parallel rank.
        experts: files of experts with their model-parallel rank.
        zero: `zero_pp_rank_*_optim_states.pt` by model-parallel and data-parallel rank.
        expert_optimizers: `expp_rank_*_optim_states.pt` by model-parallel and expert-parallel rank.
        has_zero3: whether there are files that only ZeRO-3 writes.
    """

    folder: Path
    tag: str
    mains: dict[int, Path] = field(default_factory=dict)
    experts: list[tuple[int, Path]] = field(default_factory=list)
    zero: dict[tuple[int, int], Path] = field(default_factory=dict)
    expert_optimizers: dict[tuple[int, int], Path] = field(default_factory=dict)
    has_zero3: bool = False


def find_files(checkpoint_dir: Path, tag: str | None) -> CheckpointFiles:
    """The files of a tag, by default the one that `latest` names.

    Raises:
        ValueError: the folder, `latest` or the tag is missing, two files are of one rank, or a rank is larger than
            `MAX_RANKS`.
    """
    tag = _find_tag(checkpoint_dir, tag)
    folder = checkpoint_dir / tag
    paths = sorted(folder.iterdir(), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    files = CheckpointFiles(folder, tag, has_zero3=any(_ZERO3.fullmatch(path.name) for path in paths))
    for path in paths:
        _check_ranks(path)
        if match := _EXPERT.fullmatch(path.name):
            files.experts.append((int(match["mp"]), path))
        elif match := _MAIN.fullmatch(path.name):
            _add(files.mains, int(match["mp"]), path)
        elif match := _ZERO.fullmatch(path.name):
            _add(files.zero, (int(match["mp"]), int(match["dp"])), path)
        elif match := _EXPERT_OPTIMIZER.fullmatch(path.name):
            _add(files.expert_optimizers, (int(match["mp"]), int(match["ep"])), path)
    return files


def _check_ranks(path: Path) -> None:
    for kind in (*_KINDS, _ZERO3):
        match = kind.fullmatch(path.name)
        if match and any(int(number) >= MAX_RANKS for number in match.groupdict().values()):
            raise ValueError(f"{path} is of a rank of {MAX_RANKS:,} or more; remove the file, it is not from this run")


def _add(paths: dict[Any, Path], rank: Any, path: Path) -> None:
    if rank in paths:
        raise ValueError(
            f"{paths[rank]} and {path.name} are of the same rank; remove the one that is not from this run"
        )
    paths[rank] = path


def _find_tag(checkpoint_dir: Path, tag: str | None) -> str:
    if not checkpoint_dir.is_dir():
        raise ValueError(f"checkpoint_dir ({checkpoint_dir}) is not a folder; give the folder that holds `latest`")
    tags = sorted(path.name for path in checkpoint_dir.iterdir() if path.is_dir() and _has_weights(path))
    present = f"it has {', '.join(tags)}" if tags else "it has no checkpoint at all"
    latest = checkpoint_dir / "latest"
    if tag is None:
        if not latest.is_file():
            if _has_weights(checkpoint_dir):
                present = f"it is itself a tag: give {checkpoint_dir.parent} and tag={checkpoint_dir.name!r}"
            raise ValueError(f"checkpoint_dir ({checkpoint_dir}) has no file `latest`; give a tag ({present})")
        tag = read_text(latest, "latest", _MAX_TAG_BYTES).strip()
        if tag not in tags:
            raise ValueError(f"{latest} names the tag {tag!r}, but {checkpoint_dir} does not have it ({present})")
    if tag not in tags:
        raise ValueError(f"tag ({tag!r}) is not in {checkpoint_dir} ({present})")
    return tag


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*_model_states.pt")) or any(folder.glob("*_optim_states.pt"))


@contextmanager
def content_errors(path: Path, what: str) -> Iterator[None]:
    """Turn any exception during the parsing of a file's content into an error that names the file.

    A damaged file can hold anything in any place, so any exception can occur.

    Args:
        path: the file.
        what: what it should be.

    Raises:
        UnreadableFileError: always if the block fails.
    """
    try:
        yield
    except UnreadableFileError:
        raise
    except Exception as error:
        raise UnreadableFileError(f"{path} is not {what} as DeepSpeed writes it: {shorten(repr(error))}") from error


def list_names(names: Sequence[object], limit: int = 20) -> str:
    """Names for an error message; of many, only the first."""
    shown = ", ".join(map(str, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


__all__ = [
    "ALLOWED_CLASSES",
    "MAX_RANKS",
    "CheckpointFiles",
    "FilePool",
    "content_errors",
    "find_files",
    "list_names",
    "load_file",
]
