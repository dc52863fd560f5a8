"""What every compression reports: sizes before and after, and what a user should know."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

REPORT_NAME = "compression_report.json"


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """What a compression was asked for and what came of it.

    Attributes:
        operation: name of the function.
        source: what was compressed.
        arguments: of the function, by name, those that decide about the result.
        num_parameters_before, num_parameters_after: numbers in all weights, shared ones once.
        num_bytes_before, num_bytes_after: of the weights.
        warnings: what a user should know.
    """

    operation: ClassVar[str]

    source: str
    arguments: dict[str, Any]
    num_parameters_before: int
    num_parameters_after: int
    num_bytes_before: int
    num_bytes_after: int
    warnings: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write it as `compression_report.json`."""
        fields = {"operation": self.operation, **dataclasses.asdict(self)}
        (folder / REPORT_NAME).write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def lines(self) -> list[str]:
        """The report for a reader, without the warnings."""
        return [
            f"{self.num_parameters_before:,} -> {self.num_parameters_after:,} parameters, "
            f"{self.num_bytes_before / 1e6:,.1f} -> {self.num_bytes_after / 1e6:,.1f} MB",
        ]

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *(f"warning: {warning}" for warning in self.warnings)])


def num_parameters(weights: Mapping[str, Tensor]) -> int:
    """Numbers in all tensors."""
    return sum(weight.numel() for weight in weights.values())


def num_bytes(weights: Mapping[str, Tensor]) -> int:
    """Size of all tensors."""
    return sum(weight.nbytes for weight in weights.values())


__all__ = ["REPORT_NAME", "CompressionReport", "num_bytes", "num_parameters"]
