"""A recorder without a GPU that is as strict as a CUDA graph: it replays the operations that ran on the same tensors.

What a call took from Python, such as a length, stays as it was when it was recorded. A look at a number of a tensor
fails, as it would wait for the device. Before each replay all that the operations computed is full of NaN, as the
memory of a graph is used by others meanwhile.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class TapeRecorder:
    """A [`~hf_moe_ted.cuda_graphs.recorder.Recorder`].

    Args:
        errors: raised by the calls of `record`, in turn; `None` for none.

    Attributes:
        num_recorded, num_replayed: calls.
        num_forgotten: calls of `forget`.
    """

    def __init__(self, errors: list[Exception | None] | None = None):
        self.errors = errors or []
        self.num_recorded = self.num_replayed = self.num_forgotten = 0

    def eager(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        tape = _Tape()
        with tape:
            returned = call()
        tape.put_back()
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            tape.replay()

        return returned, replay

    def borrow(self, tensor: Tensor) -> Tensor:
        return tensor

    def forget(self) -> None:
        self.num_forgotten += 1


class _Tape(TorchDispatchMode):
    """Operations, and the memory that they change as it was before."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple, dict, list[Tensor] | None]] = []
        self._computed: set[int] = set()  # addresses of memory that is not there before
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _WAITS:
            raise RuntimeError(f"{function} waits for the device")
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(given)
        output = function(*args, **kwargs)
        if is_view:
            return output
        outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        changes = any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)
        if not changes:
            self._computed |= {leaf.untyped_storage().data_ptr() for leaf in outputs}
        self._operations.append((function, args, kwargs, None if changes else outputs))
        return output

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._computed and address not in self._before:
            self._before[address] = (storage, storage.clone())

    def put_back(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.inference_mode()  # in which everything can be written, whatever mode it was made in
    def replay(self) -> None:
        for *_, outputs in self._operations:
            for output in outputs or ():
                output.fill_(torch.nan if output.is_floating_point() else 1)
        for function, args, kwargs, outputs in self._operations:
            again = function(*args, **kwargs)
            computed = [leaf for leaf in pytree.tree_leaves(again) if isinstance(leaf, Tensor)]
            for output, value in zip(outputs or (), computed if outputs is not None else (), strict=True):
                output.copy_(value)
