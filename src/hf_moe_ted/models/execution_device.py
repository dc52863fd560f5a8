"""The device for a model's inputs, also if its weights are not in a device's memory."""

from typing import Any

import torch


def execution_device(model: Any) -> torch.device:
    """The device of a model; if Accelerate offloaded its weights to disk or main memory, the device that computes.

    Raises:
        ValueError: its weights are on the meta device and nothing loads them.
    """
    if model.device.type != "meta":
        return model.device
    device = offloaded_device(model)
    if device is not None:
        return device
    raise ValueError(f"{type(model).__name__} is on the meta device, on which weights have no numbers; load it first")


def offloaded_device(model: Any) -> torch.device | None:
    """The computing device of a model whose weights Accelerate loads when needed; `None` for other models."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


__all__ = ["execution_device", "offloaded_device"]
