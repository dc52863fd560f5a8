"""GPUs from data sheets, or from a user's YAML file."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..files.typed_fields import from_fields
from ..files.yaml_file import read_yaml
from .constants import MEMORY, MemoryConstants

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """
    Attributes:
        name: name for messages.
        memory_gib: GiB of the device.
        tflops: TFLOP/s of dense matrix products in bfloat16 (V100: float16), without sparsity.
        memory_gbs: GB/s of its memory.
        nvlink_gbs: GB/s to GPUs of the same machine, in one direction.
        network_gbs: GB/s to other machines in one direction: the GPU's share of the machine's adapters.
        power_w: watts at full load.

    Raises:
        ValueError: a number is not positive and finite.
    """

    name: str
    memory_gib: float
    tflops: float
    memory_gbs: float
    nvlink_gbs: float
    network_gbs: float
    power_w: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{field.name} ({value!r}) of the GPU {self.name} must be a positive number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# NVIDIA's data sheets of the SXM modules; the network is that of the DGX with eight of them (V100: DGX-1, four adapters
# of 100 Gb/s; A100: eight of 200; H100 and H200: eight of 400)
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100-32gb", 32, 125, 900, 150, 6.25, 300),
        Gpu("a100-40gb", 40, 312, 1555, 300, 25, 400),
        Gpu("a100-80gb", 80, 312, 2039, 300, 25, 400),
        Gpu("h100-80gb", 80, 989, 3350, 450, 50, 700),
        Gpu("h200-141gb", 141, 989, 4800, 450, 50, 700),
    )
}


def gpu_of(name: str | Gpu) -> Gpu:
    """Find a GPU by its name, or read it from a YAML file with the fields of [`Gpu`].

    Raises:
        ValueError: the name is unknown and no such file exists, or the file does not describe a GPU.
    """
    if isinstance(name, Gpu):
        return name
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"gpu ({name!r}) must be one of {', '.join(GPUS)}, or a YAML file with the fields of a GPU")
    content = read_yaml(path, "gpu")
    if not isinstance(content, dict):
        raise ValueError(f"gpu ({path}) must have a field per line: {', '.join(field.name for field in fields(Gpu))}")
    try:
        return from_fields(Gpu, {"name": path.stem, **content})
    except ValueError as error:
        raise ValueError(f"gpu ({path}): {error}") from error


def usable_bytes(gpu: Gpu, constants: MemoryConstants = MEMORY) -> float:
    """Bytes of a GPU's memory that tensors can use."""
    return constants.usable_share * gpu.memory_gib * GIB


__all__ = ["GIB", "GPUS", "Gpu", "gpu_of", "usable_bytes"]
