"""Save and restore what a training step changes before its optimizer: random numbers and gradients."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .private_torch import fsdp_group, fsdp_parameters, local_of
from .random_state import RandomState, all_generator_states, set_all_generator_states


class StepSnapshot:
    """The state at the start of a forward and backward, to run them again with the same random numbers.

    Parameters do not change until the optimizer steps. Other counters of forwards (hooks, callbacks) count twice.

    Example: see [`bounded_expert_load`].
    """

    def __init__(self, model: nn.Module, gradients: dict[tuple[int, str], Tensor]):
        self._model = model
        self._gradients = gradients
        self._generators = all_generator_states()
        self._random_state = _random_state(model)
        self._forwards = None if self._random_state is None else self._random_state.state_dict()

    @classmethod
    def take(cls, model: nn.Module, *, keep_gradients: bool = False) -> "StepSnapshot":
        """
        Args:
            model: a model, sharded or not, between a backward and a forward.
            keep_gradients: whether to copy the gradients of the accumulation so far, which takes their memory once
                more. Otherwise `restore` leaves the model without gradients, as before a first micro-batch.
        """
        copies: dict[tuple[int, str], Tensor] = {}
        for owner, name in _places_of_gradients(model) if keep_gradients else ():
            gradient = getattr(owner, name)
            if gradient is not None:
                copies[id(owner), name] = gradient.detach().clone()
        return cls(model, copies)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the generators of this process, the seeds of the model's forwards, and its gradients.

        Kept gradients are written into the current gradients, so addresses do not change.
        """
        set_all_generator_states(self._generators)
        if self._random_state is not None and self._forwards is not None:
            self._random_state.load_state_dict(self._forwards)
        for owner, name in _places_of_gradients(self._model):
            kept, present = self._gradients.get((id(owner), name)), getattr(owner, name)
            if kept is None or present is None:
                setattr(owner, name, None if kept is None else kept.clone())
            else:
                local_of(present)[0].copy_(local_of(kept)[0])


def _random_state(model: nn.Module) -> RandomState | None:
    return getattr(model, "ted_random_state", None)


def _places_of_gradients(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Objects, with the names of their attributes, that hold a gradient or `None`.

    If an accumulation is reduced at its end, FSDP2 keeps its whole gradients beside the parameters, in the dtype of the
    reduction or another. Gradients that are not yet summed over replicas are in one piece. While FSDP2 has gathered
    parameters, the module does not have the sharded ones.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    managed = {id(parameter.sharded): parameter for module in modules for parameter in fsdp_parameters(module)}
    holders = [holder for parameter in managed.values() for holder in (parameter.sharded, parameter.whole)]
    for holder in {id(holder): holder for holder in (*holders, *model.parameters())}.values():
        if holder is not None:
            yield holder, "grad"
    for parameter in managed.values():
        yield parameter.state, "unsharded_accumulated_grad"
    for group in filter(None, map(fsdp_group, modules)):
        yield group, "_partial_reduce_output"


__all__ = ["StepSnapshot"]
