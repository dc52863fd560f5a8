"""The end of every conversion: tensors under our names become a folder for `from_pretrained`."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..files.json_file import read_json_object
from ..files.messages import shorten
from ..files.output import check_output_dir, new_folder
from ..files.output_kinds import MODEL, OutputKind
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from .byte_sizes import num_bytes_of
from .config_file import config_errors
from .conversion_report import ConversionReport
from .lazy_tensors import LazyTensors
from .safetensors_io import check_tensors, write_pretrained_tensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "vocab.json",
)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype from its name.

    Raises:
        ValueError: there is no such dtype.
    """
    parsed = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(parsed, torch.dtype) and parsed.is_floating_point):
        raise ValueError(f"dtype ({dtype}) must be a floating-point one, such as float32, bfloat16 or float16")
    return parsed


def stored_dtype(config: Any, specs: Mapping[str, Tensor]) -> torch.dtype:
    """The default dtype for loading a folder: that of its config, or else of its weights.

    Args:
        config: of the model.
        specs: its tensors; only their dtypes matter.

    Raises:
        ValueError: the config has no dtype, and the weights have several.
    """
    if (named := parse_dtype(config.dtype)) is not None:
        return named
    dtypes = {spec.dtype for spec in specs.values() if spec.is_floating_point()}
    if len(dtypes) > 1:  # from_pretrained would take the first one in the files
        several = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"the config has no dtype, and the weights have several ({several}); choose one with dtype")
    return dtypes.pop() if dtypes else torch.float32


def meta_model(config: Any, model_class: Any = ZCodeM3ForConditionalGeneration) -> Any:
    """The model of a config, on the meta device.

    Args:
        config: config for the class.
        model_class: class of the model.

    Raises:
        ValueError: the config describes no model, such as one with impossible sizes.
    """
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # too many elements, or an invalid field that only transformers reads
        raise ValueError(f"the config describes no model: {shorten(error, 600)}") from error


def drop_tied_copies(tensors: LazyTensors, tied: Mapping[str, str]) -> LazyTensors:
    """The tensors without copies of others.

    Args:
        tensors: tensors, possibly with copies; a copy whose original is missing becomes the original.
        tied: name of each copy -> name of its original, as in `model.all_tied_weights_keys`.

    Raises:
        ValueError: copy and original differ.
    """
    name_in_source = {name: name for name in tensors if name not in tied}
    for copy, original in tied.items():
        if copy not in tensors:
            continue
        first = name_in_source.setdefault(original, copy)
        if first != copy and not _are_equal(tensors, first, copy):
            raise ValueError(
                f"{copy} and {first} differ, but the config ties them (tie_word_embeddings); correct the config"
            )
    return tensors.under_names(name_in_source)


def _are_equal(tensors: LazyTensors, first: str, second: str) -> bool:
    """Whether two tensors are equal; they are read in parts, because embeddings may be the largest tensors."""
    if tensors.specs[first].shape != tensors.specs[second].shape:
        return False
    pairs = zip(tensors.parts(first), tensors.parts(second), strict=True)
    return all(torch.equal(mine, other) for (_, mine), (_, other) in pairs)


def stored_specs(model: Any) -> dict[str, Tensor]:
    """The tensors in a model's folder: all tensors except copies of others."""
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def model_folder_writer(
    output_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None,
    max_shard_size: int | str,
    overwrite: bool,
    sources: Sequence[Any] = (),
    also_read: Sequence[Any] = (),
    kind: OutputKind = MODEL,
) -> Callable[..., ConversionReport]:
    """Begin a conversion: check sizes, `dtype` and `output_dir` (see `check_output_dir`) before any work is done.

    Returns:
        `write_model_folder` with these arguments.
    """
    start, path, parsed = time.perf_counter(), Path(output_dir), parse_dtype(dtype)
    max_shard_size = num_bytes_of(max_shard_size, "max_shard_size")
    check_output_dir(path, overwrite=overwrite, kind=kind, sources=sources, also_read=also_read)
    return partial(
        write_model_folder,
        output_dir=path,
        start=start,
        dtype=parsed,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        kind=kind,
    )


def write_model_folder(
    tensors: LazyTensors,
    config: Any,
    output_dir: Path,
    *,
    model_class: Any = ZCodeM3ForConditionalGeneration,
    source: Path,
    start: float,
    dtype: torch.dtype | None = None,
    loaded_dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    kind: OutputKind = MODEL,
    save_others: Sequence[Callable[[Path], Any]] = (),
    warnings: Sequence[str] = (),
) -> ConversionReport:
    """Check tensors against the config, then write them, the config and the other files of a model.

    Args:
        tensors: tensors under the names of the model, possibly with copies of tied weights.
        config: config of the model; its `dtype` and `architectures` are set here.
        output_dir: the new folder; it appears once it is complete.
        model_class: class of the model.
        source: the source of the conversion, for messages and the report.
        start: `time.perf_counter()` at the start.
        dtype: dtype of floating-point tensors; by default it does not change.
        loaded_dtype: dtype for the config if `dtype` is `None`; by default that of the tensors.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is an earlier output of its kind.
        kind: kind of the output.
        save_others: function that gets the folder, and saves a tokenizer or a generation config there.
        warnings: warnings for the report.

    Raises:
        ValueError: the tensors do not fit the config, or `output_dir` is not empty.
    """
    model = meta_model(config, model_class)
    tensors = drop_tied_copies(tensors, model.all_tied_weights_keys)
    expected = stored_specs(model)
    check_tensors(tensors.specs, expected, str(source))
    tensors = tensors.under_names({name: name for name in expected})
    config.dtype = dtype or loaded_dtype or tensors.specs["model.shared.weight"].dtype
    config.architectures = [type(model).__name__]
    with new_folder(output_dir, overwrite=overwrite, kind=kind) as folder:
        weight_files = write_pretrained_tensors(tensors, folder, max_shard_size=max_shard_size, dtype=dtype)
        config.save_pretrained(folder)
        for save in save_others:
            save(folder)
        num_bytes = sum(path.stat().st_size for path in weight_files)
        names = {path.name for path in weight_files}
        other_files = sorted(path.name for path in folder.iterdir() if path.name not in names)
    dtypes = {dtype or spec.dtype for spec in tensors.specs.values()}
    return ConversionReport(
        source=source,
        output_dir=output_dir,
        num_parameters=model.num_parameters(),
        num_tensors=len(tensors),
        num_bytes=num_bytes,
        dtypes=tuple(sorted(dtypes, key=str)),
        num_experts=tuple(spec.shape[0] for name, spec in expected.items() if name.endswith("experts.up_proj")),
        weight_files=tuple(path.name for path in weight_files),
        other_files=tuple(other_files),
        seconds=time.perf_counter() - start,
        warnings=tuple(warnings),
    )


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config of a folder; `None` if it has none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    fields = read_json_object(path, "generation config")
    with config_errors(path):
        return GenerationConfig.from_dict(fields)


def copy_tokenizer_and_generation_config(source: Path) -> Callable[[Path], None]:
    """A function for `save_others` that copies the tokenizer and generation config of `source`, if they exist.

    Raises:
        ValueError: the generation config is damaged.
    """
    generation_config = read_generation_config(source)

    def save(folder: Path) -> None:
        if generation_config is not None:
            generation_config.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)

    return save
