"""The device for a model's inputs, also where its weights are not in the memory of a device."""

from typing import Any

import torch


def execution_device(model: Any) -> torch.device:
    """The device of a model; if its weights are offloaded to disk or main memory by Accelerate, that where it computes.

    Raises:
        ValueError: its weights are on the meta device, and nothing loads them.
    """
    if model.device.type != "meta":
        return model.device
    device = offloaded_device(model)
    if device is not None:
        return device
    raise ValueError(f"{type(model).__name__} is on the meta device, where weights have no numbers; load it first")


def offloaded_device(model: Any) -> torch.device | None:
    """Where a model computes whose weights Accelerate loads when they are needed; `None` for another."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


__all__ = ["execution_device", "offloaded_device"]
