"""Options: how many bytes of experts the device holds, and which experts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..models.language_codes import LanguagePair
from ..routing.expert_statistics import ExpertStatistics
from ..tensors.byte_sizes import num_bytes_of

PLACES = ("auto", "memory", "files")
_SIZE = "size of expert_memory"  # the name of the option in Python and, with a hyphen, in commands


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
        num_bytes_of(self.size, _SIZE)
        if self.experts_in not in PLACES:
            raise ValueError(f"experts_in ({self.experts_in!r}) must be one of {', '.join(PLACES)}")
        if not isinstance(self.statistics, ExpertStatistics | str | os.PathLike | None):
            raise ValueError(
                f"statistics ({self.statistics!r}) must be what collect_expert_statistics returned, or its folder"
            )
        if self.languages is not None and not _is_list_of_languages(self.languages):
            raise ValueError(f"languages ({self.languages!r}) must be a list of codes such as ['en', 'de']")
        if isinstance(self.max_cpu_slots, bool) or not isinstance(self.max_cpu_slots, int):
            raise ValueError(f"max_cpu_slots ({self.max_cpu_slots!r}) must be an integer")
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
        return num_bytes_of(self.size, _SIZE)


def _is_list_of_languages(languages: object) -> bool:
    """Codes, or pairs of codes; a code alone is no list."""
    if not isinstance(languages, Sequence) or isinstance(languages, str | bytes):
        return False
    codes = [code for item in languages for code in (item if isinstance(item, tuple | list) else (item,))]
    return all(isinstance(code, str) for code in codes)


__all__ = ["MemoryOptions"]
