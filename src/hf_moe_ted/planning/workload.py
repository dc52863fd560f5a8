"""The work of a rank in training: its batches, its dtype, and its activation checkpointing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Checkpointing = Literal["full", "communication-aware"]

BYTES_OF_DTYPE = {"bfloat16": 2, "float32": 4}
# bytes of optimizer states per parameter, by dtype: moments, and a float32 master if the weights are not float32
BYTES_OF_STATES = {
    "tiled_adamw": {"bfloat16": 12, "float32": 8},
    "adamw": {"bfloat16": 4, "float32": 8},  # torch's optimizer, whose moments have the dtype of the weights
    "sgd": {"bfloat16": 0, "float32": 0},
}


def check_counts(numbers: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a number is not whole or below 1; the message names it.
    """
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} ({value!r}) must be a whole number")
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")


@dataclass(frozen=True)
class Workload:
    """
    Attributes:
        batch_size: sentence pairs per forward of a data-parallel rank.
        source_length, target_length: tokens of each, with padding.
        accumulation: forwards per step.
        dtype: dtype of the weights, "bfloat16" or "float32".
        optimizer: a key of `BYTES_OF_STATES`.
        checkpointing: activation checkpointing: `None`, "full" or "communication-aware".

    Raises:
        ValueError: a number is not whole or below 1, or a name is unknown.
    """

    batch_size: int
    source_length: int
    target_length: int
    accumulation: int = 1
    dtype: str = "bfloat16"
    optimizer: str = "tiled_adamw"
    checkpointing: Checkpointing | None = None

    def __post_init__(self) -> None:
        counts = ("batch_size", "source_length", "target_length", "accumulation")
        check_counts({name: getattr(self, name) for name in counts})
        known: dict[str, list[str | None]] = {
            "dtype": [*BYTES_OF_DTYPE],
            "optimizer": [*BYTES_OF_STATES],
            "checkpointing": [None, "full", "communication-aware"],
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {choices}")

    def num_tokens(self, side: str) -> int:
        """Tokens of a forward, for the source ("encoder") or the target ("decoder")."""
        return self.batch_size * (self.source_length if side == "encoder" else self.target_length)

    @property
    def element_bytes(self) -> int:
        """Bytes per element of weights and activations."""
        return BYTES_OF_DTYPE[self.dtype]

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state per parameter."""
        return BYTES_OF_STATES[self.optimizer][self.dtype]


__all__ = ["BYTES_OF_DTYPE", "BYTES_OF_STATES", "Checkpointing", "Workload", "check_counts"]
