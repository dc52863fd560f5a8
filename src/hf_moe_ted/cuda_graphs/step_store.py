"""Decide which steps are recorded, replayed, or run from Python, equally in all processes."""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils import logging

from .recorded_step import RecordedStep
from .recorder import Recorder

logger = logging.get_logger(__name__)

Signature = tuple[Any, ...]
WARMUP_STEPS = 3  # first steps of a signature, from Python: they create kernels, communicators and the like


class _Outcome(IntEnum):
    """Outcome of recording a step, the worst last."""

    RECORDED = 0
    OUT_OF_MEMORY = 1
    FAILED = 2


class StepStore:
    """Recorded steps by signature; if there are too many, the least recently used is dropped.

    The first three steps of a signature run from Python, and the fourth is recorded. All processes must make the same
    calls: a step is replayed only if all have the same signature, because a replayed step and a step from Python may
    run different collectives.

    Args:
        recorder: the recorder for the graphs.
        max_graphs: largest number of recorded steps.

    Attributes:
        counts: number of steps by kind: `"replayed"`, `"eager"`, `"captured"`, `"overflowed"`.
    """

    def __init__(self, recorder: Recorder, max_graphs: int):
        self.recorder = recorder
        self.max_graphs = max_graphs
        self.counts: Counter[str] = Counter()
        self._is_recording_over = False
        self._steps: OrderedDict[Signature, RecordedStep] = OrderedDict()
        self._num_seen: Counter[Signature] = Counter()
        # a group of hosts, so that the agreement does not wait for devices
        self._hosts = dist.new_group(backend="gloo") if _num_processes() > 1 else None

    def find(self, signature: Signature | None, record: Callable[[], RecordedStep]) -> RecordedStep | None:
        """The recorded step of a signature; `None` for a step that must run from Python.

        Args:
            signature: everything on which the step depends besides the contents of tensors; `None` if unknown.
            record: function that records a step of this signature.

        Raises:
            RuntimeError: recording failed on one of several processes; the others cannot continue alone. A single
                process continues from Python.
        """
        if not self._is_shared(signature) or signature is None:
            return None
        if signature in self._steps:
            self._steps.move_to_end(signature)
            return self._steps[signature]
        self._num_seen[signature] += 1
        if self._is_recording_over or self._num_seen[signature] <= WARMUP_STEPS:
            return None
        return self._record(signature, record)

    def clear(self) -> None:
        """Forget all recorded steps."""
        self._steps.clear()
        self._num_seen.clear()
        self._is_recording_over = False
        self.recorder.forget()

    def _record(self, signature: Signature, record: Callable[[], RecordedStep]) -> RecordedStep | None:
        while len(self._steps) >= self.max_graphs:
            oldest, _ = self._steps.popitem(last=False)
            del self._num_seen[oldest]
        outcome = _Outcome.RECORDED
        step: RecordedStep | None = None
        error: Exception | None = None
        try:
            step = record()
        except torch.OutOfMemoryError as raised:
            outcome, error = _Outcome.OUT_OF_MEMORY, raised
        except Exception as raised:
            outcome, error = _Outcome.FAILED, raised
        worst = _Outcome(self._largest(int(outcome)))
        if worst is not _Outcome.RECORDED:
            self._stop_recording(signature, worst, error)
            return None
        assert step is not None
        self.counts["captured"] += 1
        self._steps[signature] = step
        return step

    def _stop_recording(self, signature: Signature, outcome: _Outcome, error: Exception | None) -> None:
        what = f"cuda_graphs: a training step of {_described(signature)}"
        if outcome is _Outcome.FAILED and self._hosts is not None:
            raise RuntimeError(
                f"{what} could not be captured"
                + (", on another process" if error is None else f": {error}")
                + "; set cuda_graphs=False, or take out what waits for the device"
            ) from error
        why = (
            f"could not be captured: {error}"
            if outcome is _Outcome.FAILED
            else "needs more memory to be captured than the device has; use fewer tokens per batch or activation "
            "checkpointing"
        )
        self._is_recording_over = True
        logger.warning(
            f"{what} {why}. From now on, steps of the {len(self._steps)} captured signatures are replayed, and all "
            "others run from Python."
        )

    def _is_shared(self, signature: Signature | None) -> bool:
        """Whether all processes have this signature."""
        if self._hosts is None:
            return True
        number = (
            0 if signature is None else int.from_bytes(hashlib.sha256(repr(signature).encode()).digest()[:7], "big")
        )
        extremes = torch.tensor([number, -number])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._hosts)
        return bool(extremes[0] == -extremes[1])

    def _largest(self, number: int) -> int:
        if self._hosts is None:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._hosts)
        return int(largest)


def signature_of(inputs: dict[str, Any]) -> Signature | None:
    """Names, shapes and dtypes of tensors, and other plain values; `None` if there is something else."""
    fields: list[Any] = []
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            fields.append((name, tuple(value.shape), str(value.dtype)))
        elif value is None or isinstance(value, bool | int | float | str):
            fields.append((name, value))
        else:
            return None
    return tuple(fields)


def _described(signature: Signature) -> str:
    """The tensors among the inputs of a signature, as text."""
    tensors = [field for field in signature[0] if len(field) == 3] if signature else []
    return ", ".join(f"{name} {list(shape)}" for name, shape, _ in tensors) or "this signature"


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


__all__ = ["WARMUP_STEPS", "Signature", "StepStore", "signature_of"]
