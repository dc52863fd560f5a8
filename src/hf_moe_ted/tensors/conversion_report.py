"""The report of a conversion."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..files.messages import printable


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion read and wrote.

    Attributes:
        source: the folder that was read.
        output_dir: the folder that was written; `from_pretrained` loads it.
        num_parameters: number of parameters; shared tensors count once.
        num_tensors: number of written tensors.
        num_bytes: size of the weights on disk.
        dtypes: dtypes of the written tensors, sorted by name.
        num_experts: number of experts of each sparse layer, encoder first.
        weight_files: names of the weight files in `output_dir`.
        other_files: other files that were copied or made: config, generation config, tokenizer.
        seconds: time from the start to the rename of the folder.
        warnings: what a user should know and check.
    """

    source: Path
    output_dir: Path
    num_parameters: int
    num_tensors: int
    num_bytes: int
    dtypes: tuple[torch.dtype, ...]
    num_experts: tuple[int, ...]
    weight_files: tuple[str, ...]
    other_files: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        lines = [
            f"{self.source} -> {self.output_dir}",
            f"{self.num_parameters:,} parameters in {self.num_tensors:,} tensors of {dtypes}",
            f"{self.num_bytes / 1e6:,.1f} MB in {len(self.weight_files)} file(s), {self.seconds:.1f} s",
            f"experts of the sparse layers: {', '.join(map(str, self.num_experts)) or 'none'}",
            f"also written: {', '.join(self.other_files)}",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(map(printable, lines))


__all__ = ["ConversionReport"]
