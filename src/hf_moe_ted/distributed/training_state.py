"""Save optimizer, scheduler and weights from all ranks, and load them in any layout.

The format is a folder of torch.distributed.checkpoint, and a small file for everything that is no tensor. Chunks are
the regions that ranks hold (sharding.py), because torch would take a DTensor as one rectangle. Values of a parameter
are stored under its name, because an optimizer's groups of parameters may depend on the layout.
"""

import io
import itertools
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from tqdm.auto import tqdm

from ..files.output_kinds import TRAINING_STATE
from .checkpoint import atomic_folder, named_tensors, rank, together
from .sharding import Region, regions
from .state_metadata import SafeReader, check_archive

_FILE = "training_state.pt"
# options of a param group that are not saved: the parameters, and how a step is computed, which depends on the device
_NO_OPTIONS = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")
# lists of torch's schedulers with one entry per param group
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def save_training_state(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any = None,
    *,
    weights: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write what training needs to continue, each rank its own part. The folder appears once it is complete.

    Args:
        folder: a folder on a disk that all ranks share; an earlier one is replaced.
        model: the same model on every rank, sharded or not.
        optimizer: an optimizer of the model's parameters. States are written in their own dtypes.
        scheduler: a scheduler of `torch.optim.lr_scheduler`, or an object with such a `state_dict`.
        weights: whether parameters and persistent buffers are written, too.
        extra: numbers, strings, tensors, and lists and dicts of them; those of rank 0 are written.

    Raises:
        ValueError: on all ranks: the optimizer has parameters that are not the model's, or a state with an unknown
            layout; `extra` or the scheduler holds something that cannot be read without running code.
        RuntimeError: a rank could not write.
    """
    with together():
        optimizer = _unwrap(optimizer)
        model_tensors = named_tensors(model)
        names = group_names(model_tensors, optimizer)
        tensors, scalars = _optimizer_state(names, optimizer)
        if weights:
            tensors |= {f"weights.{name}": tensor for name, tensor in model_tensors.items()}
        rest = {
            "optimizer_class": class_of_state(optimizer),
            "groups": [
                {"parameters": group_names, "options": {k: v for k, v in group.items() if k not in _NO_OPTIONS}}
                for group_names, group in zip(names, optimizer.param_groups, strict=True)
            ],
            "dtypes": {name: parameter.dtype for name, parameter in _parameters(names, optimizer)},
            "scalars": scalars,
            "scheduler": None if scheduler is None else scheduler_by_name(scheduler.state_dict(), names),
            "extra": dict(extra or {}),
        }
        encoded = _encode(rest)
    with atomic_folder(folder, kind=TRAINING_STATE) as temporary:
        _run_dcp(dcp.save, tensors, storage_writer=dcp.FileSystemWriter(temporary), planner_class=_RegionSavePlanner)
        if rank() == 0:
            (temporary / _FILE).write_bytes(encoded)


def load_training_state(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, scheduler: Any = None
) -> dict[str, Any]:
    """Load into a model, an optimizer and a scheduler what `save_training_state` wrote in any layout.

    The layout of the model does not change; weights are loaded if the folder has them. The optimizer may be new:
    missing states are made in the layout of their parameter and in their saved dtype. It may group parameters in
    another way, if all parameters of a group had the same options.

    Returns:
        `extra`.

    Raises:
        ValueError: on all ranks: `folder` has no training state, or one of another model, dtype or optimizer (the
            message names the parameter). Nothing was changed.
        RuntimeError: a rank could not read.
    """
    folder, optimizer = Path(folder), _unwrap(optimizer)
    with together():
        rest, specs = _open(folder)
        model_tensors = named_tensors(model)
        names = group_names(model_tensors, optimizer)
        options = _options_to_set(rest, names, optimizer, folder)
        weights = _weights_to_load(specs, model_tensors, folder)
        states = _states_to_load(specs, names, optimizer)
        if scheduler is not None and rest["scheduler"] is None:
            raise ValueError(f"{folder} has no state of a scheduler; give no scheduler")
        schedule = None if scheduler is None else scheduler_by_group(rest["scheduler"], names)
    tensors = {f"optimizer.{name}.{key}": value for name, state in states.items() for key, value in state.items()}
    _run_dcp(dcp.load, tensors | weights, storage_reader=SafeReader(folder), planner_class=_RegionLoadPlanner)
    _set(optimizer, names, options, states, rest["scalars"])
    if scheduler is not None:
        scheduler.load_state_dict(schedule)
    extra: dict[str, Any] = rest["extra"]
    return extra


class _RegionSavePlanner(dcp.DefaultSavePlanner):
    """Chunks are regions. If several ranks hold the same region, the base class chooses the rank that writes it."""

    def __init__(self, progress: Any):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._progress = progress

    def create_local_plan(self) -> SavePlan:
        self._views: dict[MetadataIndex, Tensor] = {}
        items = []
        for name, tensor in self.state_dict.items():
            for region in regions(tensor):
                index = MetadataIndex(name, region.offsets)
                data = TensorWriteData(_chunk(region), TensorProperties(dtype=tensor.dtype), tensor.shape)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self._views[index] = region.local
        self.plan = SavePlan(items)
        return self.plan

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self._progress.reset(sum(item.tensor_storage_size() or 0 for item in new_plan.items))
        return super().finish_plan(new_plan)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        self._progress.update(self._views[index].nbytes)
        return self._views[index]


class _RegionLoadPlanner(dcp.DefaultLoadPlanner):
    """Plans the reads for the regions of this rank."""

    def __init__(self, progress: Any):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._progress = progress

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        self._views: dict[MetadataIndex, Tensor] = {}
        items = []
        num_bytes = 0
        for name, tensor in self.state_dict.items():
            found = regions(tensor)
            self._views.update({MetadataIndex(name, region.offsets): region.local for region in found})
            spec = cast(TensorStorageMetadata, self.metadata.state_dict_metadata[name])
            items += create_read_items_for_chunk_list(name, spec, [_chunk(region) for region in found])
            num_bytes += sum(region.local.nbytes for region in found)
        self._progress.reset(num_bytes)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._views[index]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self._progress.update(tensor.nbytes)


def _chunk(region: Region) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes))


def _run_dcp(function: Callable[..., Any], tensors: dict[str, Tensor], *, planner_class: Any, **storage: Any) -> None:
    verb = "Writing" if function is dcp.save else "Reading"
    bar = tqdm(unit="B", unit_scale=True, desc=f"{verb} training state", disable=rank() > 0)
    with bar as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is intended here
        try:
            function(tensors, planner=planner_class(progress), no_dist=not dist.is_initialized(), **storage)
        except CheckpointException as error:  # it is no subclass of Exception, and all ranks get it
            failed = "; ".join(f"rank {rank}: {failure[0]!r}" for rank, failure in error.failures.items())
            raise RuntimeError(f"{verb.lower()} a training state failed: {failed}") from error


def _unwrap(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def class_of_state(optimizer: Optimizer) -> str:
    """Name of the class of an optimizer's states; equal for optimizers that can read each other's states."""
    return AdamW.__name__ if isinstance(optimizer, AdamW) else type(optimizer).__name__


def group_names(model_tensors: Mapping[str, Tensor], optimizer: Optimizer) -> list[list[str]]:
    """Names of the parameters, one list per param group."""
    name_of_id = {id(tensor): name for name, tensor in model_tensors.items()}
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in name_of_id:
                raise ValueError(
                    f"parameter {position} of param group {number}, of shape {tuple(parameter.shape)}, does not "
                    "belong to the model; make the optimizer after the model is sharded"
                )
    return [[name_of_id[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _parameters(names: list[list[str]], optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        yield from zip(group_names, group["params"], strict=True)


def _optimizer_state(
    names: list[list[str]], optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors under their names in the checkpoint, and other values (steps) by parameter."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in _parameters(names, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                scalars.setdefault(name, {})[key] = value
            elif value.ndim == 0 and not isinstance(value, DTensor):
                scalars.setdefault(name, {})[key] = value.cpu()
            elif isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                raise ValueError(
                    f"{key} of {name} is no DTensor, but the parameter is one, so the layout of the state is unknown"
                )
            else:
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors, scalars


def _open(folder: Path) -> tuple[dict[str, Any], dict[str, TensorStorageMetadata]]:
    """Read the values that are no tensors, and the list of tensors.

    Raises:
        ValueError: it does not exist or cannot be read.
    """
    try:
        with (folder / _FILE).open("rb") as file:
            check_archive(file, folder / _FILE)
            rest: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        specs = SafeReader(folder).read_metadata().state_dict_metadata
        _check_rest(rest)
    except Exception as error:  # a damaged file can raise any exception
        raise ValueError(f"{folder} has no training state that can be read: {error}") from error
    return rest, {name: spec for name, spec in specs.items() if isinstance(spec, TensorStorageMetadata)}


def _check_rest(rest: Any) -> None:
    """
    Raises:
        KeyError, TypeError: it has another form than `save_training_state` writes.
    """
    kinds: dict[str, type | tuple[type, ...]] = {"optimizer_class": str, "groups": list, "extra": dict}
    kinds |= {"dtypes": dict, "scalars": dict, "scheduler": (dict, type(None))}
    for key, kind in kinds.items():
        if not isinstance(rest[key], kind):
            raise TypeError(f"{key} is of the type {type(rest[key]).__name__}")
    for group in rest["groups"]:
        if not isinstance(group["options"], dict) or not all(isinstance(name, str) for name in group["parameters"]):
            raise TypeError("a param group is damaged")


def _encode(rest: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(rest, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"extra or the scheduler's state holds something that cannot be read without running code: {error}"
        ) from error
    return buffer.getvalue()


def _check_same_names(saved: Mapping[str, Any], wanted: list[str], what: str) -> None:
    missing, unknown = [name for name in wanted if name not in saved], sorted({*saved} - {*wanted})
    if missing or unknown:
        lines = [f"missing: {name}" for name in missing] + [f"unknown: {name}" for name in unknown]
        raise ValueError(f"{what} has other parameters than the one to load\n  " + "\n  ".join(lines))


def _weights_to_load(
    specs: Mapping[str, TensorStorageMetadata], model_tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    saved = {name.removeprefix("weights."): spec for name, spec in specs.items() if name.startswith("weights.")}
    if not saved:
        return {}
    _check_same_names(saved, [*model_tensors], f"the model in {folder}")
    for name, tensor in model_tensors.items():
        _check_shape(name, saved[name], tensor)
    return {f"weights.{name}": tensor.detach() for name, tensor in model_tensors.items()}


def _states_to_load(
    specs: Mapping[str, TensorStorageMetadata], names: list[list[str]], optimizer: Optimizer
) -> dict[str, dict[str, Tensor]]:
    """The states of each parameter: existing ones if they fit, or new ones in the layout of the parameter."""
    saved: dict[str, dict[str, TensorStorageMetadata]] = {}
    for entry, spec in specs.items():
        if entry.startswith("optimizer."):
            name, _, key = entry.removeprefix("optimizer.").rpartition(".")
            saved.setdefault(name, {})[key] = spec
    states: dict[str, dict[str, Tensor]] = {}
    for name, parameter in _parameters(names, optimizer):
        for key, spec in saved.get(name, {}).items():
            dtype = spec.properties.dtype
            there = optimizer.state.get(parameter, {}).get(key)
            fits = isinstance(there, Tensor) and there.shape == spec.size and there.dtype == dtype
            if not fits or isinstance(there, DTensor) != isinstance(parameter, DTensor):
                _check_shape(f"{key} of {name}", spec, parameter)
                there = torch.empty_like(parameter.detach(), dtype=dtype)
            states.setdefault(name, {})[key] = there
    return states


def _check_shape(name: str, spec: TensorStorageMetadata, tensor: Tensor) -> None:
    if spec.size != tensor.shape:
        raise ValueError(
            f"{name} has the shape {tuple(spec.size)} in the checkpoint, but the parameter has {tuple(tensor.shape)}"
        )


def _common(values: Mapping[str, Any], group: list[str], what: str) -> Any:
    """The value that all parameters of a group have in common; `None` for an empty group.

    Raises:
        ValueError: they differ.
    """
    for name in group[1:]:
        if values[name] != values[group[0]]:
            raise ValueError(
                f"{name} and {group[0]} are in one param group, but {what} differed when they were saved: "
                f"{values[name]} and {values[group[0]]}; group them as they were grouped then"
            )
    return values[group[0]] if group else None


def _options_to_set(
    rest: Mapping[str, Any], names: list[list[str]], optimizer: Optimizer, folder: Path
) -> list[dict[str, Any] | None]:
    """The options of each param group.

    Raises:
        ValueError: the optimizer is of another class, its parameters are different or of another dtype, or parameters
            of a group had different options.
    """
    if rest["optimizer_class"] != class_of_state(optimizer):
        raise ValueError(
            f"{folder} has the state of {rest['optimizer_class']}, but the optimizer is {class_of_state(optimizer)}"
        )
    options = {name: group["options"] for group in rest["groups"] for name in group["parameters"]}
    _check_same_names(options, [*itertools.chain(*names)], f"the optimizer in {folder}")
    for name, parameter in _parameters(names, optimizer):
        if parameter.dtype != rest["dtypes"][name]:
            raise ValueError(
                f"{name} was trained as {rest['dtypes'][name]} but is {parameter.dtype} now; load the model in the "
                "dtype of the training"
            )
    return [_common(options, group, "their options") for group in names]


def _set(
    optimizer: Optimizer,
    names: list[list[str]],
    options: list[dict[str, Any] | None],
    tensors: Mapping[str, dict[str, Tensor]],
    scalars: Mapping[str, dict[str, Any]],
) -> None:
    """Set the options of an optimizer's param groups and the states of its parameters."""
    for group, of_group in zip(optimizer.param_groups, options, strict=True):
        for key, value in (of_group or {}).items():
            if isinstance(
                group.get(key), Tensor
            ):  # a learning rate for CUDA graphs is a tensor, which new groups share
                group[key] = torch.full_like(group[key], value)
            else:
                group[key] = value.item() if isinstance(value, Tensor) else value
    for name, parameter in _parameters(names, optimizer):
        optimizer.state.pop(parameter, None)
        if name in scalars or name in tensors:
            optimizer.state[parameter] = scalars.get(name, {}) | tensors.get(name, {})
    _move_steps(optimizer)


def _move_steps(optimizer: Optimizer) -> None:
    """Move step counts to the device if torch's optimizer needs them there, for CUDA graphs and fused kernels."""
    for group in optimizer.param_groups:
        if group.get("capturable") or group.get("fused"):
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                state.update({key: v.to(parameter.device) for key, v in state.items() if isinstance(v, Tensor)})


def scheduler_by_name(state: Mapping[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """A scheduler's state, with its values per param group stored by the names of the parameters."""

    def spread(values: list[Any]) -> dict[str, Any]:
        return {name: value for group, value in zip(names, values, strict=True) for name in group}

    return _map_per_group(state, spread)


def scheduler_by_group(state: Mapping[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """The reverse of `scheduler_by_name`, for other groups."""

    def collect(values: Mapping[str, Any]) -> list[Any]:
        # a group without parameters has no schedule, but it has a place in the list
        any_value = next(iter(values.values()))
        return [_common(values, group, "their values of the scheduler") if group else any_value for group in names]

    return _map_per_group(state, collect)


def _map_per_group(state: Mapping[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    result = {}
    for key, value in state.items():
        if key in _PER_GROUP and isinstance(value, (list, tuple, dict)):
            value = function(value)
        elif key == "_schedulers":  # ChainedScheduler and SequentialLR
            value = [_map_per_group(inner, function) for inner in value]
        result[key] = value
    return result


__all__ = ["load_training_state", "save_training_state"]
