"""Save and load models of any layout as ordinary Hugging Face folders; new folders appear once they are complete.

All ranks call these functions. Rank 0 writes. For each tensor in turn, it asks the other ranks for their parts.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.distributed_c10d import get_backend_config
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files.output import files_into, new_folder
from ..files.output_kinds import MODEL, OutputKind
from ..tensors.lazy_tensors import LazyTensors
from ..tensors.safetensors_io import check_tensors, read_weight_map, write_pretrained_tensors
from .private_transformers import has_adapters, names_not_saved
from .sharding import local_shape, local_tensor, regions, regions_at, sources
from .weight_names import converted_tensors

# safetensors' names of dtypes
_INTEGERS = {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
_INTEGERS |= {"BOOL": torch.bool, "U8": torch.uint8}
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    processing_class: Any = None,
    max_shard_size: int | str = "5GB",
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model as one ordinary folder, as its own `save_pretrained` does in a single process.

    Rank 0 collects parameters and persistent buffers one at a time and writes them to their place in the mapped file.
    In addition it holds only one rank's part of one tensor. Tensors keep their dtypes, and tied weights are written
    once. Tensors also keep the names that they have in the model. `from_pretrained` reads these, as well as the names
    of the original checkpoint that transformers would restore (such as Mixtral's experts one by one).

    A new folder appears complete or not at all. In a folder with other files, these stay; once all new files are
    written, they are put in place one after another, `config.json` last, because nothing loads without it.

    Args:
        model: the same model on every rank, sharded or not.
        folder: a folder on a disk of rank 0.
        processing_class: a tokenizer, or another object with `save_pretrained`, that is saved with the model.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        state_dict: tensors that are written instead of all or some of the model's: sharded on all ranks, or whole on
            rank 0 ([`whole_state_dict`]).

    Raises:
        ValueError: the model is quantized or has adapters, `max_shard_size` is no size, rank 0 is not in the mesh of a
            tensor, or `state_dict` has tensors that the model does not have.
        OSError: on rank 0, such as for a full disk; a RuntimeError on the other ranks.
    """
    with together():
        if getattr(model, "peft_config", None):
            raise ValueError(
                f"{type(model).__name__} has adapters (PEFT): call save_pretrained of the PEFT model, which writes "
                "them, or call merge_and_unload before"
            )
        wrong = {"is quantized": getattr(model, "hf_quantizer", None), "has adapters": has_adapters(model)}
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"the model {what}; save it unsharded, with its own save_pretrained")
        ignored = names_not_saved(model)
        tensors = named_tensors(model) if state_dict is None else _tensors_of_model(state_dict, model)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
        _check_sources(tensors)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [
        type(model).__name__.removeprefix("FSDP")
    ]  # FSDP2 makes a subclass of a model's class
    with atomic_folder(folder, kind=MODEL, stale=_WEIGHT_FILE) as temporary:
        if rank() > 0:
            _send_what_is_asked_for(tensors)
        else:
            _collect_and_write(tensors, temporary, max_shard_size)
            model.config.save_pretrained(temporary)
            if model.can_generate():
                model.generation_config.save_pretrained(temporary)
            if processing_class is not None:
                processing_class.save_pretrained(temporary)


def load_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Fill the parameters and persistent buffers of a model from a folder of `save_pretrained`.

    Each rank reads its own regions. Tensors with other names than in the model ([`converted_tensors`]) are read whole,
    one tensor of the model at a time. Values are converted to the dtypes of the model.

    Args:
        model: a model, sharded or not, that is not on the meta device.
        folder: a folder that all ranks can read, with safetensors under the model's own names, or under names that
            transformers converts to them.

    Raises:
        ValueError: on all ranks: there are no safetensors, or they do not hold the model; the message gives all names.
    """
    folder = Path(folder)
    with together(), torch.no_grad(), _WeightFiles(folder) as files:
        tensors, tied = named_tensors(model), getattr(model, "all_tied_weights_keys", ())
        names = [name for name in files.names if name in tensors or name not in tied]
        specs = dict(converted_tensors(model, tensors, names, files.spec))
        check_tensors(specs, tensors, str(folder))
        total = sum(region.local.nbytes for tensor in tensors.values() for region in regions(tensor))
        with tqdm(total=total, unit="B", unit_scale=True, desc="Reading weights", disable=rank() > 0) as progress:
            for name in [name for name in names if name in tensors]:
                _fill(tensors[name], functools.partial(files.read, name), progress)
            others = [name for name in names if name not in tensors]
            for name, whole in converted_tensors(model, tensors, others, files.read):
                _fill(tensors[name], whole.__getitem__, progress)


def _fill(tensor: Tensor, read: Callable[[tuple[slice, ...]], Tensor], progress: Any) -> None:
    """Fill each region of this rank with what `read` returns for its place in the whole tensor."""
    for region in regions(tensor):
        region.local.copy_(read(region.slices))
        progress.update(region.local.nbytes)


@contextmanager
def atomic_folder(
    folder: str | os.PathLike[str], *, kind: OutputKind = MODEL, stale: re.Pattern[str] | None = None
) -> Iterator[Path]:
    """A temporary folder, the same on all ranks. It replaces `folder` if all ranks leave the block without an error.

    Everything is flushed to disk before. If a rank raises an error in the block, all ranks raise one after it, and
    nothing has changed. A killed process leaves files that the next process to write there removes; see [`new_folder`].

    Args:
        folder: a path without a folder, or a folder that is replaced.
        kind: kind of the output; only a folder of the same kind is replaced.
        stale: if given, files in `folder` stay, and new files are put beside or over them, one after another. Files of
            an earlier version with such names are removed.

    Raises:
        ValueError: on all ranks: `folder` is a file, cannot be created, or has something else in it.
        RuntimeError: on all ranks except those with the error.
    """
    folder = Path(os.path.realpath(folder))
    with ExitStack() as stack:
        shared: list[Path | None] = [None]
        with together():
            if rank() == 0:
                is_merged = stale is not None and folder.is_dir() and any(folder.iterdir())
                new = new_folder(folder, overwrite=True, kind=kind)
                shared = [stack.enter_context(files_into(folder, last=kind.last, stale=stale) if is_merged else new)]
        if dist.is_initialized():
            dist.broadcast_object_list(shared, src=0)
        temporary = shared[0]
        assert temporary is not None
        with together():
            yield temporary
        with together():
            stack.close()


@contextmanager
def together() -> Iterator[None]:
    """A block that all ranks leave together: if one raises an error, the others raise one, too, and do not wait.

    Raises:
        ValueError: another rank raised one; the message is the same.
        RuntimeError: another rank raised another error.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if dist.is_initialized():
        own = None if error is None else (isinstance(error, ValueError), str(error), repr(error))
        gathered: list[tuple[bool, str, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        for other, found in enumerate(gathered):
            if found is not None and error is None:
                is_value_error, message, representation = found
                raise ValueError(message) if is_value_error else RuntimeError(f"rank {other} failed: {representation}")
    if error is not None:
        raise error


def rank() -> int:
    """Rank of this process; 0 for a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the names under which they are saved, each once. Parameters are shards.

    A tied weight has the name of the weight to which others are tied.
    """
    # FSDP2's hooks on state_dict restore the shards if a forward left gathered parameters
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    tied = getattr(model, "all_tied_weights_keys", {})
    name_of_id: dict[int, str] = {}
    for name in sorted(state, key=lambda name: name in tied):
        name_of_id.setdefault(id(state[name]), name)
    return {name: tensor for name, tensor in state.items() if name_of_id[id(tensor)] == name}


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole `state_dict` of a sharded model, as on one process. All ranks call it.

    Returns:
        On rank 0: whole tensors on the CPU by the names of `state_dict`; tied weights are one tensor under all of their
        names. On the other ranks: an empty dict.
    """
    tensors = named_tensors(model)
    whole = whole_tensors(tensors)
    if rank() > 0:
        return {}
    whole_of_id = {id(tensor): whole[name] for name, tensor in tensors.items()}
    state = model.state_dict(keep_vars=True)
    return {name: whole_of_id[id(tensor)] for name, tensor in state.items() if id(tensor) in whole_of_id}


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather sharded tensors whole on the CPU of rank 0; other ranks get nothing. All ranks call it."""
    with together():
        _check_sources(tensors)
    if rank() > 0:
        _send_what_is_asked_for(tensors)
        return {}
    try:
        collected = _collected(tensors)
        return {name: collected[name] for name in tensors}
    finally:
        _tell(None)


def _tensors_of_model(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state dict that are saved, tied weights once."""
    own, state = named_tensors(model), model.state_dict()
    wrong = [name for name, tensor in state_dict.items() if name not in state or tensor.shape != state[name].shape]
    if wrong or (rank() == 0 and not state_dict):
        shapes = {name: (*getattr(state_dict[name], "shape", ()),) for name in wrong}
        raise ValueError(
            f"state_dict has {shapes or 'nothing'} (shapes by name), which are not tensors of the model; give what "
            "accelerator.get_state_dict(model) or model.state_dict() returns, or leave it out"
        )
    return {name: tensor for name, tensor in state_dict.items() if name in own}


def _check_sources(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        regions(tensor)
        if rank() == 0 and not sources(tensor, 0):
            raise ValueError(f"{name} is only on other ranks, so rank 0 cannot write it")


def _collect_and_write(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    """Rank 0's part."""
    try:
        write_pretrained_tensors(_collected(tensors), folder, max_shard_size=max_shard_size)
    finally:
        _tell(None)  # also after an error, because the others wait for the next name


def _collected(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """The whole tensors, on rank 0's CPU. The other ranks call [`_send_what_is_asked_for`]."""

    def read_into(name: str, out: Tensor) -> None:
        _tell(name)
        for source, coordinate in sources(tensors[name], 0).items():
            for region in regions_at(tensors[name], coordinate, _receive(tensors[name], coordinate, source)):
                out[region.slices].copy_(region.local)

    def read(name: str) -> Tensor:
        out = torch.empty_like(specs[name], device="cpu")
        read_into(name, out)
        return out

    specs = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    return LazyTensors(specs, read, read_into=read_into)


def _send_what_is_asked_for(tensors: Mapping[str, Tensor]) -> None:
    """The part of the other ranks."""
    while (name := _tell(None)) is not None:
        if name not in tensors:  # rank 0 has the whole tensor, in its own state dict
            continue
        local = local_tensor(tensors[name])
        if rank() in sources(tensors[name], 0) and local.numel():
            _exchange(dist.isend, local.to(_message_device(local)), 0)


def _receive(tensor: Tensor, coordinate: tuple[int, ...], source: int) -> Tensor:
    """The local tensor of another rank."""
    local = local_tensor(tensor)
    if source == rank():
        return local
    received = torch.empty(local_shape(tensor, coordinate), dtype=tensor.dtype, device=_message_device(local))
    if received.numel():
        _exchange(dist.irecv, received, source)
    return received


def _exchange(operation: Any, local: Tensor, peer: int) -> None:
    # as a batch, because otherwise NCCL makes a communicator for each pair of ranks; as bytes, because not every
    # backend knows every dtype
    message = local.contiguous().view(-1).view(torch.uint8)
    for work in dist.batch_isend_irecv([dist.P2POp(operation, message, peer)]):
        work.wait()


def _message_device(tensor: Tensor) -> torch.device:
    """The device for a message: NCCL cannot move tensors on the CPU, such as offloaded parameters."""
    devices = [part.split(":")[0] for part in get_backend_config().split(",")]
    return tensor.device if tensor.device.type in devices else torch.device(devices[0])


def _tell(name: str | None) -> str | None:
    """Send rank 0's `name` to all ranks."""
    told = [name]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    return told[0]


def has_weights(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has the files that [`load_weights`] reads."""
    return any(Path(folder, name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


class _WeightFiles:
    """The tensors in a folder's safetensors; one file is open at a time."""

    def __init__(self, folder: Path):
        self._file_of_name = _weight_files(folder)
        self.names = sorted(self._file_of_name, key=lambda name: str(self._file_of_name[name]))
        self._stack = ExitStack()
        self._path: Path | None = None
        self._file: Any = None

    def __enter__(self) -> "_WeightFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def spec(self, name: str) -> Tensor:
        """Shape and kind of dtype of a tensor, on the meta device.

        Raises:
            ValueError: its file is missing or damaged, or lacks the tensor.
        """
        path = self._file_of_name[name]
        try:
            found = self._open(name).get_slice(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}, which should have {name}, cannot be read: {error}") from error
        return torch.empty(found.get_shape(), dtype=_INTEGERS.get(found.get_dtype()), device="meta")

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        file = self._open(name)
        return file.get_slice(name)[index] if index else file.get_tensor(name)  # a scalar has no slices

    def _open(self, name: str) -> Any:
        path = self._file_of_name[name]
        if path != self._path:
            self._stack.close()
            self._file, self._path = self._stack.enter_context(safe_open(path, framework="pt")), path
        return self._file


def _weight_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor.

    Raises:
        ValueError: there are no safetensors, or they cannot be read.
    """
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except SafetensorError as error:
            raise ValueError(f"the weights in {folder} cannot be read: {error!r}") from error
    if not index.is_file():
        raise ValueError(f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    return {name: folder / file_name for name, file_name in read_weight_map(index).items()}


__all__ = [
    "atomic_folder",
    "has_weights",
    "load_weights",
    "named_tensors",
    "rank",
    "save_pretrained",
    "together",
    "whole_state_dict",
    "whole_tensors",
]
