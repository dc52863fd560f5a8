"""Folders of `from_pretrained`: their tensors, read lazily, and new ones, written shard by shard."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..files.json_file import read_json_object
from ..files.messages import shorten
from .lazy_tensors import LazyTensors, TensorFile, check_rounded, checked_weights
from .safetensors_file import create_safetensors_file


def open_pretrained_tensors(folder: Path) -> LazyTensors:
    """The tensors of a folder of `save_pretrained`: safetensors or else bin, in one file or in shards with an index.

    What is no weight, an integer or a number that is not finite, is refused as it is read: see [`checked_weights`].

    Raises:
        ValueError: there is no checkpoint, a shard is missing or unreadable, or the index disagrees with the shards.
    """
    for name, index_name in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / name).is_file():
            return _open_file(folder / name)
        if (folder / index_name).is_file():
            return _open_shards(folder / index_name)
    raise ValueError(
        f"{folder} has none of {SAFE_WEIGHTS_NAME}, {SAFE_WEIGHTS_INDEX_NAME}, {WEIGHTS_NAME}, {WEIGHTS_INDEX_NAME}"
    )


def _open_file(path: Path) -> LazyTensors:
    file = TensorFile(path)
    return checked_weights(LazyTensors(file.specs, file.read, file.read, where=lambda _: path))


def _open_shards(index: Path) -> LazyTensors:
    file_of_tensor = read_weight_map(index)
    files = {name: TensorFile(index.parent / name) for name in sorted(set(file_of_tensor.values()))}
    for name, file in file_of_tensor.items():
        if name not in files[file].specs:
            raise ValueError(f"{index} says that {name} is in {file}, but it is not there")
    current: list[TensorFile] = []

    def read(name: str, index: int | None = None) -> Tensor:
        file = files[file_of_tensor[name]]
        if current and current[0] is not file:
            current.pop().close()
        current[:] = [file]
        return file.read(name, index)

    specs = {name: files[file].specs[name] for name, file in file_of_tensor.items()}
    return checked_weights(LazyTensors(specs, read, read, where=lambda name: files[file_of_tensor[name]].path))


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file in the folder of the index. A file may be a link to elsewhere, as `hf download` makes them."""
    weight_map = read_json_object(index, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is not the index of a sharded checkpoint: it has no files by tensor (weight_map)")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise ValueError(f"{index} says that {name} is in {shorten(file)}, which is not the name of a file")
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise ValueError(f"{index} says that {name} is in {file}, which leaves the folder; nothing there is read")
    return weight_map


def write_pretrained_tensors(
    tensors: LazyTensors, folder: Path, *, max_shard_size: int | str = "5GB", dtype: torch.dtype | None = None
) -> list[Path]:
    """Write tensors as safetensors shards that `from_pretrained` reads, one at a time.

    Args:
        tensors: what to write. They may not share memory, and are written in this order.
        folder: an existing folder.
        max_shard_size: bytes, or a string such as `"5GB"`. A larger tensor gets a shard of its own.
        dtype: floating-point tensors become this one; by default they stay as they are.

    Returns:
        The files, flushed to disk; the index is the last one if there is more than one shard.

    Raises:
        ValueError: for a `max_shard_size` that is no size, or a number that `dtype` cannot hold.
        OSError: the disk is full, or what else the system says.
    """
    specs = {name: spec.to(dtype) if spec.is_floating_point() else spec for name, spec in tensors.specs.items()}
    plan = split_torch_state_dict_into_shards(specs, max_shard_size=max_shard_size)
    paths = []
    with tqdm(total=plan.metadata["total_size"], unit="B", unit_scale=True, desc="Writing safetensors") as progress:
        for file_name, names in plan.filename_to_tensors.items():
            paths.append(folder / file_name)
            shard = create_safetensors_file(paths[-1], {name: specs[name] for name in names})
            for name in names:
                if specs[name].dtype == tensors.specs[name].dtype:
                    tensors.into(name, shard[name])
                else:
                    tensor = tensors[name]
                    shard[name].copy_(tensor)
                    check_rounded(name, tensor, shard[name])
                progress.update(shard[name].nbytes)
            del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        paths.append(folder / SAFE_WEIGHTS_INDEX_NAME)
        paths[-1].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def check_tensors(specs: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Compare names, shapes and kinds of dtype with those of a model.

    Raises:
        ValueError: with all names that are missing, unknown, of another shape, or not floating-point where the model
            is.
    """
    problems = [f"missing: {name}" for name in expected if name not in specs]
    problems += [f"unknown: {name}" for name in specs if name not in expected]
    problems += [
        f"{name} has the shape {tuple(specs[name].shape)}, the config asks for {tuple(expected[name].shape)}"
        for name in expected
        if name in specs and specs[name].shape != expected[name].shape
    ]
    problems += [
        f"{name} is {specs[name].dtype}, and weights are floating-point numbers"
        for name in expected
        if name in specs and expected[name].is_floating_point() and not specs[name].is_floating_point()
    ]
    if problems:
        raise ValueError(f"{source} does not hold the model that its config describes\n  " + "\n  ".join(problems))
