"""Random numbers of a sharded model: equal within a tensor-parallel group, different across data-parallel ranks."""

import contextlib
import functools
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup


class RandomState:
    """Seeds the generators before each forward and each generation, and restores them afterwards.

    Dropout, router noise, random token selection and sampled words must agree between ranks that share a batch.
    Otherwise their replicated parameters or sentences silently diverge; `set_seed(device_specific=True)`, for example,
    makes them differ. So the seed of a forward is a function of the base seed (rank 0's seed at the first forward), the
    number of the forward, and the data-parallel rank. The seed of a generation is drawn from the generator of the first
    rank of each tensor-parallel group, so `set_seed` before it has the usual effect.

    A forward that is captured in a CUDA graph is not seeded, because seeds cannot change in a graph. Replays draw from
    the device's current generator; `around_replay` seeds that as for a forward.

    Attributes:
        num_forwards: number of forwards so far, without those of generations.
        base_seed: `None` before the first forward.
    """

    def __init__(self, data_parallel_rank: int, tensor_parallel_group: ProcessGroup | None = None):
        self.data_parallel_rank = data_parallel_rank
        self.tensor_parallel_group = tensor_parallel_group
        self.num_forwards = 0
        self.base_seed: int | None = None
        self._saved: list[Any] = []
        self._is_left_alone = False

    def state_dict(self) -> dict[str, Any]:
        return {"num_forwards": self.num_forwards, "base_seed": self.base_seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_forwards, self.base_seed = state["num_forwards"], state["base_seed"]

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not (self._is_left_alone or is_capturing()):
            self._begin()

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._saved and not (self._is_left_alone or is_capturing()):
            _restore_generators(self._saved.pop())

    @contextlib.contextmanager
    def leave_alone(self) -> Iterator[None]:
        """Context for forwards that other code seeds."""
        before, self._is_left_alone = self._is_left_alone, True
        try:
            yield
        finally:
            self._is_left_alone = before

    @contextlib.contextmanager
    def around_replay(self) -> Iterator[None]:
        """Context for the replay of a captured forward: it draws what the next forward from Python would draw."""
        self._begin()
        try:
            with self.leave_alone():
                yield
        finally:
            _restore_generators(self._saved.pop())

    def take_back_forward(self) -> None:
        """Make the next forward draw what the last one drew, to run that one again."""
        self.num_forwards -= 1

    def _begin(self) -> None:
        if self.base_seed is None:
            self.base_seed = _of_first_rank(torch.initial_seed(), None)
        self._saved.append(_generator_states())
        seed_generators(self.base_seed, self.num_forwards, self.data_parallel_rank)
        self.num_forwards += 1

    @contextlib.contextmanager
    def during_generation(self) -> Iterator[None]:
        seed = _of_first_rank(int(torch.randint(2**62, ())), self.tensor_parallel_group)
        states = _generator_states()
        seed_generators(seed, self.data_parallel_rank)
        try:
            with self.leave_alone():
                yield
        finally:
            _restore_generators(states)


def synchronize_random_state(
    model: nn.Module, data_parallel_rank: int, tensor_parallel_group: ProcessGroup
) -> RandomState:
    """Attach a [`RandomState`] to a model as `model.ted_random_state`, once."""
    model_: Any = model
    existing = model_.__dict__.get("ted_random_state")
    if existing is not None:
        return existing
    state = RandomState(data_parallel_rank, tensor_parallel_group)
    model_.ted_random_state = state
    # the order with FSDP's hooks does not matter, as they draw nothing; an error inside forward must restore the
    # generators, too
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
    """A model's [`RandomState`] and the generators of its data-parallel ranks, for a checkpoint. All ranks call it.

    Returns:
        The same on all ranks: `"generators"`, the states of Python's, NumPy's and torch's generators of the first rank
        of each tensor-parallel group, in the order of the data-parallel ranks, and `"random_state"`, if the model has
        one.
    """
    state = getattr(model, "ted_random_state", None)
    by_process = [(_data_parallel_rank(model), all_generator_states())]
    if dist.is_initialized():
        own, by_process = by_process[0], by_process * dist.get_world_size()
        dist.all_gather_object(by_process, own)
    by_rank = dict(reversed(by_process))
    saved: dict[str, Any] = {"generators": [by_rank[rank] for rank in sorted(by_rank)]}
    return saved if state is None else {**saved, "random_state": state.state_dict()}


def load_random_state(model: nn.Module, saved: dict[str, Any]) -> None:
    """Continue with the [`RandomState`] from [`saved_random_state`], if model and checkpoint have one."""
    state = getattr(model, "ted_random_state", None)
    if state is not None and "random_state" in saved:
        state.load_state_dict(saved["random_state"])


def load_generators(model: nn.Module, saved: dict[str, Any]) -> None:
    """Set the generators of this process to the saved states of its data-parallel rank. All ranks call it.

    Random numbers of a collator or a sampler must agree between ranks that share a batch in the current layout. If
    there are more data-parallel ranks than were saved, the others get one of the saved states; all have the same state
    when training starts. If a checkpoint has no generators, such as one of an earlier version, ranks that share a batch
    get the state of the first of them.

    Args:
        model: gives the data-parallel rank; for a model that is not sharded it is the rank of the process.
        saved: what [`saved_random_state`] returned, in this layout or another.
    """
    states = saved.get("generators")
    if states:
        set_all_generator_states(states[_data_parallel_rank(model) % len(states)])
        return
    state = getattr(model, "ted_random_state", None)
    if state is not None and state.tensor_parallel_group is not None:
        set_all_generator_states(_of_first_rank(all_generator_states(), state.tensor_parallel_group))


def is_capturing() -> bool:
    """Whether a CUDA graph captures the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _of_first_rank(value: Any, group: ProcessGroup | None) -> Any:
    """The value of the first rank of a group, or of the job."""
    shared = [value]
    dist.broadcast_object_list(shared, group=group, group_src=0)
    return shared[0]


def _data_parallel_rank(model: nn.Module) -> int:
    state = getattr(model, "ted_random_state", None)
    if state is not None:
        return int(state.data_parallel_rank)
    return dist.get_rank() if dist.is_initialized() else 0


def all_generator_states() -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch: numbers, strings, tensors, and tuples of them."""
    algorithm, keys, *rest = np.random.get_state()
    on_cpu, on_device = _generator_states()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "cpu": on_cpu,
        "cuda": on_device,
    }


def set_all_generator_states(states: dict[str, Any]) -> None:
    """Restore the generators to states from [`all_generator_states`]."""
    random.setstate(states["python"])
    algorithm, keys, *rest = states["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))
    has_device = states["cuda"] is not None and torch.cuda.is_available()
    _restore_generators((states["cpu"], states["cuda"] if has_device else None))


def seed_generators(*parts: int) -> None:
    """Seed torch's generators on all devices with a hash of numbers."""
    digest = hashlib.sha256("-".join(map(str, parts)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def _generator_states() -> tuple[torch.Tensor, torch.Tensor | None]:
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), on_device


def _restore_generators(states: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])


__all__ = [
    "RandomState",
    "all_generator_states",
    "is_capturing",
    "load_generators",
    "load_random_state",
    "saved_random_state",
    "seed_generators",
    "set_all_generator_states",
    "synchronize_random_state",
]
