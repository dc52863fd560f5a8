"""Load a model from a folder that has all weights: nothing is initialized at random or downloaded from the Hub."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, M2M100ForConditionalGeneration, PreTrainedTokenizerBase

from ..files.json_file import read_json_object
from ..files.messages import check_is_file, shorten
from ..models.family import M2M_100, NLLB_MOE, ZCODE_M3, not_of_family
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from .config_file import config_path
from .lazy_tensors import check_floating
from .safetensors_io import open_pretrained_tensors

ADAPTER_CONFIG = "adapter_config.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_whole_model(
    folder: Path,
    dtype: str = "auto",
    argument: str = "model",
    *,
    may_have_adapter: bool = False,
    model_class: Any = ZCodeM3ForConditionalGeneration,
    device_map: str | None = None,
    expert_memory: Any = None,
) -> Any:
    """The model of a folder of ZCodeM3 or NLLB-MoE.

    Args:
        folder: folder with config and weights.
        dtype: one of `DTYPES`.
        argument: name of the folder in messages.
        may_have_adapter: whether to load a PEFT adapter in the folder.
        model_class: class whose `from_pretrained` loads it.
        device_map, expert_memory: arguments of `from_pretrained`.

    Raises:
        ValueError: the folder does not exist, `dtype` is unknown, there is an adapter, or weights are missing, unknown,
            of another shape or unreadable.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype ({dtype!r}) must be one of {', '.join(DTYPES)}")
    config_path(folder, argument)
    check_no_adapter(folder, may_have_adapter=may_have_adapter)
    if not (folder / ADAPTER_CONFIG).is_file():  # else the weights may be elsewhere
        check_files(folder, argument)
    options = {} if expert_memory is None else {"expert_memory": expert_memory}
    try:
        loaded: Any = model_class.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, device_map=device_map, **options
        )
    except Exception as error:  # errors of safetensors, pickle and transformers have no common class
        message = shorten(error, 600) or type(error).__name__
        raise ValueError(f"{argument} ({folder}) cannot be loaded: {message}") from error
    model, info = loaded
    if problems := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise ValueError(f"{argument} ({folder}) does not hold the weights of its config: {problems}")
    return model


def check_files(folder: Path, argument: str = "model") -> None:
    """Check what `from_pretrained` opens unchecked: the files of the index, and whether they hold weights.

    Raises:
        ValueError: the folder has a pipe, socket or device, whose reading may never end; weights are missing,
            unreadable, malicious (see `open_pretrained_tensors`), or integers although the model is not quantized.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir():
            check_is_file(path)
    try:
        tensors = open_pretrained_tensors(folder)
        if "quantization_config" not in read_json_object(config_path(folder, argument), argument):
            check_floating(tensors.specs, folder)
    except ValueError as error:
        raise ValueError(f"{argument} ({folder}) cannot be loaded: {error}") from error


def check_no_adapter(folder: Path, *, may_have_adapter: bool = False) -> None:
    """
    Raises:
        ValueError: the folder has an adapter of PEFT.
    """
    if (folder / ADAPTER_CONFIG).is_file() and not may_have_adapter:
        raise ValueError(
            f"{folder} has {ADAPTER_CONFIG}: an adapter of PEFT, which would be ignored; merge it into the weights "
            "with merge_and_unload() first, or remove its files"
        )


def load_model_and_tokenizer(
    folder: str | os.PathLike[str],
    dtype: str = "auto",
    device: str | None = None,
    argument: str = "model",
    *,
    expert_memory: Any = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A translation model and its tokenizer from a local folder, on a device.

    `from_pretrained` searches a name that is no folder on the Hub, and initializes missing weights at random; here both
    are errors.

    Args:
        folder: folder with config, weights and tokenizer of ZCodeM3 or NLLB-MoE, or of a dense M2M100 or NLLB, which is
            loaded with transformers' own class.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`, the dtype of the config.
        device: such as `"cuda:1"`; by default a GPU if there is one. `"auto"` spreads a model over all GPUs, main
            memory and, if it is of ZCodeM3, the disk (`device_map="auto"`).
        argument: name of the folder in messages.
        expert_memory: [`ExpertMemory`], *optional*: the device holds some experts, and others are loaded when needed.
            For a model with experts, on one device.

    Raises:
        ValueError: the folder or device does not exist, a file is missing or damaged, or the model is of another
            family.
    """
    folder = Path(folder)
    model_type = str(read_json_object(config_path(folder, argument), argument).get("model_type"))
    if model_type not in (ZCODE_M3, NLLB_MOE, M2M_100):
        raise ValueError(not_of_family(f"{argument} ({folder})", model_type))
    if expert_memory is not None and model_type == M2M_100:
        raise ValueError(f"{argument} ({folder}) is dense: it has no experts for expert_memory to hold")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: nn.Module = load_whole_model(
        folder,
        dtype,
        argument,
        may_have_adapter=True,
        model_class=M2M100ForConditionalGeneration if model_type == M2M_100 else ZCodeM3ForConditionalGeneration,
        device_map=device if device == "auto" or expert_memory is not None else None,
        expert_memory=expert_memory,
    )
    tokenizer = load_tokenizer(folder, argument)
    if device == "auto" or expert_memory is not None:
        return model, tokenizer
    if device.startswith("meta"):
        raise ValueError(f"device ({device!r}) cannot be used: its tensors have no numbers")
    try:
        return model.to(torch.device(device)), tokenizer
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        raise ValueError(f"device ({device!r}) cannot be used: {message}") from error


def load_tokenizer(folder: Path, argument: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder.

    Args:
        folder: folder of a model.
        argument: name of the folder in messages.

    Raises:
        ValueError: there is no tokenizer, or one of its files is damaged.
    """
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise ValueError(f"{argument} ({folder}) has no tokenizer; save it there with tokenizer.save_pretrained")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"the tokenizer of {argument} ({folder}) cannot be loaded: {shorten(error, 600)}") from error


__all__ = ["check_no_adapter", "load_model_and_tokenizer", "load_tokenizer", "load_whole_model"]
