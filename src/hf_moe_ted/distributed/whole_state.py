"""The state of an ordinary Trainer's checkpoint (optimizer, scheduler, random numbers): check it, and shard it."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import safe_globals

from .checkpoint import named_tensors, together
from .sharding import regions
from .state_metadata import check_archive
from .training_state import class_of_state, group_names, scheduler_by_group, scheduler_by_name

_DESCRIPTION = "whole_state.json"
_MARK = "has_description"  # load_state_dict does not change these


def save_description(folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, files: list[str]) -> None:
    """Write what a Trainer's own files lack: the list of files, and the names of the optimizer's parameters.

    Args:
        folder: training-state folder of the checkpoint, without a sharded state.
        model, optimizer: an unsharded model and its optimizer.
        files: names of files in the checkpoint that training needs to continue.
    """
    tensors = named_tensors(model)
    own = {id(tensor) for tensor in tensors.values()}
    is_of_model = all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
    description = {
        "files": files,
        "optimizer_class": class_of_state(optimizer),
        # with other parameters, such as those of a loss, a sharded model cannot continue, but an unsharded one can
        "parameters": group_names(tensors, optimizer) if is_of_model else None,
    }
    os.makedirs(folder, exist_ok=True)
    (Path(folder) / _DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def is_described(folder: str | os.PathLike[str]) -> bool:
    """Whether a training state is of a model that was not sharded."""
    return (Path(folder) / _DESCRIPTION).is_file()


def mark_described(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Post-hook of an optimizer's `state_dict`: it marks that the checkpoint needs its description to be complete."""
    return {**state, _MARK: True}


def check_whole_state(
    checkpoint: str | os.PathLike[str], state_folder: str | os.PathLike[str], *, has_scaler: bool = False
) -> dict[str, Any] | None:
    """Refuse an incomplete checkpoint: a Trainer would continue with a new optimizer, schedule or random numbers.

    Args:
        checkpoint: folder of a Trainer.
        state_folder: folder in it where [`save_description`] wrote, if it did.
        has_scaler: whether gradients are scaled, as in float16.

    Returns:
        The description; `None` for a checkpoint of a Trainer that writes none.

    Raises:
        ValueError: optimizer, scheduler, scaler, random states or the description are missing, or cannot be read.
    """
    folder, description = Path(checkpoint), None
    wanted = [OPTIMIZER_NAME, SCHEDULER_NAME] + ([SCALER_NAME] if has_scaler else [])
    if is_described(state_folder):
        description = _read_description(Path(state_folder) / _DESCRIPTION)
        wanted += [name for name in description["files"] if name not in wanted]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if not any(folder.glob("rng_state*.pth")) and "rng_state.pth" not in missing:
        missing.append("rng_state.pth")
    if description is None and OPTIMIZER_NAME not in missing and _MARK in _read(folder / OPTIMIZER_NAME):
        missing.append(f"{Path(state_folder).name}/{_DESCRIPTION}")
    if OPTIMIZER_NAME in missing and not Path(state_folder).is_dir():
        missing.append(Path(state_folder).name)
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}, so training cannot continue from it unchanged: resume from a "
            "complete checkpoint, or start a new run from its weights, with from_pretrained and without "
            "resume_from_checkpoint"
        )
    for path in [*(folder / name for name in wanted), *folder.glob("rng_state*.pth")]:
        with path.open("rb") as file:
            check_archive(file, path)
    return description


def saved_generators(checkpoint: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The generators of the processes that wrote a Trainer's checkpoint, in the form of `saved_random_state`.

    Raises:
        ValueError: a file cannot be read.
    """
    folder = Path(checkpoint)
    alone = folder / "rng_state.pth"
    paths = [alone] if alone.is_file() else _in_order([*folder.glob("rng_state_*.pth")])
    found = []
    for process, path in enumerate(paths):
        try:
            with safe_globals():
                states = torch.load(path, map_location="cpu", weights_only=True)
            algorithm, keys, *rest = states["numpy"]
            on_device = states.get("cuda")
            if isinstance(on_device, list):  # states of all devices that the process saw; it used its own
                on_device = on_device[process % len(on_device)]
            keys = torch.from_numpy(np.asarray(keys).astype(np.int64))
            numpy_state = (algorithm, keys, *rest)
            found.append({"python": states["python"], "numpy": numpy_state, "cpu": states["cpu"], "cuda": on_device})
        except Exception as error:  # errors of pickle, of zip, or of the contents
            raise ValueError(f"the random state in {path} cannot be read: {error!r}") from error
    return found


def load_whole_state(
    checkpoint: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    whole_groups: list[list[str]],
    optimizer_class: str | None = None,
) -> None:
    """Load into a sharded model's optimizer and scheduler what a Trainer wrote for the same model unsharded.

    Args:
        checkpoint: folder with `optimizer.pt` and `scheduler.pt`, readable by all ranks.
        model: the sharded model; it does not change.
        whole_groups: names of the parameters in the param groups of the unsharded model's optimizer.
        optimizer_class: name of its class, if known.

    Raises:
        ValueError: on all ranks: a file cannot be read, or is of another model or optimizer.
    """
    folder = Path(checkpoint)
    with together():
        saved, schedule = _read(folder / OPTIMIZER_NAME), _read(folder / SCHEDULER_NAME)
        present_class = class_of_state(optimizer)
        if optimizer_class not in (None, present_class):
            raise ValueError(f"{folder} has the state of {optimizer_class}, but the optimizer is {present_class}")
        sizes, present_sizes = [len(group["params"]) for group in saved["param_groups"]], [*map(len, whole_groups)]
        if sizes != present_sizes:
            raise ValueError(
                f"{folder / OPTIMIZER_NAME} has {sizes} parameters in its groups, but this model's groups have "
                f"{present_sizes}: resume it unsharded, on one process"
            )
        names = group_names(named_tensors(model), optimizer)
        unknown = sorted({*itertools.chain(*names)} ^ {*itertools.chain(*whole_groups)})
        if unknown:
            raise ValueError(f"the optimizer in {folder} has other parameters than this one: {', '.join(unknown)}")
        optimizer.load_state_dict(_own_state_dict(saved, whole_groups, optimizer, names))
        scheduler.load_state_dict(scheduler_by_group(scheduler_by_name(schedule, whole_groups), names))


def _own_state_dict(
    saved: dict[str, Any], whole_groups: list[list[str]], optimizer: Optimizer, names: list[list[str]]
) -> dict[str, Any]:
    """The `state_dict` of a sharded model's optimizer, with options and states from the unsharded model's."""
    group_of: dict[str, dict[str, Any]] = {}
    state_of: dict[str, dict[str, Any]] = {}
    for group, whole_names in zip(saved["param_groups"], whole_groups, strict=True):
        group_of |= dict.fromkeys(whole_names, group)
        state_of |= {n: saved["state"].get(key, {}) for n, key in zip(whole_names, group["params"], strict=True)}
    present = optimizer.state_dict()
    state: dict[Any, dict[str, Any]] = {}
    for group, own_names, live in zip(present["param_groups"], names, optimizer.param_groups, strict=True):
        options = group_of[own_names[0]] if own_names else {}
        group.update({key: value for key, value in options.items() if key in group and key != "params"})
        for key, name, parameter in zip(group["params"], own_names, live["params"], strict=True):
            whole = state_of[name].items()
            state[key] = {entry: _own_part(value, parameter, f"{entry} of {name}") for entry, value in whole}
    return {**present, "state": {key: entries for key, entries in state.items() if entries}}


def groups_of_trainer(model: nn.Module, decay: list[str]) -> list[list[str]]:
    """Names of the parameters in the two groups that a Trainer makes, for checkpoints without these names.

    Args:
        decay: names, as in `model.named_parameters()`, of those with weight decay, which are the first group.
    """
    canonical = {
        id(tensor): name for name, tensor in named_tensors(model).items()
    }  # take shards, even if parameters are gathered
    trained = [(name in decay, canonical[id(p)]) for name, p in model.named_parameters() if p.requires_grad]
    return [[name for decays, name in trained if decays == wanted] for wanted in (True, False)]


def _own_part(value: Any, parameter: Tensor, what: str) -> Any:
    """The part of a whole parameter's state that belongs to the local shard; step counts do not change."""
    if not isinstance(value, Tensor) or value.ndim == 0 or not isinstance(parameter, DTensor):
        return value
    if value.shape != parameter.shape:
        raise ValueError(
            f"{what} has the shape {tuple(value.shape)}, but the parameter has {tuple(parameter.shape)}, so it cannot "
            "be divided between ranks; resume it unsharded, on one process"
        )
    own = torch.empty_like(parameter.detach(), dtype=value.dtype)
    for region in regions(own):
        region.local.copy_(value[region.slices])
    return own


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        check_archive(file, path)
    try:
        read: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # errors of pickle, of zip, or of the disk
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    return read


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = [*description["files"], *itertools.chain(*(description["parameters"] or ()))]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has no lists of names as files and parameters")
    return description


def _in_order(paths: list[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (len(path.name), path.name))


__all__ = [
    "check_whole_state",
    "groups_of_trainer",
    "is_described",
    "load_whole_state",
    "mark_described",
    "save_description",
    "saved_generators",
]
