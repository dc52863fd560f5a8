"""Options: how many bytes of experts the device holds, and which experts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate.utils import convert_file_size_to_int

from ..models.language_codes import LanguagePair
from ..routing.expert_statistics import ExpertStatistics

PLACES = ("auto", "memory", "files")


@dataclass(frozen=True)
class MemoryOptions:
    """
    Args:
        size: size of the experts on the device, in bytes or as a string such as `"8GB"` or `"7.5GiB"`. On a CPU it is
            the main memory for experts, with the packed copies of int8 kernels.
        statistics: what `collect_expert_statistics` returned for this model, or its folder: the most used experts are
            on the device from the start. Without statistics the device keeps the experts that were used last, and the
            decoder gets more room than the encoder.
        languages: languages whose statistics count, such as `["en", "de"]`: by source in the encoder and by target in
            the decoder; or pairs, `[("en", "de")]`. By default all that the statistics have.
        experts_in: `"memory"`: all experts are in main memory, pinned if the device is a GPU. `"files"`: they stay in
            the safetensors files, and are read when needed. `"auto"`: memory for a GPU, files for a CPU.
        max_cpu_slots: calls with at most so many (token, expert) slots compute experts that are not on the GPU on the
            CPU, instead of copying them. Results are then not bitwise equal to the GPU's.

    Raises:
        ValueError: an option has another value.
    """

    size: int | str
    statistics: ExpertStatistics | str | os.PathLike[str] | None = None
    languages: Sequence[str] | Sequence[LanguagePair] | None = None
    experts_in: str = "auto"
    max_cpu_slots: int = 0

    def __post_init__(self) -> None:
        if self.num_bytes < 1:
            raise ValueError(f"size ({self.size!r}) must be positive")
        if self.experts_in not in PLACES:
            raise ValueError(f"experts_in ({self.experts_in!r}) must be one of {', '.join(PLACES)}")
        if self.languages is not None and self.statistics is None:
            raise ValueError(
                f"languages ({self.languages!r}) need statistics, which tell the experts that they use; make "
                "statistics with hf-moe-ted expert-statistics, or leave languages out"
            )
        if self.max_cpu_slots > 0 and self.experts_in == "files":
            raise ValueError(f"max_cpu_slots ({self.max_cpu_slots}) needs experts_in='memory', got 'files'")
        if self.max_cpu_slots < 0:
            raise ValueError(f"max_cpu_slots ({self.max_cpu_slots}) must be at least 0")

    @property
    def num_bytes(self) -> int:
        """`size` as a number."""
        if isinstance(self.size, int) and not isinstance(self.size, bool):
            return self.size
        text = str(self.size).strip()
        try:
            if text.endswith("b"):
                raise ValueError("'8gb' would be bits")
            return int(text) if text.isdecimal() else convert_file_size_to_int(text)
        except (ValueError, OverflowError):
            raise ValueError(
                f"size ({self.size!r}) must be a number of bytes or a string such as '8GB', with a capital B"
            ) from None


__all__ = ["MemoryOptions"]
