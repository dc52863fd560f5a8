"""The model of time against steps that were measured as CUDA graphs on H200.

Some constants of `TimeConstants` were fitted on these very steps, so agreement is no proof that other GPUs, models and
networks are predicted as well. The links of the emulated machines are their own, also fitted: 3.35 GB/s of sockets per
GPU between pairs, and 20.4 GB/s in place of NVLink's where all goes through the memory of the host.
"""

from dataclasses import replace

import pytest
from measured_layouts import (
    ON_NVLINK,
    ON_TWO_EMULATED_MACHINES,
    ONE_ON_EACH_EMULATED_MACHINE,
    THROUGH_HOST_MEMORY,
    TWO_ON_NVLINK,
    Line,
)
from scipy.stats import kendalltau
from validation import GROUPS as GROUPS_TO_LEAVE_OUT
from validation import mean_error, predict_without

from hf_moe_ted.distributed.layout import Layout
from hf_moe_ted.planning.constants import POWER, TIME, PowerConstants, origins
from hf_moe_ted.planning.gpus import GPUS, Gpu
from hf_moe_ted.planning.step_time import forward_flops, gpu_watts, time_of_step, watts
from hf_moe_ted.planning.workload import Workload
from hf_moe_ted.testing import tiny_config

H200 = GPUS["h200-141gb"]
SOCKETS = replace(H200, network_gbs=3.35 / TIME.network_efficiency)
HOST_MEMORY = replace(H200, nvlink_gbs=20.4 / TIME.nvlink_efficiency)
STEPS = [
    *((line, H200, 8) for line in ON_NVLINK),
    *((line, SOCKETS, 2) for line in ON_TWO_EMULATED_MACHINES),
    *((line, HOST_MEMORY, 8) for line in THROUGH_HOST_MEMORY),
]
GROUPS = {
    "four H200 on NVLink": slice(0, len(ON_NVLINK)),
    "1.3B x 16, neither to both, on NVLink": slice(3, 7),
    "two emulated machines": slice(len(ON_NVLINK), len(ON_NVLINK) + 4),
    "through host memory": slice(len(ON_NVLINK) + 4, None),
    "all": slice(None),
}


def planned_ms(line: Line, gpu: Gpu, gpus_per_node: int) -> float:
    return time_of_step(line.config, line.layout, line.workload, gpu, gpus_per_node).total * 1e3


def tokens_per_s(line: Line, milliseconds: float) -> float:
    workload = line.workload
    tokens = workload.num_tokens("encoder") + workload.num_tokens("decoder")
    return tokens * line.layout.data_parallel_size / milliseconds * 1e3


@pytest.mark.parametrize("group", GROUPS)
def test_ranking(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Kendall's tau of tokens per second."""
    steps = STEPS[GROUPS[group]]
    measured = [tokens_per_s(line, line.measured) for line, _, _ in steps]
    planned = [tokens_per_s(step[0], planned_ms(*step)) for step in steps]
    tau = kendalltau(measured, planned).statistic
    with capsys.disabled():
        print(f"\nKendall's tau, {group} ({len(steps)} steps): {tau:.2f}")
    assert tau >= 0.8


@pytest.mark.parametrize("step", STEPS, ids=lambda step: str(step[0]))
def test_milliseconds(step: tuple[Line, Gpu, int]) -> None:
    assert planned_ms(*step) == pytest.approx(step[0].measured, rel=0.1)


def test_a_group_that_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Constants that are fitted on all other steps; tests/planning/validation.py does it for each group."""
    found = predict_without(next(group for group in GROUPS_TO_LEAVE_OUT if group.name == "through host memory"))
    with capsys.disabled():
        print(f"\n{found.group.name}: mean error {mean_error(found.by_others, found.measured):.1%} by a fit without it")
    assert mean_error(found.by_others, found.measured) < 0.15
    order = kendalltau(found.measured, found.by_others).statistic
    assert order == 1


def test_lines_that_nothing_was_fitted_on(capsys: pytest.CaptureFixture[str]) -> None:
    measured = [line.measured for line in TWO_ON_NVLINK]
    planned = [planned_ms(line, H200, 8) for line in TWO_ON_NVLINK]
    with capsys.disabled():
        print(f"\ntwo H200 of another day: mean error {mean_error(planned, measured):.1%}")
    assert mean_error(planned, measured) < 0.1
    speeds = [[tokens_per_s(*each) for each in zip(TWO_ON_NVLINK, ms, strict=True)] for ms in (measured, planned)]
    assert kendalltau(*speeds).statistic == 1
    # sockets of another host, as fast as the first line says
    sockets = replace(H200, network_gbs=5.25 / TIME.network_efficiency)
    expert_parallel, all_replicated = (planned_ms(line, sockets, 1) for line in ONE_ON_EACH_EMULATED_MACHINE)
    assert expert_parallel == pytest.approx(656, rel=0.01)
    assert all_replicated == pytest.approx(2817, rel=0.25)


def test_flops() -> None:
    """Of a dense layer by hand, and divided by tensor parallelism."""
    config = tiny_config(encoder_sparse_step=0, decoder_sparse_step=0)
    workload = Workload(2, 5, 7)
    in_layers, in_head = forward_flops(config, Layout(), workload)
    encoder = 4 * 10 * (8 * 32**2 + 4 * 32 * 64 + 4 * 5 * 32)
    decoder = 2 * (14 * (8 * 32**2 + 4 * 32 * 64 + 2 * 7 * 32 + 4 * 32**2 + 4 * 5 * 32) + 10 * 4 * 32**2)
    assert (in_layers, in_head) == (encoder + decoder, 2 * 14 * 32 * 96)
    assert forward_flops(config, Layout(tensor_parallel_size=2), workload) == (in_layers / 2, in_head / 2)


def test_slower_links_and_smaller_gpus_take_longer() -> None:
    line = ON_NVLINK[6]
    on_h200 = time_of_step(line.config, line.layout, line.workload, H200, 4)
    across = time_of_step(line.config, line.layout, line.workload, H200, 2)
    on_a100 = time_of_step(line.config, line.layout, line.workload, GPUS["a100-80gb"], 4)
    assert on_h200.slow_bytes.keys() == across.slow_bytes.keys()
    assert sum(on_h200.slow_bytes.values()) == 0 < sum(across.slow_bytes.values())
    assert across.total > on_h200.total
    assert on_a100.matmul > on_h200.matmul and on_a100.optimizer > on_h200.optimizer


def test_power_is_between_idle_and_full_load() -> None:
    line = ON_NVLINK[0]
    step = time_of_step(line.config, line.layout, line.workload, H200)
    assert watts(step.busy_share, H200) == pytest.approx(POWER.cooling * (700 + POWER.host_power_w))
    waiting = replace(step, communication=1e9)
    idle = POWER.cooling * (POWER.idle_power * 700 + POWER.host_power_w)
    assert watts(waiting.busy_share, H200) == pytest.approx(idle, rel=1e-6)


def test_measured_power_takes_the_place_of_the_assumed() -> None:
    measured = PowerConstants(idle_power=0.1, busy_power=0.7)
    assert [gpu_watts(share, H200, measured) for share in (0.0, 0.5, 1.0)] == pytest.approx([70, 280, 490])


def test_every_constant_has_an_origin() -> None:
    found = origins(POWER) | origins(TIME)
    assert {constant["origin"] for constant in found.values()} <= {"measured", "fitted", "assumed"}
    assert found["passes_of_kept"] == {"value": 16.6, "origin": "fitted", "note": found["passes_of_kept"]["note"]}
