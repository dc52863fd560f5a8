"""Folders of `from_pretrained`: their tensors, read lazily, and new ones, written shard by shard."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .json_file import read_json_object
from .lazy_tensors import LazyTensors, TensorFile, check_rounded, checked_weights
from .safetensors_file import create_safetensors_file
from .torch_file import shorten


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
    file_of_tensor = _read_weight_map(index)
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


def _read_weight_map(index: Path) -> dict[str, str]:
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


def check_output_dir(output_dir: Path, *, overwrite: bool = False) -> None:
    """Raise if `output_dir` cannot become a new folder.

    Raises:
        ValueError: it is a file, or a folder with something in it and not `overwrite`.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir ({output_dir}) is a file; choose a folder")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise ValueError(f"output_dir ({output_dir}) is not empty; choose another one or overwrite it (--overwrite)")


@contextmanager
def new_folder(output_dir: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output_dir` that takes its place if the block ends without an error.

    Everything is flushed to disk before it is renamed, and on an error the temporary folder is removed, so there is
    never an `output_dir` with a part of the files. See [`take_place`] for what a killed process leaves of a folder that
    it was to replace.

    Raises:
        ValueError: as `check_output_dir`, or the folder above cannot be written to.
    """
    check_output_dir(output_dir, overwrite=overwrite)
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.incomplete-", dir=output_dir.parent))
    except OSError as error:
        raise ValueError(f"output_dir ({output_dir}) cannot be created: {error}") from error
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())  # mkdtemp lets only the owner in
            _flush(path)
        take_place(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_place(complete: Path, folder: Path) -> None:
    """Rename a folder to the name of another one beside it, which is removed if it is there.

    If a process is killed, `folder` is what it was or will be; only between the two renames that replace it is it aside
    as `.{name}.previous`.
    """
    previous = folder.with_name(f".{folder.name}.previous")
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    complete.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _flush(path: Path) -> None:
    """Make the system write a file, or the list of files of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
