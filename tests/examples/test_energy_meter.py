"""The meter of energy, on a counter of a clock of its own."""

import sys
from types import SimpleNamespace

import energy_meter
import pytest
import torch
from energy_meter import Energy, EnergyMeter


class Gpu:
    """Takes 100 W, and 400 W in a call of 2 s."""

    def __init__(self) -> None:
        self.seconds, self.millijoules = 0.0, 5e6

    def work(self, seconds: float = 2.0, watts: float = 400.0) -> None:
        self.seconds += seconds
        self.millijoules += 1e3 * seconds * watts

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:
        assert handle == "GPU 0"
        return self.millijoules


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    clock = SimpleNamespace(perf_counter=lambda: gpu.seconds, sleep=lambda seconds: gpu.work(seconds, 100.0))
    monkeypatch.setattr(energy_meter, "time", clock)
    return gpu


def test_energy_of_calls(gpu: Gpu) -> None:
    waits = []
    energy = EnergyMeter(gpu, "GPU 0").of_calls(gpu.work, 3, lambda: waits.append(gpu.seconds))
    assert energy == Energy(joules=800.0, watts=400.0)
    assert waits == [0.0, 6.0]


def test_idle(gpu: Gpu) -> None:
    assert EnergyMeter(gpu, "GPU 0").idle_watts() == 100.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have the counter")
def test_no_gpu_has_no_meter() -> None:
    assert EnergyMeter.of_current_gpu() is None
    assert "pynvml" not in sys.modules
