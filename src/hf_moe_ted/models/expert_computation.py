"""How experts are computed: the needs of each `experts_implementation`, its replacement, and the defaults.

`COMPUTATIONS` is the only place that defines this; docs/experts.md quotes it. The exchange of tokens is another
setting: `ep_implementation` of the layout.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.utils import logging

try:
    from hf_moe_ted.kernels import experts_implementations as kernels
except ImportError:  # remote code without the package
    kernels = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

ExpertsFunction = Callable[[Any, Tensor, Tensor, Tensor], Tensor]

# in transformers the products would fail: docs/upstream/transformers_grouped_mm_widths.md
_ROWS_OF_16_BYTES = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}
_ROWS_UNDER_AUTOCAST = {torch.float32: 8, torch.bfloat16: 8, torch.float16: 8}  # autocast may choose 16 bits
_FIRST_WITH_GROUPED_MM = (8, 0)


@dataclass(frozen=True)
class ExpertComputation:
    """One way to compute experts.

    Attributes:
        name: the value of `experts_implementation`.
        how: a description in words.
        default_on: device types on which it is the default, unless a row above it is.
        width_steps: dtype of weights -> number of which d_model and the inner width must be multiples; other dtypes are
            not supported. `None` is any.
        cuda_capability: the lowest compute capability of a CUDA device.
        uses_triton: whether it needs Triton.
        only_relu: whether it supports only ReLU, in training without dropout.
        is_ours: whether it comes with this package, and not with transformers.
        instead: the row that runs if this one cannot; `None` if that is an error.
        compiles: whether `torch.compile` compiles it to one graph.
        cuda_graphs: whether CUDA graphs can record it: "yes", "no", or the dtype in which they can.
        second_derivatives: whether gradients have gradients.
    """

    name: str
    how: str
    default_on: tuple[str, ...] = ()
    width_steps: Mapping[torch.dtype, int] | None = None
    cuda_capability: tuple[int, int] | None = None
    uses_triton: bool = False
    only_relu: bool = False
    is_ours: bool = False
    instead: str | None = None
    compiles: bool = True
    cuda_graphs: str = "yes"
    second_derivatives: bool = True

    def why_not(self, widths: Mapping[str, int], dtype: torch.dtype, *, any_dtype: bool = False) -> str | None:
        """What experts lack for this computation; `None` if nothing.

        Args:
            widths: d_model and inner widths by name; empty for a model without experts.
            dtype: dtype of the weights.
            any_dtype: whether the weights may later have any of the dtypes.
        """
        if self.is_ours and kernels is None:
            return "the package hf_moe_ted, which is not installed"
        if self.width_steps is None or not widths:
            return None
        step = max(self.width_steps.values()) if any_dtype else self.width_steps.get(dtype, 1)
        odd_widths = {name: width for name, width in widths.items() if width % step}
        if odd_widths:
            return f"widths that are multiples of {step}, got {odd_widths}"
        return None if dtype in self.width_steps else f"at most float32, got {dtype}"

    def why_not_now(self, experts: Any) -> str | None:
        """The same for a module with `up_proj` [E, F, D] and `act_fn`, in its current state and on its device."""
        up_proj = experts.up_proj
        device = up_proj.device
        if self.uses_triton and device.type not in kernels.TRITON_DEVICES:
            return f"Triton's kernels, which run on {kernels.TRITON_DEVICES} here, got {device}"
        if self.cuda_capability and device.type == "cuda" and _capability(device) < self.cuda_capability:
            return f"compute capability {self.cuda_capability}, got {_capability(device)}"
        if self.only_relu and not is_plain_relu(experts.act_fn):
            return "ReLU without dropout"
        return self.why_not({"ffn_dim": up_proj.shape[1], "d_model": up_proj.shape[2]}, up_proj.dtype)


# in the order in which a default is searched
COMPUTATIONS = {
    row.name: row
    for row in (
        ExpertComputation(
            "zcode_fused",
            "Triton kernels; a step of generation in two",
            default_on=("cuda",),
            width_steps=_ROWS_UNDER_AUTOCAST,
            cuda_capability=(8, 0),  # copies to shared memory overlap with the computation
            uses_triton=True,
            only_relu=True,
            is_ours=True,
            instead="zcode_grouped",
            second_derivatives=False,
        ),
        ExpertComputation(
            "grouped_mm",
            "PyTorch's grouped products, by transformers",
            default_on=("cuda", "cpu"),
            width_steps=_ROWS_OF_16_BYTES,
            cuda_graphs="bfloat16",
        ),
        ExpertComputation(
            "zcode_grouped",
            "the same without indexed additions in backward",
            width_steps=_ROWS_UNDER_AUTOCAST,
            cuda_capability=_FIRST_WITH_GROUPED_MM,
            is_ours=True,
            instead="zcode_cpu",
            cuda_graphs="bfloat16",
            second_derivatives=False,
        ),
        ExpertComputation(
            "zcode_cpu",
            "one expert after the other on its rows, oneDNN; for inference on CPUs",
            is_ours=True,
            compiles=False,
            cuda_graphs="no",
        ),
        ExpertComputation("batched_mm", "a copy of the weights for each slot, by transformers"),
        ExpertComputation(
            "eager",
            "a loop over the experts, the reference",
            default_on=("cuda", "cpu"),
            cuda_graphs="no",
        ),
    )
}


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def is_plain_relu(act_fn: nn.Module) -> bool:
    """Whether the activation of experts is ReLU and nothing else."""
    has_dropout = act_fn.training and getattr(act_fn, "dropout", 0.0) > 0.0
    return isinstance(getattr(act_fn, "activation", act_fn), nn.ReLU) and not has_dropout


def default_computation(device_type: str, widths: Mapping[str, int], dtype: torch.dtype) -> str:
    """The name of the first row that is a default on a device (`"cuda"` or `"cpu"`) and supports widths and dtype.

    It warns if that is the loop, which waits for the device at each expert.
    """
    reasons = {
        name: row.why_not(widths, dtype, any_dtype=True)
        for name, row in COMPUTATIONS.items()
        if device_type in row.default_on
    }
    default = next(name for name, reason in reasons.items() if reason is None)
    if default == "eager":
        logger.warning_once(
            "experts are computed by a slow loop (experts_implementation='eager'), because 'grouped_mm' needs "
            f"{reasons['grouped_mm']}"
        )
    return default


def check_computation(name: str, widths: Mapping[str, int], dtype: torch.dtype) -> None:
    """Refuse a row that cannot compute experts of these widths and dtype; names without a row are not checked.

    Raises:
        ValueError: the experts lack something; the message names it, and rows that support any experts.
    """
    if name in COMPUTATIONS and (reason := COMPUTATIONS[name].why_not(widths, dtype, any_dtype=True)):
        raise _refusal(name, reason)


def _refusal(name: str, reason: str) -> ValueError:
    *others, last = (
        repr(row.name) for row in COMPUTATIONS.values() if row.width_steps is None and (kernels or not row.is_ours)
    )
    return ValueError(f"experts_implementation={name!r} needs {reason}; use {', '.join(others)} or {last}")


class ExpertsWithReasons(ExpertsInterface):
    """transformers' experts functions for our experts, with early and clear errors."""

    def get_interface(self, experts_implementation: str, default: ExpertsFunction) -> ExpertsFunction:
        """Like the parent's, with the functions that are registered in `ALL_EXPERTS_FUNCTIONS`."""
        function = ALL_EXPERTS_FUNCTIONS.get_interface(experts_implementation, default)
        return functools.partial(_grouped_mm, function) if experts_implementation == "grouped_mm" else function


def _grouped_mm(function: ExpertsFunction, experts: Any, *inputs: Tensor) -> Tensor:
    if not _has_loop(experts.up_proj.device) and (reason := COMPUTATIONS["grouped_mm"].why_not_now(experts)):
        raise _refusal("grouped_mm", reason)
    return function(experts, *inputs)


def _has_loop(device: torch.device) -> bool:
    """Whether transformers uses a loop, which computes any experts, instead of PyTorch's grouped products."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and _capability(device) < _FIRST_WITH_GROUPED_MM)


def _function_that_hands_over(row: ExpertComputation) -> ExpertsFunction:
    """The experts function of one of our rows; experts that it cannot compute go to the row `instead`."""
    if row.instead is None:
        return kernels.EXPERTS_IMPLEMENTATIONS[row.name]
    instead = ALL_EXPERTS_FUNCTIONS[row.instead]
    function = kernels.EXPERTS_IMPLEMENTATIONS.get(row.name, instead)  # the Triton function may be missing

    def experts_forward(experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        reason = row.why_not_now(experts)
        if reason and row.instead == "zcode_cpu" and not torch.compiler.is_compiling():
            logger.warning_once(
                f"experts are computed one after the other, which is slow on GPUs, because {row.name!r} needs {reason}"
            )
        runs = instead if reason else function
        return runs(experts, hidden_TD, top_k_index, top_k_weights)

    return experts_forward


if kernels is not None:
    for row in reversed(COMPUTATIONS.values()):  # rows to which others hand over come first
        if row.is_ours:
            ALL_EXPERTS_FUNCTIONS.register(row.name, _function_that_hands_over(row))

__all__ = [
    "COMPUTATIONS",
    "ExpertComputation",
    "ExpertsWithReasons",
    "check_computation",
    "default_computation",
    "is_plain_relu",
]
