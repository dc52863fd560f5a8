"""Read the config of a model for planning from an untrusted file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.family import NLLB_MOE, ZCODE_M3
from ..models.nllb_moe import config_fields
from ..tensors.config_file import config_errors, read_config_fields, zcode_m3_config

QUANTIZATION = "zcode_experts"


@dataclass(frozen=True)
class StoredBits:
    """How a quantized folder stores weights; see `quantize_experts`.

    Attributes:
        bits: bits per expert weight, 8 or 4.
        group_size: number of weights that share a scale; `None` is a row.
        what: "experts", or "all": also all other large matrices, in 8 bits.

    Raises:
        ValueError: an unknown value of `bits` or `what`, or a group size below 1.
    """

    bits: int
    group_size: int | None = None
    what: str = "experts"

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"bits ({self.bits!r}) must be 8 or 4")
        if self.what not in ("experts", "all"):
            raise ValueError(f"what ({self.what!r}) must be 'experts' or 'all'")
        size = self.group_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"group_size ({size!r}) must be a number of weights, or None for one scale per row")


def read_planned_config(path: str | os.PathLike[str], argument: str = "MODEL") -> ZCodeM3Config:
    """The config of a `config.json`, or of a folder with one, of ZCodeM3 or NLLB-MoE; weights are not read.

    Args:
        path: the file or folder.
        argument: name of the argument, for messages.

    Raises:
        ValueError: there is no config, it is of another model, or one of its fields is wrong.
    """
    otherwise = (
        f", and must have {ZCODE_M3!r} or {NLLB_MOE!r}: plans are for mixtures of experts; `hf-moe-ted convert` "
        "converts other models to ZCodeM3"
    )
    if not Path(path).exists():
        raise ValueError(f"{argument} ({path}) does not exist; give a config.json, or a folder with one")
    forms = "a config.json, or a folder with one; `hf download` makes one of a Hub id"
    origin, fields = read_config_fields(path, argument, (ZCODE_M3, NLLB_MOE), otherwise, forms=forms)
    if fields["model_type"] == NLLB_MOE:
        quantization = {name: fields[name] for name in ("quantization_config",) if name in fields}
        with config_errors(origin):
            fields = config_fields(fields) | quantization
    return zcode_m3_config(fields, origin)


def stored_bits(config: ZCodeM3Config) -> StoredBits | None:
    """How the folder of a config stores experts; `None` for floats.

    Raises:
        ValueError: it is quantized by a method that this package does not know.
    """
    given: Any = getattr(config, "quantization_config", None)
    if given is None:
        return None
    fields = given if isinstance(given, dict) else given.to_dict()
    method = fields.get("quant_method")
    if method != QUANTIZATION:
        raise ValueError(
            f"quantization_config has quant_method {method!r}, which the planner does not know; it knows "
            f"{QUANTIZATION!r}, the method of `hf-moe-ted quantize`"
        )
    return StoredBits(fields.get("bits", 8), fields.get("group_size"), fields.get("what", "experts"))


__all__ = ["StoredBits", "read_planned_config", "stored_bits"]
