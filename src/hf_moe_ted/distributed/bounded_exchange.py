"""A step in which no host waits for the routing: exchanges of tokens whose size follows from shapes."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .expert_load import EXPERT_LOAD_BOUND, ExpertLoadOverflow
from .expert_parallel import TedExpertParallel, expert_modules


@contextlib.contextmanager
def bounded_expert_load(model: nn.Module, bound: float = EXPERT_LOAD_BOUND) -> Iterator[ExpertLoadOverflow]:
    """Exchange tokens in as many rows as shapes say, in forwards and backwards of the body.

    Each rank sends up to `bound` times the balanced load to each rank; where the experts have a capacity and rows up to
    it are fewer, it sends those, which is always enough. With `pad_expert_input_to_capacity` the capacity decides. A
    model whose ranks exchange no tokens runs as ever. All ranks enter with batches of one shape. What is captured in
    a CUDA graph goes into the body with the context, so that each replay starts with nothing noted.

    Args:
        model: maybe sharded by TED.
        bound: at least 1, the balanced load; `expert_parallel_size` is always enough.

    Yields:
        What tells, on all ranks alike, whether the bound was enough. If not, outputs and gradients lack tokens: put
        the step back ([`StepSnapshot`]) and run it again outside.

    Raises:
        ValueError: a bound below 1; experts that others bring tokens to (`ep_implementation`), or that move themselves
            (`least_loaded_experts`); a bound inside a bound.

    Example:

    ```python
    >>> snapshot = StepSnapshot.take(model)
    >>> with bounded_expert_load(model) as overflow:
    ...     model(**batch).loss.backward()
    ...     is_incomplete = overflow.any_rank()  # a collective, for which no host waits
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
            "least_loaded_experts (True) does not go with bounded_expert_load: which rows go where follows from the "
            "routing, which the host has to read; load the model with least_loaded_experts=False"
        )
    for exchange in exchanges:
        exchange.overflow = overflow
    try:
        yield overflow
    finally:
        for exchange in exchanges:
            exchange.overflow = None


def reads_sizes(model: nn.Module) -> bool:
    """Whether hosts wait for the routing in each forward of a model, as it is now: no CUDA graph can capture that.

    Raises:
        ValueError: experts that others bring tokens to (`ep_implementation`), of which that is not known.
    """
    return any(exchange.reads_sizes() for exchange in _exchanges(model))


def _exchanges(model: nn.Module) -> list[TedExpertParallel]:
    found = []
    for experts in expert_modules(model):
        exchange: Any = getattr(experts, "ted_exchange", None)
        if exchange is None:
            raise ValueError(
                f"{type(experts).__name__} gets its tokens from another ep_implementation than 'ted', which has no "
                "bound: load the model with a TedPlugin's distributed_config as it is"
            )
        found.append(exchange)
    return found


__all__ = ["bounded_expert_load", "reads_sizes"]
