"""CUDA graphs of a model, kept between calls. The least recently used is dropped, and all if weights change."""

import contextlib
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .beam_search import OPTIONS_OF_BATCHES, has_hooks
from .field_of_config import are_set_on

try:
    from hf_moe_ted.cuda_graphs.recorder import CudaRecorder
except ImportError:  # remote code without the package
    CudaRecorder = None  # type: ignore[assignment, misc]

logger = logging.get_logger(__name__)

T = TypeVar("T")

MAX_GRAPHS = 64
MAX_FAILURES = 3  # a capture fails if another thread waits for the device or loads a kernel
_PLAIN = {bool, int, float, str}
_record = threading.Lock()  # one capture at a time in a process


class GraphStore:
    """Recorded calls by key, and the memory on which they work.

    The first call with a key runs from Python, which makes everything that is made once, such as kernels. The second
    call is recorded, and later calls are replayed.

    Args:
        recorder: a [`~hf_moe_ted.cuda_graphs.recorder.Recorder`].
        signature: everything besides the key on which calls depend.

    Attributes:
        lock: hold it from before a call until its results were read.
        memories: memory that calls read and write, by its key.
        num_recorded: number of calls that were recorded so far.
        num_failures: kind of call -> number of failed recordings.
        refusals: kinds of calls that are no longer recorded -> reason.
    """

    def __init__(self, recorder: Any, signature: Hashable):
        self.recorder = recorder
        self.signature = signature
        self.lock = threading.RLock()
        self.memories: OrderedDict[Hashable, Any] = OrderedDict()
        self.num_recorded = 0
        self.num_failures: Counter[str] = Counter()
        self.refusals: dict[str, str] = {}
        self._graphs: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self._seen: set[Hashable] = set()

    def __deepcopy__(self, memo: Any) -> None:
        """Copies of a call's options, such as those of an assistant model, do not share the store of a model."""
        return None

    def run(self, key: Hashable, call: Callable[[], None]) -> None:
        """Make a call that returns nothing and reads and writes memory with fixed addresses."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            self._graphs[key]()
        elif key not in self._seen:
            self._seen.add(key)
            call()
        else:
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            with _record:
                _, replay = self.recorder.record(call)
            self.num_recorded += 1
            self._graphs[key] = replay
            replay()

    def forget(self, memory: Hashable = None) -> None:
        """Free a memory and the graphs whose keys begin with its name, or free all."""
        for key in [key for key in self._graphs if memory is None or key[0] == memory]:  # type: ignore[index]
            del self._graphs[key]
        if memory is None:
            self.memories.clear()
            self._seen.clear()
            self.recorder.forget()
        else:
            self.memories.pop(memory, None)


_stores: "weakref.WeakKeyDictionary[nn.Module, GraphStore]" = weakref.WeakKeyDictionary()
_stores_lock = threading.Lock()


def store_of(model: Any) -> "GraphStore | str":
    """The store of a model; a new one if its weights, its config or its way to compute changed.

    It is not part of the model: copies and saved files do not have it.

    Returns:
        The store; or a string that says what of the model cannot be recorded.
    """
    modules = [*model.model.encoder.modules(), *model.model.decoder.modules(), model.lm_head]
    parameters, buffers = (_tensors_of(modules, name) for name in ("_parameters", "_buffers"))
    if (reason := _why_not(modules, parameters, buffers)) is not None:
        return reason
    config, dtypes = vars(model.config).items(), _dtypes_of(parameters)
    signature = (
        tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in (*parameters, *buffers)),
        dtypes.pop(),  # all layers, or there is no store
        tuple((name, value) for name, value in config if isinstance(value, bool | int | float | str | None)),
        # an option set on a layer comes before its config
        tuple(
            value
            for module in modules
            if "config" in vars(module)
            for value in vars(module).values()
            if type(value) in _PLAIN
        ),
        torch.backends.cuda.matmul.fp32_precision,
    )
    with _stores_lock:
        store = _stores.get(model)
        if store is None or store.signature != signature:
            if store is not None:
                with store.lock:  # the store is not in use
                    store.forget()
            with on_device(parameters[0].device):
                store = _stores[model] = GraphStore(new_recorder(), signature)
        return store


def _tensors_of(modules: list[nn.Module], name: str) -> list[Tensor]:
    # `parameters()` would take milliseconds
    return [tensor for module in modules for tensor in getattr(module, name).values() if tensor is not None]


def _why_not(modules: list[nn.Module], parameters: list[Tensor], buffers: list[Tensor]) -> str | None:
    """Why a model cannot be recorded: it has parts that cannot be recorded, or that may change unnoticed."""
    device = parameters[0].device
    reasons = {
        "the package hf_moe_ted, which is not installed": CudaRecorder is None,
        "autocast": torch.is_autocast_enabled(device.type),
        "gradients": torch.is_grad_enabled(),
        "training mode of a part": any(module.training for module in modules),
        "layers of another package": not all(
            _is_plain(kind) or hasattr(kind, "can_be_captured") for kind in {type(module) for module in modules}
        ),
        "experts that wait for the device": not all(getattr(module, "can_be_captured", True) for module in modules),
        "hooks of the model": any(has_hooks(m) or "_hf_hook" in vars(m) or "forward" in vars(m) for m in modules),
        "options of one layer": are_set_on(modules, *OPTIONS_OF_BATCHES),
        "compiled parts": any(getattr(module, "_compiled_call_impl", None) is not None for module in modules),
        "weights that are no plain tensors": not {type(t) for t in (*parameters, *buffers)} <= {Tensor, nn.Parameter},
        "weights of several devices": {tensor.device for tensor in (*parameters, *buffers)} != {device},
        "weights of several dtypes": len(_dtypes_of(parameters)) > 1,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _dtypes_of(tensors: list[Tensor]) -> set[torch.dtype]:
    """Floating-point dtypes only; quantized experts also have integers."""
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _is_plain(kind: type) -> bool:
    """Whether a module's behaviour follows from its weights and the model's config alone."""
    package = kind.__module__.rpartition(".")[0]
    return package == __package__ or package.startswith("torch.nn") or kind.__module__ == "transformers.activations"


def forget_store(model: Any) -> None:
    """Drop everything that was kept for a model, for example after NaN in its keys."""
    with _stores_lock:
        store = _stores.pop(model, None)
    if store is not None:
        with store.lock:
            store.forget()


def recorded(store: GraphStore, kind: str, work: Callable[[], T]) -> T | None:
    """Run work that makes calls of a store, alone and on the stream of its recorder; return its result.

    Args:
        kind: name of the work, for messages.

    Returns:
        The result; `None` if the memory of the device is too small or a recording failed. The next call tries again.
        After `MAX_FAILURES` failures it warns once and stops trying.
    """
    if kind in store.refusals:
        logger.debug("%s: not recorded, because of %s", kind, store.refusals[kind])
        return None
    with store.lock, store.recorder.eager():
        try:
            return work()
        except torch.OutOfMemoryError as error:
            reason = f"the memory of the device is too small for it ({error})"
            is_over = True
        except RuntimeError as error:
            reason = f"it cannot be recorded ({error})"
            store.num_failures[kind] += 1
            if is_over := store.num_failures[kind] >= MAX_FAILURES:
                store.refusals[kind] = reason
        store.forget()
    if is_over:
        logger.warning_once(f"the {kind} is not captured as a CUDA graph and runs from Python: {reason}")
    else:
        logger.debug("%s: runs from Python this time, because %s", kind, reason)
    return None


def new_recorder() -> Any:
    """A recorder for the current device."""
    return CudaRecorder()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which a device is the current one, if it is a CUDA device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def rung(number: int, least: int = 1) -> int:
    """The least power of two, or three quarters of one, that is at least the number and a multiple of `least`."""
    whole = power_of_two(number, least)
    part = whole // 4 * 3
    return part if part >= number and part % least == 0 else whole


def power_of_two(number: int, least: int = 1) -> int:
    """The least power of two that is at least the number and at least `least`, itself a power of two."""
    return max(least, 1 << (number - 1).bit_length())


__all__ = [
    "MAX_GRAPHS",
    "GraphStore",
    "forget_store",
    "new_recorder",
    "on_device",
    "power_of_two",
    "recorded",
    "rung",
    "store_of",
]
