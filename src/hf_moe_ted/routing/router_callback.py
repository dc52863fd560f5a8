"""Base class of callbacks that watch routers during training."""

import re
from typing import Any, NamedTuple, TypeVar, cast

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.layer_names import FFN_PATTERN
from ..models.router import ZCodeM3Router, modules_in_use

_Callback = TypeVar("_Callback", bound="RouterCallback")
_ROUTER = re.compile(rf"{FFN_PATTERN}\.router$")
_WRAPPER = re.compile(
    r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)  # wrapper that PyTorch puts around layers


class WatchedRouter(NamedTuple):
    """A router in a model.

    Attributes:
        module: the module that the layer calls: the router, or its replacement by PEFT. Both return the same kind of
            output.
        num_experts: number of experts of the router.
    """

    module: nn.Module
    num_experts: int


def sparse_routers(model: nn.Module) -> dict[str, WatchedRouter]:
    """The routers of a model by layer, `encoder.3`; the model may be wrapped, and PEFT may train the routers.

    Raises:
        ValueError: the model has no sparse layer.
    """
    routers = {}
    for name, module in modules_in_use(model):
        found = _ROUTER.search(_WRAPPER.sub("", name))
        inner = next((part for part in module.modules() if isinstance(part, ZCodeM3Router)), None) if found else None
        if found and inner is not None:
            routers[f"{found[1]}.{found[2]}"] = WatchedRouter(module, cast(int, inner.num_experts))
    if not routers:
        raise ValueError(f"{type(model).__name__} has no sparse layer with a router to watch; leave the callback out")
    return routers


class RouterCallback(TrainerCallback):
    """Keeps hooks on the modules of a model during a training."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def add_to(self: _Callback, trainer: Trainer) -> _Callback:
        """Make this the first callback of a trainer, so that every reporter gets its numbers."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def watch(self, model: nn.Module, args: TrainingArguments) -> list[Any]:
        """Reset, and put hooks on a model; return their handles."""
        raise NotImplementedError

    def numbers(self) -> dict[str, Any]:
        """The numbers to log since the last time; all processes call it."""
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Raises:
            ValueError: the model has no sparse layer.
        """
        self._remove_hooks()
        self._handles = self.watch(kwargs["model"], args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove_hooks()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to a training log; other logs, such as of evaluation, stay. Lists go to the history."""
        if logs is None or "loss" not in logs:
            return
        numbers = self.numbers()
        logs.update({name: value for name, value in numbers.items() if not isinstance(value, list)})
        state.log_history[-1].update(numbers)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


__all__ = ["RouterCallback", "WatchedRouter", "sparse_routers"]
