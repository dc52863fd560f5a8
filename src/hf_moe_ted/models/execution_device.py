"""Where the inputs of a model belong, also of one whose weights are not in the memory of a device."""

from typing import Any

import torch


def execution_device(model: Any) -> torch.device:
    """The device of a model; if its weights are offloaded to disk or main memory by Accelerate, that where it computes.

    Raises:
        ValueError: its weights are on the meta device, and nothing loads them.
    """
    if model.device.type != "meta":
        return model.device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)  # Accelerate's, which loads the weights of the module
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise ValueError(f"{type(model).__name__} is on the meta device, where weights have no numbers; load it first")


__all__ = ["execution_device"]
