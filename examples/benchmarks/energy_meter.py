"""Energy of the GPU of a process, by NVML's counter, so that the planner's constants of power can be measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

IDLE_S = 2.0  # the counter goes on in steps of up to 0.1 s


@dataclass(frozen=True)
class Energy:
    """
    Attributes:
        joules: of one call.
        watts: mean, while calls ran.
    """

    joules: float
    watts: float


class EnergyMeter:
    """Reads the energy that a GPU has taken since the driver was loaded.

    Args:
        nvml: the module `pynvml` of nvidia-ml-py, initialized.
        handle: of the GPU, as NVML knows it.
    """

    def __init__(self, nvml: Any, handle: Any):
        self.nvml, self.handle = nvml, handle

    @classmethod
    def of_current_gpu(cls) -> "EnergyMeter | None":
        """`None` without a GPU, without `pynvml`, or where the GPU has no such counter (before Volta)."""
        if not torch.cuda.is_available():
            return None
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            meter = cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
            meter.joules()
        except pynvml.NVMLError:
            return None
        return meter

    def joules(self) -> float:
        """Since the driver was loaded; the counter is in millijoules."""
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3

    def of_calls(self, call: Callable[[], Any], count: int, wait: Callable[[], None]) -> Energy:
        """Mean energy of `count` calls.

        Args:
            wait: until the device has done them.
        """
        wait()
        start, before = time.perf_counter(), self.joules()
        for _ in range(count):
            call()
        wait()
        spent, seconds = self.joules() - before, time.perf_counter() - start
        return Energy(spent / count, spent / seconds)

    def idle_watts(self, seconds: float = IDLE_S) -> float:
        """Mean power while this process does nothing."""
        return self.of_calls(lambda: time.sleep(seconds), 1, lambda: None).watts
