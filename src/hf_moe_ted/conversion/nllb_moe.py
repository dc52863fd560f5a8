"""NLLB-MoE checkpoints (https://huggingface.co/papers/2207.04672) -> ZCodeM3 checkpoints."""

import os
from pathlib import Path

import torch

from ..files.writing import keeping_places
from ..tensors.conversion_report import ConversionReport
from ..tensors.model_folder import copy_tokenizer_and_generation_config, model_folder_writer
from ..tensors.nllb_moe_folder import nllb_moe_tensors, read_nllb_moe_config
from ..tensors.safetensors_io import open_pretrained_tensors


@keeping_places()
def convert_nllb_moe_checkpoint(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> ConversionReport:
    """Convert a Hugging Face NLLB-MoE folder to one that `ZCodeM3ForConditionalGeneration.from_pretrained` loads.

    Experts may be stored one by one (`experts.expert_0.fc1.weight`) or stacked (`experts.up_proj`). At most one output
    shard and the largest tensor are in memory. Tokenizer files and the generation config are copied unchanged.

    Args:
        source: a folder with `config.json` and safetensors or bin weights, sharded or not.
        output_dir: the new folder; it appears once it is complete.
        dtype: dtype of the floating-point weights, such as `torch.bfloat16` or `"bfloat16"`; by default as in the
            source.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        What was converted.

    Raises:
        ValueError: before anything is written: `source` is no NLLB-MoE checkpoint, or a weight is missing, unknown or
            of a wrong shape (the message names all of them); `output_dir` is not empty; `dtype` is unknown.
    """
    source = Path(source)
    write = model_folder_writer(
        output_dir, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, sources=[source]
    )
    config = read_nllb_moe_config(source, "source")
    tensors = nllb_moe_tensors(open_pretrained_tensors(source))
    return write(tensors, config, source=source, save_others=[copy_tokenizer_and_generation_config(source)])


__all__ = ["convert_nllb_moe_checkpoint"]
