"""Exchange tokens in sizes that depend on shapes only, so that no host waits for the routing in a step."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .expert_load import EXPERT_LOAD_BOUND, ExpertLoadOverflow
from .expert_parallel import TedExpertParallel, expert_modules


@contextlib.contextmanager
def bounded_expert_load(model: nn.Module, bound: float = EXPERT_LOAD_BOUND) -> Iterator[ExpertLoadOverflow]:
    """In forwards and backwards inside this context, the number of exchanged rows depends on shapes only.

    Each rank sends up to `bound` times the balanced load to each rank. If the experts have a capacity and rows up to it
    are fewer, it sends those; that is always enough. With `pad_expert_input_to_capacity` the capacity decides. A model
    whose ranks exchange no tokens runs as usual. All ranks must have batches of one shape. To capture a CUDA graph,
    capture the context together with its body, so that each replay starts with an empty record.

    Args:
        model: a model, sharded by TED or not.
        bound: at least 1, which is the balanced load; `expert_parallel_size` is always enough.

    Yields:
        An object that tells all ranks whether the bound was enough. If not, outputs and gradients lack tokens: undo the
        step ([`StepSnapshot`]) and run it again outside of the context.

    Raises:
        ValueError: a bound below 1; experts with another `ep_implementation`, or that move between ranks
            (`least_loaded_experts`); the context is used inside itself.

    Example:

    ```python
    >>> snapshot = StepSnapshot.take(model)
    >>> with bounded_expert_load(model) as overflow: ... model(**batch).loss.backward() ... is_incomplete =
    overflow.any_rank() # a collective; no host waits for it
    >>> if is_incomplete:
    ...     snapshot.restore()
    ...     model(**batch).loss.backward()
    ```
    """
    overflow = ExpertLoadOverflow(bound)
    exchanges = _exchanges(model)
    if any(exchange.overflow is not None for exchange in exchanges):
        raise ValueError("bounded_expert_load inside bounded_expert_load: leave the outer one first")
    if not all(exchange.can_be_bounded for exchange in exchanges):
        raise ValueError(
            "least_loaded_experts (True) does not work with bounded_expert_load: the host must read the routing to "
            "know where rows go; load the model with least_loaded_experts=False"
        )
    for exchange in exchanges:
        exchange.overflow = overflow
    try:
        yield overflow
    finally:
        for exchange in exchanges:
            exchange.overflow = None


def reads_sizes(model: nn.Module) -> bool:
    """Whether hosts wait for the routing in each forward, with the model's current settings.

    Raises:
        ValueError: experts have another `ep_implementation`, for which this is unknown.
    """
    return any(exchange.reads_sizes() for exchange in _exchanges(model))


def _exchanges(model: nn.Module) -> list[TedExpertParallel]:
    found = []
    for experts in expert_modules(model):
        exchange: Any = getattr(experts, "ted_exchange", None)
        if exchange is None:
            raise ValueError(
                f"{type(experts).__name__} has another ep_implementation than 'ted', which has no bound: load the "
                "model with a TedPlugin's unchanged distributed_config"
            )
        found.append(exchange)
    return found


__all__ = ["bounded_expert_load", "reads_sizes"]
