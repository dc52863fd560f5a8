"""Folders for `from_pretrained`: read their tensors lazily, and write new ones shard by shard."""

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
from .byte_sizes import num_bytes_of
from .lazy_tensors import LazyTensors, TensorFile, checked_weights, copy_rounded
from .safetensors_file import create_safetensors_file


def open_pretrained_tensors(folder: Path, *, may_be_quantized: bool = False) -> LazyTensors:
    """The tensors of a `save_pretrained` folder: safetensors or else bin, in one file or in shards with an index.

    Integers and numbers that are not finite are no weights; reading them raises, see [`checked_weights`].

    Args:
        folder: folder of a model.
        may_be_quantized: whether to return tensors unchecked, also integers.

    Raises:
        ValueError: there is no checkpoint, a shard is missing or unreadable, or the index disagrees with the shards.
    """
    for name, index_name in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / name).is_file():
            file = TensorFile(folder / name)
            return _one_file_at_a_time({tensor: file for tensor in file.specs}, may_be_quantized)
        if (folder / index_name).is_file():
            return _one_file_at_a_time(_files_of_index(folder / index_name), may_be_quantized)
    raise ValueError(
        f"{folder} has none of {SAFE_WEIGHTS_NAME}, {SAFE_WEIGHTS_INDEX_NAME}, {WEIGHTS_NAME}, {WEIGHTS_INDEX_NAME}"
    )


def _one_file_at_a_time(files: Mapping[str, TensorFile], may_be_quantized: bool) -> LazyTensors:
    """The tensors of files; only the last file that was read is mapped."""
    current: list[TensorFile] = []

    def file_of(name: str) -> TensorFile:
        if current and current[0] is not files[name]:
            current[0].close()
        current[:] = [files[name]]
        return files[name]

    tensors = LazyTensors(
        {name: file.specs[name] for name, file in files.items()},
        read_row=lambda name, index: file_of(name).read(name, index),
        read_into=lambda name, out: file_of(name).read_into(name, out),
        where=lambda name: files[name].path,
    )
    return tensors if may_be_quantized else checked_weights(tensors)


def _files_of_index(index: Path) -> dict[str, TensorFile]:
    file_of_tensor = read_weight_map(index)
    files = {name: TensorFile(index.parent / name) for name in sorted(set(file_of_tensor.values()))}
    for name, file in file_of_tensor.items():
        if name not in files[file].specs:
            raise ValueError(f"{index} says that {name} is in {file}, but {file} does not have it")
    return {name: files[file] for name, file in file_of_tensor.items()}


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file in the folder of the index. A file may be a link, as `hf download` makes them."""
    weight_map = read_json_object(index, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is not the index of a sharded checkpoint: it has no files by tensor (weight_map)")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise ValueError(f"{index} says that {name} is in {shorten(file)}, which is not the name of a file")
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise ValueError(
                f"{index} says that {name} is in {file}, which is outside of the folder; files there are not read"
            )
    return weight_map


def write_pretrained_tensors(
    tensors: LazyTensors, folder: Path, *, max_shard_size: int | str = "5GB", dtype: torch.dtype | None = None
) -> list[Path]:
    """Write tensors as safetensors shards that `from_pretrained` reads, one at a time.

    Args:
        tensors: tensors to write, in this order. They may not share memory.
        folder: an existing folder.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`. A larger tensor gets its
            own shard.
        dtype: new dtype of floating-point tensors; by default it does not change.

    Returns:
        The files, flushed to disk; the index is the last one if there is more than one shard.

    Raises:
        ValueError: `max_shard_size` is no size, or `dtype` cannot hold a number.
        OSError: the disk is full, or another error of the system.
    """
    specs = {name: spec.to(dtype) if spec.is_floating_point() else spec for name, spec in tensors.specs.items()}
    plan = split_torch_state_dict_into_shards(specs, max_shard_size=num_bytes_of(max_shard_size, "max_shard_size"))
    with tqdm(total=plan.metadata["total_size"], unit="B", unit_scale=True, desc="Writing safetensors") as progress:
        for file_name, names in plan.filename_to_tensors.items():
            _write_shard(folder / file_name, {name: specs[name] for name in names}, tensors, progress)
    paths = [folder / file_name for file_name in plan.filename_to_tensors]
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        paths.append(folder / SAFE_WEIGHTS_INDEX_NAME)
        paths[-1].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def _write_shard(path: Path, specs: Mapping[str, Tensor], tensors: LazyTensors, progress: tqdm) -> None:
    shard = create_safetensors_file(path, specs)
    for name in specs:
        out = shard[name]
        if out.dtype == tensors.specs[name].dtype:
            tensors.into(name, out)
        else:
            copy_rounded(name, tensors[name], out)
        progress.update(out.nbytes)


def check_tensors(specs: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Compare names, shapes and kinds of dtype with those of a model.

    Raises:
        ValueError: tensors are missing, unknown, of another shape, or not floating-point although the model's are; the
            message names all of them.
    """
    problems = [f"missing: {name}" for name in expected if name not in specs]
    problems += [f"unknown: {name}" for name in specs if name not in expected]
    problems += [
        f"{name} has the shape {tuple(specs[name].shape)}, but the config needs {tuple(expected[name].shape)}"
        for name in expected
        if name in specs and specs[name].shape != expected[name].shape
    ]
    problems += [
        f"{name} is {specs[name].dtype}, but weights must be floating-point numbers"
        for name in expected
        if name in specs and expected[name].is_floating_point() and not specs[name].is_floating_point()
    ]
    if problems:
        raise ValueError(f"{source} does not hold the model of its config\n  " + "\n  ".join(problems))
