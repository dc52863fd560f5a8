"""Triton launches kernels on the current device, even if their tensors are on another; this file corrects that."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_device_of_first(function: Callable[P, R]) -> Callable[P, R]:
    """Make the device of the first argument, a tensor, the current one while the function runs."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if (
            torch.compiler.is_compiling()
        ):  # compiled code sets the device itself, and the compiler cannot trace device_of
            return function(*args, **kwargs)
        tensor = args[0]
        assert isinstance(tensor, Tensor)
        with torch.cuda.device_of(tensor):
            return function(*args, **kwargs)

    return guarded


__all__ = ["on_device_of_first"]
