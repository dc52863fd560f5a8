"""How well the planner's models of time predict what they were not fitted on: constants are fitted without a group.

    python tests/planning/validation.py

prints two numbers for each group: the mean error of the constants that are in the package, which were fitted on all
groups, and that of constants that are fitted on all other groups only. Links of emulated machines belong to one group,
so that their bandwidth is taken from its first line, and the others are predicted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from measured_layouts import ON_NVLINK, ON_TWO_EMULATED_MACHINES, THROUGH_HOST_MEMORY, Line
from measured_searches import CAPTURED, EXPERT_CALLS, NLLB_MOE, ONE_MACHINE, STEP_BY_STEP, ExpertCall, Search
from scipy.optimize import least_squares, minimize_scalar
from scipy.stats import kendalltau

from hf_moe_ted.planning.constants import SERVING, TIME, ServingConstants, TimeConstants
from hf_moe_ted.planning.gpus import GPUS, Gpu
from hf_moe_ted.planning.serving_memory import weight_bytes
from hf_moe_ted.planning.serving_time import chosen_experts, time_of_token
from hf_moe_ted.planning.step_time import time_of_step

H200 = GPUS["h200-141gb"]
FITTED = ("passes_of_kept", "nvlink_efficiency", "collective_s", "zero_overlap")
FEW_SLOTS = 8  # nothing is fitted on kernels of more
EFFICIENCY_OF_BITS = {16: "expert_floats_efficiency", 8: "expert_int8_efficiency", 4: "expert_int4_efficiency"}
SOCKETS_GBS, HOST_MEMORY_GBS = 3.35, 20.4  # fitted: GB/s that a GPU gets of the emulated links


@dataclass(frozen=True)
class Group:
    """Lines that share a machine.

    Attributes:
        link: field of a [`Gpu`] that the emulated machine has of its own.
        link_gbs: what it was fitted to.
    """

    name: str
    lines: Sequence[Line]
    gpus_per_node: int = 8
    link: str | None = None
    link_gbs: float = math.nan

    def milliseconds(self, line: Line, constants: TimeConstants, link_gbs: float | None = None) -> float:
        gpu = self.gpu(self.link_gbs if link_gbs is None else link_gbs, constants)
        step = time_of_step(line.config, line.layout, line.workload, gpu, self.gpus_per_node, constants)
        return step.total * 1e3

    def gpu(self, link_gbs: float, constants: TimeConstants) -> Gpu:
        """An H200 whose link is so fast after its efficiency."""
        if self.link is None:
            return H200
        efficiency = constants.network_efficiency if self.link == "network_gbs" else constants.nvlink_efficiency
        return replace(H200, **{self.link: link_gbs / efficiency})


def _on_nvlink(base: str) -> list[Line]:
    return [line for line in ON_NVLINK if line.base == base]


GROUPS = [
    *(Group(f"{base} on NVLink", _on_nvlink(base)) for base in ("0.6B", "1.3B", "2.3B", "6.7B")),
    Group("two emulated machines", ON_TWO_EMULATED_MACHINES, 2, "network_gbs", SOCKETS_GBS),
    Group("through host memory", THROUGH_HOST_MEMORY, 8, "nvlink_gbs", HOST_MEMORY_GBS),
]


def mean_error(planned: Sequence[float], measured: Sequence[float]) -> float:
    """Mean of |planned / measured - 1|."""
    return sum(abs(p / m - 1) for p, m in zip(planned, measured, strict=True)) / len(measured)


# ---- training steps ----


def fitted_constants(groups: Sequence[Group]) -> TimeConstants:
    """The four constants, and the links of the groups, with the least sum of squares of log(planned / measured)."""
    links = [group for group in groups if group.link is not None]
    start = [*(getattr(TIME, name) for name in FITTED), *(group.link_gbs for group in links)]

    def residuals(scales: Sequence[float]) -> list[float]:
        values = [scale * value for scale, value in zip(scales, start, strict=True)]
        constants = replace(TIME, **dict(zip(FITTED, values[: len(FITTED)], strict=True)))
        of_link = dict(zip((group.name for group in links), values[len(FITTED) :], strict=True))
        return [
            math.log(group.milliseconds(line, constants, of_link.get(group.name)) / line.measured)
            for group in groups
            for line in group.lines
        ]

    upper = [5.0, 1 / TIME.nvlink_efficiency, 5.0, 1 / TIME.zero_overlap, *[5.0] * len(links)]
    found = least_squares(
        residuals, [1.0] * len(start), bounds=([0.0] * 4 + [0.05] * len(links), upper), diff_step=1e-3
    )
    values = [scale * value for scale, value in zip(found.x, start, strict=True)]
    return replace(TIME, **dict(zip(FITTED, values[: len(FITTED)], strict=True)))


@dataclass(frozen=True)
class Prediction:
    """Lines of a group, in milliseconds: by the constants of the package, and of a fit without the group."""

    group: Group
    constants: TimeConstants
    lines: Sequence[Line]
    by_all: Sequence[float]
    by_others: Sequence[float]

    @property
    def measured(self) -> list[float]:
        return [line.measured for line in self.lines]


def predict_without(left_out: Group) -> Prediction:
    """Fit on the other groups, and predict this one; the first line of an emulated machine gives its link."""
    constants = fitted_constants([group for group in GROUPS if group is not left_out])
    lines, link_gbs = left_out.lines, None
    if left_out.link is not None:
        first, lines = lines[0], lines[1:]
        link_gbs = _root(lambda gbs: left_out.milliseconds(first, constants, gbs) - first.measured, left_out.link_gbs)
    return Prediction(
        left_out,
        constants,
        lines,
        [left_out.milliseconds(line, TIME) for line in lines],
        [left_out.milliseconds(line, constants, link_gbs) for line in lines],
    )


def _root(function: Callable[[float], float], near: float) -> float:
    found = minimize_scalar(lambda x: function(x) ** 2, bounds=(near / 5, near * 5), method="bounded")
    return float(found.x)


def tokens_per_s(line: Line, milliseconds: float) -> float:
    workload = line.workload
    tokens = workload.num_tokens("encoder") + workload.num_tokens("decoder")
    return tokens * line.layout.data_parallel_size / milliseconds * 1e3


def print_training() -> None:
    predictions = [predict_without(group) for group in GROUPS]
    print("| group left out | lines | fitted on all | fitted without it | passes, NVLink, us, overlap without it |")
    print("|---|---|---|---|---|")
    for found in predictions:
        values = [getattr(found.constants, name) for name in FITTED]
        shown = f"{values[0]:.1f}, {values[1]:.2f}, {values[2] * 1e6:.0f}, {values[3]:.2f}"
        errors = [mean_error(planned, found.measured) for planned in (found.by_all, found.by_others)]
        print(f"| {found.group.name} | {len(found.lines)} | {errors[0]:.1%} | {errors[1]:.1%} | {shown} |")
    lines = [line for found in predictions for line in found.lines]
    measured = [line.measured for line in lines]
    speeds = [tokens_per_s(line, line.measured) for line in lines]
    for name, planned in (
        ("fitted on all", [ms for found in predictions for ms in found.by_all]),
        ("fitted without the group", [ms for found in predictions for ms in found.by_others]),
    ):
        tau = kendalltau(speeds, [tokens_per_s(line, ms) for line, ms in zip(lines, planned, strict=True)]).statistic
        worst = max(abs(p / m - 1) for p, m in zip(planned, measured, strict=True))
        print(f"{name}: mean error {mean_error(planned, measured):.1%}, worst {worst:.1%}, Kendall's tau {tau:.2f}")


# ---- steps of decoding ----


def milliseconds_of(search: Search, constants: ServingConstants = SERVING) -> float:
    weights = weight_bytes(search.config, None)
    return time_of_token(search.config, search.workload, H200, weights, constants=constants).total * 1e3


def fitted_layer(searches: Sequence[Search]) -> float:
    """Seconds of the kernels of a decoder layer: the mean of what the bytes leave of the measured steps."""
    nothing = replace(SERVING, captured_layer_s=0.0)
    left = [(search.measured - milliseconds_of(search, nothing)) / search.config.decoder_layers for search in searches]
    return sum(left) / len(left) / 1e3


def kernels_ms(call: ExpertCall, bits: int, constants: ServingConstants = SERVING) -> float:
    """Of one layer's experts in kernels."""
    used = sum(chosen_experts(call.num_experts, 2, call.num_slots // 2))
    weights = 8 * call.d_model**2
    of_scales = {16: 0, 8: 10 * call.d_model, 4: 2 * weights / 128}[bits]
    read_s = used * (weights * bits / 8 + of_scales) / (H200.memory_gbs * 1e9 * TIME.memory_efficiency)
    return 1e3 * (read_s / getattr(constants, EFFICIENCY_OF_BITS[bits]) + constants.expert_kernel_s)


def fitted_loop(bits: int) -> float:
    """Seconds of an expert in the loop, with the least sum of squares of log(planned / measured)."""
    logs = [math.log(call.measured_loop(bits) / loop_ms(call, bits)) for call in EXPERT_CALLS]
    start = SERVING.loop_expert_int8_s if bits == 8 else SERVING.loop_expert_int4_s
    return start * math.exp(sum(logs) / len(logs))


def loop_ms(call: ExpertCall, bits: int) -> float:
    """Of the loop over experts."""
    used = sum(chosen_experts(call.num_experts, 2, call.num_slots // 2))
    return 1e3 * used * (SERVING.loop_expert_int8_s if bits == 8 else SERVING.loop_expert_int4_s)


def fit_kernels(lines: Sequence[tuple[ExpertCall, int]]) -> ServingConstants:
    """Three efficiencies and the time of kernels, with the least sum of squares of log(planned / measured)."""
    names = (*EFFICIENCY_OF_BITS.values(), "expert_kernel_s")
    start = [getattr(SERVING, name) for name in names]

    def of(scales: Sequence[float]) -> ServingConstants:
        return replace(SERVING, **{n: s * v for n, s, v in zip(names, scales, start, strict=True)})

    def residuals(scales: Sequence[float]) -> list[float]:
        return [math.log(kernels_ms(call, bits, of(scales)) / call.measured(bits)) for call, bits in lines]

    return of(least_squares(residuals, [1.0] * len(names), bounds=(0.05, 5.0)).x)


def print_searches() -> None:
    print(f"\nSeconds of a decoder layer, fitted on all: {fitted_layer(CAPTURED):.3g}")
    print("| search | experts counted | measured ms | fitted on all | without it | if rows chose evenly |")
    print("|---|---|---|---|---|---|")
    predicted = []
    for search in (*CAPTURED, *NLLB_MOE):
        others = replace(SERVING, captured_layer_s=fitted_layer([s for s in CAPTURED if s is not search]))
        predicted.append(milliseconds_of(search, others))
        planned = [milliseconds_of(search), predicted[-1], milliseconds_of(replace(search, experts=None))]
        shown = " | ".join(f"{ms:.2f}" for ms in planned)
        print(f"| {search} | {search.experts} | {search.measured:.2f} | {shown} |")
    for name, searches in (("fitted on", CAPTURED), ("not fitted on", NLLB_MOE)):
        measured = [search.measured for search in searches]
        by_others = predicted[: len(CAPTURED)] if searches is CAPTURED else predicted[len(CAPTURED) :]
        for how, planned in (("fitted on all", [*map(milliseconds_of, searches)]), ("without the line", by_others)):
            worst = max(abs(p / m - 1) for p, m in zip(planned, measured, strict=True))
            print(f"searches {name}, {how}: mean error {mean_error(planned, measured):.1%}, worst {worst:.1%}")
    mean = sum(search.measured / search.config.decoder_layers for search in STEP_BY_STEP) / len(STEP_BY_STEP)
    print(f"\nStep by step, mean milliseconds of a layer: {mean:.3g}")
    for search in STEP_BY_STEP:
        print(f"| {search} | {search.measured:.2f} | {milliseconds_of(search):.2f} |")
    for line in ONE_MACHINE:
        planned = (line.step_ms, line.prefill_ms)
        print(f"| {line} | {line.measured_step}, {line.measured_prefill} | {planned[0]:.1f}, {planned[1]:.1f} |")


def print_kernels() -> None:
    fitted = [(call, bits) for call in EXPERT_CALLS for bits in EFFICIENCY_OF_BITS if call.num_slots <= FEW_SLOTS]
    found = fit_kernels(fitted)
    values = [f"{getattr(found, name):.3g}" for name in (*EFFICIENCY_OF_BITS.values(), "expert_kernel_s")]
    print(f"\nkernels of experts, fitted: floats, int8, int4, seconds: {', '.join(values)}")
    print("| experts, slots | bits | measured | planned | without it |\n|---|---|---|---|---|")
    errors: dict[str, list[float]] = {}
    for call in EXPERT_CALLS:
        for bits in EFFICIENCY_OF_BITS:
            others = fit_kernels([line for line in fitted if line != (call, bits)])
            planned, without, measured = kernels_ms(call, bits), kernels_ms(call, bits, others), call.measured(bits)
            print(f"| {call.num_experts}, {call.num_slots} | {bits} | {measured} | {planned:.3f} | {without:.3f} |")
            group = "few slots" if call.num_slots <= FEW_SLOTS else f"many slots, {'floats' if bits == 16 else 'ints'}"
            errors.setdefault(f"{group}, fitted on few slots", []).append(abs(planned / measured - 1))
            errors.setdefault(f"{group}, without the line", []).append(abs(without / measured - 1))
    for name, found_errors in errors.items():
        print(f"{name}: mean error {sum(found_errors) / len(found_errors):.0%}, worst {max(found_errors):.0%}")
    print("| experts, slots | loop over int4, planned | int8, planned |\n|---|---|---|")
    for call in EXPERT_CALLS:
        loops = [f"{call.measured_loop(bits)}, {loop_ms(call, bits):.2f}" for bits in (4, 8)]
        print(f"| {call.num_experts}, {call.num_slots} | {' | '.join(loops)} |")
    errors_of_loops = [
        abs(loop_ms(call, bits) / call.measured_loop(bits) - 1) for call in EXPERT_CALLS for bits in (4, 8)
    ]
    print(f"loops: mean error {sum(errors_of_loops) / len(errors_of_loops):.0%}, worst {max(errors_of_loops):.0%}")
    for bits in (4, 8):
        print(f"seconds of an expert in the loop, {bits} bits, fitted: {fitted_loop(bits):.3g}")


if __name__ == "__main__":
    print_training()
    print_searches()
    print_kernels()
