"""Random numbers of a sharded model: equal within a tensor-parallel group, different across data-parallel ranks."""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup


class RandomState:
    """Seeds the generators before each forward and each generation, and puts back what they were behind it.

    Dropout, router noise, random token selection and sampled words must agree between ranks that share a batch, or
    their replicated parameters or sentences drift apart without a sign; `set_seed(device_specific=True)` and the like
    make them differ. So the seed of a forward is a function of the base seed, which is rank 0's at the first forward,
    the number of the forward, and the data-parallel rank. That of a generation is drawn from the generator of the first
    rank of each tensor-parallel group, so that `set_seed` before it has the usual effect.

    A forward that is captured in a CUDA graph is left alone: seeds cannot change in it. Replays draw from the device's
    generator as it then is, and ranks that share a batch need the same state of it (`torch.cuda.manual_seed`).

    Attributes:
        num_forwards: forwards so far, but for those of generations.
        base_seed: `None` before the first.
    """

    def __init__(self, data_parallel_rank: int, tensor_parallel_group: ProcessGroup | None = None):
        self.data_parallel_rank = data_parallel_rank
        self.tensor_parallel_group = tensor_parallel_group
        self.num_forwards = 0
        self.base_seed: int | None = None
        self._saved: list[Any] = []
        self._is_generating = False

    def state_dict(self) -> dict[str, Any]:
        return {"num_forwards": self.num_forwards, "base_seed": self.base_seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_forwards, self.base_seed = state["num_forwards"], state["base_seed"]

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._is_generating or _is_capturing():
            return
        if self.base_seed is None:
            self.base_seed = _of_first_rank(torch.initial_seed(), None)
        self._saved.append(_generator_states())
        _seed_generators(self.base_seed, self.num_forwards, self.data_parallel_rank)
        self.num_forwards += 1

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._saved and not (self._is_generating or _is_capturing()):
            _restore_generators(self._saved.pop())

    @contextlib.contextmanager
    def during_generation(self) -> Iterator[None]:
        seed = _of_first_rank(int(torch.randint(2**62, ())), self.tensor_parallel_group)
        states = _generator_states()
        _seed_generators(seed, self.data_parallel_rank)
        self._is_generating = True
        try:
            yield
        finally:
            self._is_generating = False
            _restore_generators(states)


def synchronize_random_state(
    model: nn.Module, data_parallel_rank: int, tensor_parallel_group: ProcessGroup
) -> RandomState:
    """Attach a [`RandomState`] to a model, as `model.ted_random_state`; once."""
    model_: Any = model
    existing = model_.__dict__.get("ted_random_state")
    if existing is not None:
        return existing
    state = RandomState(data_parallel_rank, tensor_parallel_group)
    model_.ted_random_state = state
    # before FSDP's hooks or behind, they draw nothing; an error inside forward must restore the generators, too
    model.register_forward_pre_hook(state.before_forward, with_kwargs=True)
    model.register_forward_hook(state.after_forward, always_call=True)
    if hasattr(model, "generate"):
        generate = model_.generate

        @functools.wraps(generate)
        def with_shared_seeds(*args: Any, **kwargs: Any) -> Any:
            with state.during_generation():
                return generate(*args, **kwargs)

        model_.generate = with_shared_seeds
    return state


def saved_random_state(model: nn.Module) -> dict[str, Any]:
    """For a checkpoint: the state of a model's [`RandomState`], nothing if it has none."""
    state = getattr(model, "ted_random_state", None)
    return {} if state is None else {"random_state": state.state_dict()}


def load_random_state(model: nn.Module, saved: dict[str, Any]) -> None:
    """Continue with what [`saved_random_state`] gave, if model and checkpoint have one."""
    state = getattr(model, "ted_random_state", None)
    if state is not None and "random_state" in saved:
        state.load_state_dict(saved["random_state"])


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _of_first_rank(seed: int, group: ProcessGroup | None) -> int:
    """The seed of the first rank of a group, or of the job."""
    shared = [seed]
    dist.broadcast_object_list(shared, group=group, group_src=0)
    return shared[0]


def _seed_generators(*parts: int) -> None:
    digest = hashlib.sha256("-".join(map(str, parts)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def _generator_states() -> tuple[torch.Tensor, torch.Tensor | None]:
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), on_device


def _restore_generators(states: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])


__all__ = ["RandomState", "load_random_state", "saved_random_state", "synchronize_random_state"]
