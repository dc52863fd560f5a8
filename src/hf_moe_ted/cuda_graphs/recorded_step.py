"""Forward and backward of one batch shape, recorded once and replayed for each batch of this shape."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .private_torch import foreach_add_
from .recorder import Recorder

# (inputs, number of items) -> the loss, and a flag on the device if the step may turn out to be invalid
Step = Callable[[dict[str, Any], Any], tuple[Tensor, Tensor | None]]


class RecordedStep:
    """A training step without the optimizer, in fixed memory.

    While it runs, it does not add to the gradients of the parameters. So a step needs no earlier gradients, and a step
    that turns out to be invalid has changed nothing.

    Args:
        recorder: the recorder for the graphs.
        step: the function that computes the gradients of the parameters.
        parameters: parameters that may get gradients.
        inputs: a batch; its tensors are copied.
        num_items: number of labels in the optimizer step: a tensor, which is copied, or another value, which is fixed.

    Attributes:
        loss: loss of the last replay.
        is_invalid: flag of the last replay, bool scalar on the device; `None` for a step that is always valid.
    """

    def __init__(
        self, recorder: Recorder, step: Step, parameters: list[nn.Parameter], inputs: dict[str, Any], num_items: Any
    ):
        self._parameters = parameters
        self._inputs = {name: _copy(value) for name, value in inputs.items()}
        self._num_items = _copy(num_items)

        def call() -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
            before = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
            try:
                # a step may remove entries from its inputs
                loss, is_invalid = step(dict(self._inputs), self._num_items)
                return loss, is_invalid, [parameter.grad for parameter in parameters]
            finally:
                for parameter, grad in zip(parameters, before, strict=True):
                    parameter.grad = grad

        (self.loss, self.is_invalid, gradients), self._replay = recorder.record(call)
        # borrowed, because otherwise each graph would keep the gradients of a whole model
        self._gradients = [None if grad is None else recorder.borrow(grad) for grad in gradients]

    def replay(self, inputs: dict[str, Any], num_items: Any) -> None:
        """Compute loss and gradients of another batch of the same shape."""
        for name, value in self._inputs.items():
            if isinstance(value, Tensor):
                value.copy_(inputs[name], non_blocking=True)
        if isinstance(self._num_items, Tensor):
            self._num_items.copy_(num_items, non_blocking=True)
        self._replay()

    @torch.no_grad()
    def hand_over(self, *, is_last: bool) -> None:
        """Give the parameters the gradients of the last replay, or add these to their gradients.

        Args:
            is_last: whether the optimizer is next, so that the gradients can stay in the memory of the replay.
        """
        sums, terms = [], []
        for parameter, grad in zip(self._parameters, self._gradients, strict=True):
            if grad is None:
                continue
            if parameter.grad is None:
                parameter.grad = grad if is_last else grad.clone()
            else:
                sums.append(_local(parameter.grad))
                terms.append(_local(grad))
        if sums:
            foreach_add_(sums, terms)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


__all__ = ["RecordedStep", "Step"]
