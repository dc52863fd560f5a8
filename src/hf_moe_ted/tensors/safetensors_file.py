"""Create a safetensors file whose tensors are filled in place.

`safetensors.torch.save_file` takes all tensors of a file at once, so they are copied twice: to memory and to the file.
Here a tensor is a view of the mapped file, and values are read directly into it. Format:
https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


def create_safetensors_file(path: Path, specs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Create a file with the header of these tensors, and return the tensors, mapped from the file, to fill.

    Writing to a tensor writes to the file; the file is complete when the last tensor is freed.

    Args:
        path: the new file.
        specs: tensors on the meta device.

    Raises:
        ValueError: safetensors has no such dtype.
        OSError: the disk is full.
    """
    in_order = sorted(specs, key=lambda name: (-specs[name].itemsize, name))  # so that each tensor is aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in in_order:
        spec = specs[name]
        if spec.dtype not in _NAMES:
            raise ValueError(f"{name} is {spec.dtype}, which safetensors cannot hold; choose another dtype")
        start, end = end, end + spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (math.ceil(len(encoded) / _ALIGNMENT) * _ALIGNMENT - len(encoded))
    num_header_bytes = 8 + len(encoded)
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # so a full disk is an error here, and not a crash when a page is written
            os.posix_fallocate(file.fileno(), 0, num_header_bytes + end)
        else:
            file.truncate(num_header_bytes + end)
        file.write(len(encoded).to_bytes(8, "little") + encoded)
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=num_header_bytes + end)
    tensors, start = {}, num_header_bytes
    for name in in_order:
        spec = specs[name]
        dense = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        flat = torch.empty(0, dtype=spec.dtype)
        tensors[name] = flat.set_(storage, start // spec.itemsize, dense.shape, dense.stride())
        start += spec.nbytes
    return tensors


__all__ = ["create_safetensors_file"]
