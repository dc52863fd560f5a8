"""AdamW that clips gradients while it steps: they are read once more for the norm, and never written."""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

from .private_torch import foreach_mul_, local_tensor

try:
    from ..kernels import multi_tensor
except ImportError:  # no Triton
    multi_tensor = None  # type: ignore[assignment]

K = TypeVar("K")
V = TypeVar("V")

# Gradients have new addresses after each capture; in steps from Python the allocator may change them at any time.
_NUM_TABLES = 64
_OF_GRAD_SCALER = ("grad_scale", "found_inf")  # attributes that a GradScaler gives an optimizer for a step


@dataclass(frozen=True)
class _NormTable:
    """Addresses of gradients, int64[1, N], and the weights of their squares, float32[N]."""

    addresses: Tensor
    weights: Tensor
    chunks: "multi_tensor.Chunks"


@dataclass(frozen=True)
class _StepTable:
    """Addresses of all tensors of a step, int64[5, N], and the param groups of the parameters, int32[N]."""

    addresses: Tensor
    groups: Tensor
    chunks: "multi_tensor.Chunks"


class ClippedAdamW(AdamW):
    """[`torch.optim.AdamW`] with `fused=True` that also clips, in the same pass over memory.

    A step after `clip_grad_norm_` multiplies the gradients by the factor when it reads them. For parameters of 2 bytes,
    norm and step move 16 bytes per element; AdamW alone moves 14, and `torch.nn.utils.clip_grad_norm_` before it 6
    more. The arithmetic is that of torch's fused kernel for CUDA, in float32, with three differences: powers of betas
    are computed in float64, clipped gradients are not rounded to their dtype, and the norm is a float32 sum that is
    always taken in the same order. States and their dtypes are those of torch, so either optimizer loads the
    `state_dict` of the other.

    This needs Triton, and contiguous bfloat16 or float32 parameters on one CUDA device; they may be DTensors. Torch
    does the rest: `amsgrad`, `maximize`, a GradScaler, a step that is captured as a CUDA graph, other devices and
    dtypes.

    ```python
    optimizer = ClippedAdamW(model.parameters(), lr=1e-4)
    loss.backward()
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    ```

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in [`torch.optim.AdamW`].
        fused: must be `True`; a Trainer gives it for `optim="adamw_torch_fused"`.

    Raises:
        ValueError: `fused` is not `True`.
    """

    _device_types: tuple[str, ...] = ("cuda",)  # on other devices Triton has its interpreter, for tests

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        fused: bool = True,
    ):
        if fused is not True:
            raise ValueError(f"fused ({fused}) must be True; use torch.optim.AdamW for steps that are not fused")
        self._forget()
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, fused=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state; `load_state_dict` ends with this, too, for states of any AdamW."""
        super().__setstate__(state)
        self._forget()
        self._stay_fused()

    def _forget(self) -> None:
        self._factor: Tensor | None = None
        self._norm_tables: OrderedDict[Any, _NormTable | None] = OrderedDict()
        self._step_tables: OrderedDict[Any, _StepTable | None] = OrderedDict()
        self._chunks: OrderedDict[Any, multi_tensor.Chunks] = OrderedDict()
        self._options: tuple[list[list[float]], Tensor] | None = None

    def _stay_fused(self) -> None:
        """Correct states and options of an AdamW that was not fused, which counts steps on the CPU."""
        for group in self.param_groups:
            if group["fused"] and not group["foreach"]:
                continue
            group.update(fused=True, foreach=None)
            for param in group["params"]:
                if self.state.get(param):
                    step = self.state[param]["step"]
                    self.state[param]["step"] = step.to(device=param.device, dtype=torch.float32)

    # ---- clipping ----

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of all parameters together to a norm, when the next step reads them.

        The `grad` of parameters stays unclipped. A factor holds for one step; `zero_grad` drops it. Gradients that are
        changed before the step are multiplied by it, too. If torch has to step, gradients are clipped at once.

        Args:
            max_norm: the largest 2-norm; infinity only computes the norm.

        Returns:
            The norm before clipping, a scalar on the device; nothing waits for it.
        """
        norm = self.clip_in_step(max_norm)
        if norm is not None:
            return norm
        params = [param for group in self.param_groups for param in group["params"]]
        return torch.nn.utils.clip_grad_norm_(params, max_norm)

    @torch.no_grad()
    def clip_in_step(
        self,
        max_norm: float,
        *,
        weight: Callable[[Tensor], float] | None = None,
        reduce: Callable[[Tensor], Any] | None = None,
    ) -> Tensor | None:
        """Like `clip_grad_norm_`, also for parameters that are sharded over several ranks.

        Args:
            weight: weight of a gradient's squares in the sum over all ranks, such as one over the number of ranks that
                have it. DTensors need it.
            reduce: function that sums a float32 scalar over the ranks, in place.

        Returns:
            The norm; `None` if torch has to clip and to step; then nothing was done.
        """
        self._factor = None
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if not params or not self._has_own_step():
            return None
        grads = [local_tensor(param.grad) for param in params]
        # addresses alone are not enough: gradients of other parameters may have the same addresses later
        key = weight, tuple((id(p), g.data_ptr(), g.numel(), g.dtype) for p, g in zip(params, grads, strict=True))
        table = _kept(self._norm_tables, key, lambda: self._norm_table(params, grads, weight))
        if table is None or not all(grad.is_contiguous() for grad in grads):
            return None
        squared = multi_tensor.sum_of_squares(table.addresses, table.weights, table.chunks)
        if reduce is not None:
            reduce(squared)
        norm = squared.sqrt()
        if max_norm != math.inf:
            self._factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._factor = None
        super().zero_grad(set_to_none)

    # ---- stepping ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients; clip if `clip_grad_norm_` was called since the last step.

        Args:
            closure: computes the loss and the gradients again.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stay_fused()
        factor, self._factor = self._factor, None
        if self._has_own_step() and self._step_at_once(factor):
            return loss
        if factor is not None:
            self._clip_now(factor)
        # not super().step(): torch wraps the step of each class that has an instance, and hooks would run twice
        inspect.unwrap(AdamW.step)(self)
        return loss

    def _has_own_step(self) -> bool:
        """Whether the kernels support the options. Tensors are checked elsewhere."""
        if multi_tensor is None or any(group["amsgrad"] or group["maximize"] for group in self.param_groups):
            return False
        if any(getattr(self, name, None) is not None for name in _OF_GRAD_SCALER):
            return False
        # a table copied during a capture would be copied again by replays, from memory that is no longer its own
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def _step_at_once(self, factor: Tensor | None) -> bool:
        """One step of all parameters with the kernels; `False` if they do not support them; then nothing was done."""
        rows: list[list[Tensor]] = [[], [], [], [], []]
        params, grads, exp_avgs, exp_avg_sqs, steps = rows
        sizes: list[int] = []
        for group in self.param_groups:
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
            sizes.append(len(params) - sum(sizes))
        if not params:
            return True
        rows = [[local_tensor(tensor) for tensor in row] for row in rows]
        key = tuple(sizes), tuple(tensor.data_ptr() for row in rows for tensor in row)
        table = _kept(self._step_tables, key, lambda: self._step_table(params, grads, rows, sizes))
        if table is None or not all(
            grad.dtype == param.dtype and grad.is_contiguous() for param, grad in zip(*rows[:2], strict=True)
        ):
            return False
        device = table.addresses.device
        if factor is None:
            factor = torch.ones((), dtype=torch.float32, device=device)
        multi_tensor.adamw_step(table.addresses, table.groups, self._options_on(device), table.chunks, factor)
        return True

    def _clip_now(self, factor: Tensor) -> None:
        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        foreach_mul_([local_tensor(grad) for grad in grads], factor)

    def _options_on(self, device: torch.device) -> Tensor:
        """float32[groups, 5]: learning rate, weight decay, betas and eps. They are copied when they change."""
        lrs = [group["lr"] for group in self.param_groups]
        on_device = {index: lr for index, lr in enumerate(lrs) if isinstance(lr, Tensor) and lr.device.type != "cpu"}
        numbers = [
            [
                0.0 if index in on_device else float(group["lr"]),
                float(group["weight_decay"]),
                *map(float, group["betas"]),
                float(group["eps"]),
            ]
            for index, group in enumerate(self.param_groups)
        ]
        if self._options is None or self._options[0] != numbers:
            self._options = numbers, multi_tensor.on_device(numbers, torch.float32, device)
        for index, lr in on_device.items():
            self._options[1][index, 0].copy_(lr.reshape(()))
        return self._options[1]

    # ---- where tensors are ----

    def _norm_table(
        self, params: list[Any], grads: list[Tensor], weight: Callable[[Tensor], float] | None
    ) -> _NormTable | None:
        """
        Args:
            params: the model's parameters.
            grads: local tensors.
        """
        if not self._takes([*map(local_tensor, params), *grads]):
            return None
        if weight is None and any(param.grad is not grad for param, grad in zip(params, grads, strict=True)):
            return None  # local tensors of DTensors
        weights = [1.0 if weight is None else weight(param.grad) for param in params]
        return _NormTable(
            multi_tensor.addresses_of([grads], grads[0].device),
            multi_tensor.on_device(weights, torch.float32, grads[0].device),
            self._chunks_of(grads, multi_tensor.NORM_CHUNK),
        )

    def _step_table(
        self, params: list[Tensor], grads: list[Tensor], rows: list[list[Tensor]], sizes: list[int]
    ) -> _StepTable | None:
        """
        Args:
            params, grads: the model's parameters and gradients.
            rows: local tensors of parameters, gradients, moments and steps.
            sizes: parameters of each group.
        """
        device = rows[0][0].device
        are_alike = all(len({tensor.dtype for tensor in tensors[:4]}) == 1 for tensors in zip(*rows, strict=True))
        if not are_alike or not self._takes([tensor for row in rows for tensor in row]):
            return None
        layouts = [[getattr(tensor, "placements", None) for tensor in tensors] for tensors in (params, grads)]
        if layouts[0] != layouts[1]:  # such as partial sums
            return None
        groups = [index for index, size in enumerate(sizes) for _ in range(size)]
        return _StepTable(
            multi_tensor.addresses_of(rows, device),
            multi_tensor.on_device(groups, torch.int32, device),
            self._chunks_of(rows[0], multi_tensor.STEP_CHUNK),
        )

    def _takes(self, tensors: Sequence[Tensor]) -> bool:
        device = tensors[0].device
        return device.type in self._device_types and all(
            tensor.device == device
            and tensor.dtype in multi_tensor.DTYPES
            and tensor.layout == torch.strided
            and tensor.is_contiguous()
            for tensor in tensors
        )

    def _chunks_of(self, tensors: Sequence[Tensor], chunk_numel: int) -> "multi_tensor.Chunks":
        key = chunk_numel, *((tensor.numel(), tensor.dtype, tensor.device) for tensor in tensors)
        return _kept(self._chunks, key, lambda: multi_tensor.cut_into_chunks(tensors, chunk_numel))


def _kept(cache: OrderedDict[K, V], key: K, make: Callable[[], V]) -> V:
    """The value for a key, made once as long as the key is among the last `_NUM_TABLES`."""
    if key not in cache:
        if len(cache) >= _NUM_TABLES:
            cache.popitem(last=False)
        cache[key] = make()
    cache.move_to_end(key)
    return cache[key]


__all__ = ["ClippedAdamW"]
