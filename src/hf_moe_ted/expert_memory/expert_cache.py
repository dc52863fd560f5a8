"""A cache of experts: the device holds some of them; others are copied when needed.

Shape letters: T tokens, K experts per token, E experts, D model width.
"""

import copy
import itertools
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layer_names import side_of
from .expert_sources import ExpertsInMemory, ExpertSource
from .memory_statistics import ExpertMemoryStatistics
from .residence_plan import ResidencePlan
from .slots import Key, Region, SlotPool, with_weights


@dataclass
class _Layer:
    """A layer's experts.

    Attributes:
        name: name of the MoE layer.
        experts: a module on the meta device.
        pool: memory that has the region and the stage.
        region: slots whose experts stay between calls.
        stage: two regions through which other experts pass.
        next: the next MoE layer of the encoder; its experts are copied while the layers between compute.
        passed: experts that passed through the stage in the last call.
        table: int64[E + 1], the row of each expert in the window of the region, if all are in it.
        in_memory: a module on the CPU with all experts.
    """

    name: str
    experts: Any
    pool: SlotPool
    region: Region
    stage: list[Region]
    next: "_Layer | None" = None
    passed: list[int] = field(default_factory=list)
    table: Tensor | None = None
    in_memory: Any = None

    @property
    def is_whole(self) -> bool:
        """Whether all experts are on the device permanently."""
        return len(self.region.slot_of) == self.experts.num_experts


class ExpertCache:
    """The experts of one model: some are on its device, and all are in main memory or files.

    A layer has its own slots, which keep the experts that were used last. If a call needs more experts than slots, the
    others pass through group by group: while one group computes, the next is copied.

    Wherever experts are, each (token, expert) slot of a call is computed by the same functions as in a model with all
    experts on the device, with the same number of slots at once. The slots of a token are added up in their order.

    A lock allows one thread at a time in a layer. On GPUs, a copy to a slot waits for computations that read it.

    Args:
        folder: folder of the model, for messages.
        experts: name of each MoE layer -> module of its experts, on the meta device.
        kinds: name of each MoE layer -> a number; layers with the same number share a pool.
        plan: number of experts of each layer that are kept.
        source: the source of all experts.
        device: device on which the model computes.
        max_cpu_slots: calls with at most so many (token, expert) slots compute missing experts on the CPU.
    """

    def __init__(
        self,
        folder: Path,
        experts: Mapping[str, nn.Module],
        kinds: Mapping[str, int],
        plan: ResidencePlan,
        source: ExpertSource,
        device: torch.device,
        max_cpu_slots: int = 0,
    ):
        self.folder, self.device = folder, device
        self._source, self._max_cpu_slots = source, max_cpu_slots
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # no copy may still run into freed memory
            weakref.finalize(self, self._stream.synchronize).atexit = False
        self._layers = _layers(experts, kinds, plan, device)
        self._pools = list({id(layer.pool): layer.pool for layer in self._layers.values()}.values())
        self._counts = dict.fromkeys(_COUNTERS, 0)
        self._wait_s = 0.0
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if self._stream is not None:  # earlier work on the memory of the pools may still run
            self._stream.wait_stream(torch.cuda.current_stream(device))
        for name, first in plan.first.items():
            layer = self._layers[name]
            self._bring(layer, layer.region, first, keep=())
        if self._stream is not None:
            self._stream.synchronize()
        self.reset_statistics()

    def forward(self, name: str, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Compute the experts of an MoE layer; see [`ZCodeM3Experts`]."""
        with self._lock:
            layer = self._layers[name]
            self._counts["num_calls"] += 1
            if layer.is_whole:
                self._counts["num_calls_all_resident"] += 1
                return self._compute_whole(layer, hidden_TD, ids_TK, weights_TK)
            if self._stream is not None and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{name} cannot be captured in a CUDA graph: not all of its experts are on the device; run it step "
                    "by step, or give more expert_memory"
                )
            unique = ids_TK.cpu().unique().tolist()  # waits for the device
            needed = [expert for expert in unique if expert < layer.experts.num_experts]
            if not needed:
                return torch.zeros_like(hidden_TD)
            output = self._compute_some(layer, needed, hidden_TD, ids_TK, weights_TK)
            if layer.next is not None:
                self._prefetch(layer.next)
            return output

    def statistics(self) -> ExpertMemoryStatistics:
        """The statistics so far; it waits for the device."""
        with self._lock:
            for before, after in self._waits:
                after.synchronize()
                self._wait_s += before.elapsed_time(after) / 1000
            self._waits.clear()
            num_bytes = sum(pool.num_bytes for pool in self._pools)
            return ExpertMemoryStatistics(**self._counts, wait_s=self._wait_s, num_bytes_resident=num_bytes)

    def reset_statistics(self) -> None:
        """Reset the counts."""
        with self._lock:
            self._counts = dict.fromkeys(_COUNTERS, 0)
            self._wait_s = 0.0
            self._waits.clear()

    def residents(self) -> dict[str, list[int]]:
        """Name of each MoE layer -> its experts in slots of the device, ascending."""
        with self._lock:
            return {name: sorted(expert for _, expert in layer.region.slot_of) for name, layer in self._layers.items()}

    def refuse(self, what: str) -> None:
        """
        Raises:
            ValueError: always; `what` is not possible with experts that are not all in the model.
        """
        raise ValueError(
            f"{what} is not possible with expert_memory, because the model does not hold its experts; use the folder "
            f"{self.folder}, or load the model without expert_memory"
        )

    def __deepcopy__(self, memo: Any) -> Any:
        self.refuse("a copy of the model")

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.refuse("pickling the model")

    def _compute_whole(self, layer: _Layer, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        _, window = layer.pool.window(layer.region, layer.experts)
        self._wait_for(layer.region)
        if layer.table is None:
            layer.table = self._table(layer, layer.region, range(layer.experts.num_experts))
        return window(hidden_TD, layer.table[ids_TK], weights_TK)

    def _compute_some(
        self, layer: _Layer, needed: list[int], hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        here = [expert for expert in needed if (layer.name, expert) in layer.region.slot_of]
        missing = [expert for expert in needed if (layer.name, expert) not in layer.region.slot_of]
        layer.region.touch((layer.name, expert) for expert in here)
        self._counts["num_hits"] += len(here)
        if missing and layer.in_memory is None and self._computes_on_cpu(ids_TK):
            self._put_in_memory(layer)
        if missing and layer.in_memory is not None and self._computes_on_cpu(ids_TK):
            self._counts["num_on_cpu"] += len(missing)
            return self._compute_with_cpu(layer, here, missing, hidden_TD, ids_TK, weights_TK)
        missing.sort(key=lambda expert: any((layer.name, expert) in stage.slot_of for stage in layer.stage))
        num_new = min(len(missing), layer.region.size - len(here))
        new, passing = missing[:num_new], missing[num_new:]
        self._counts["num_misses"] += len(missing)
        self._bring(layer, layer.region, new, keep=here)
        layer.passed = passing
        if not passing:
            return self._compute(layer, layer.region, needed, hidden_TD, ids_TK, weights_TK)
        outputs = _BySlot(hidden_TD, ids_TK, weights_TK, layer.experts)
        self._pass_through(layer, here + new, passing, outputs)
        return outputs.sum()

    def _pass_through(self, layer: _Layer, resident: list[int], passing: list[int], outputs: "_BySlot") -> None:
        """Compute experts in the region, and all others through the two stages in turns."""
        loaded: dict[int, list[int]] = {}
        for turn, stage in enumerate(layer.stage):
            if prefetched := [expert for expert in passing if (layer.name, expert) in stage.slot_of]:
                loaded[turn] = prefetched
                passing = [expert for expert in passing if expert not in prefetched]
                self._counts["num_prefetched"] += len(prefetched)
                self._counts["num_hits"] += len(prefetched)
                self._counts["num_misses"] -= len(prefetched)
        size = layer.stage[0].size
        groups = [passing[start : start + size] for start in range(0, len(passing), size)]
        self._counts["num_streamed"] += len(passing)

        def load(turn: int) -> None:
            if groups:
                loaded[turn] = groups.pop(0)
                self._stage(layer, layer.stage[turn], loaded[turn])

        for turn in range(len(layer.stage)):
            if turn not in loaded:
                load(turn)
        if resident:
            outputs.add(self._compute(layer, layer.region, resident, *outputs.inputs))
        turn = 0
        while loaded:
            if turn in loaded:
                outputs.add(self._compute(layer, layer.stage[turn], loaded.pop(turn), *outputs.inputs))
                load(turn)
            turn = (turn + 1) % len(layer.stage)

    def _compute(
        self, layer: _Layer, region: Region, experts: Sequence[int], hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """Compute experts in a region; zeros for slots of other experts."""
        _, window = layer.pool.window(region, layer.experts)
        self._wait_for(region)
        output = window(hidden, self._table(layer, region, experts)[ids], weights)
        if self._stream is not None:
            stream, is_read = torch.cuda.current_stream(self.device), torch.cuda.Event()
            is_read.record(stream)
            for expert in experts:
                region.readers.setdefault(region.slot_of[layer.name, expert], {})[stream.cuda_stream] = is_read
        return output

    def _table(self, layer: _Layer, region: Region, experts: Sequence[int]) -> Tensor:
        """int64[E + 1], the row of each expert in the window of the region; others get the row of no expert."""
        start, window = layer.pool.window(region, layer.experts)
        rows = torch.full((layer.experts.num_experts + 1,), window.num_experts)
        for expert in experts:
            rows[expert] = region.slot_of[layer.name, expert] - start
        return rows.to(self.device)

    def _prefetch(self, layer: _Layer) -> None:
        """Copy experts that passed through a layer in its last call, as far as there is room, while others compute."""
        passing = [expert for expert in layer.passed if (layer.name, expert) not in layer.region.slot_of]
        for stage in layer.stage:
            group, passing = passing[: stage.size], passing[stage.size :]
            if group:
                self._stage(layer, stage, group)

    def _stage(self, layer: _Layer, stage: Region, experts: Sequence[int]) -> None:
        stage.forget()
        self._bring(layer, stage, experts, keep=())

    def _bring(self, layer: _Layer, region: Region, experts: Sequence[int], keep: Sequence[int]) -> None:
        """Copy experts to a region that has none of them, all at once; on a GPU in parallel with the computation."""
        if not experts:
            return
        keys: list[Key] = [(layer.name, expert) for expert in experts]
        slots = region.make_room(keys, [(layer.name, expert) for expert in keep])
        start_s = time.perf_counter()
        try:
            with torch.cuda.stream(self._stream):
                if self._stream is not None:
                    readers = [event for slot in slots for event in region.readers.pop(slot, {}).values()]
                    for event in {id(event): event for event in readers}.values():
                        self._stream.wait_event(event)
                self._source.announce(layer.name, experts)
                for expert, slot in zip(experts, slots, strict=True):
                    outs = layer.pool.at(slot)
                    self._source.put(layer.name, expert, outs)
                    self._counts["num_bytes_copied"] += sum(out.nbytes for out in outs.values())
                if self._stream is not None:
                    region.ready = torch.cuda.Event()
                    region.ready.record(self._stream)
        except BaseException:
            region.forget(keys)
            raise
        finally:
            layer.pool.changed(slots)
        if self._stream is None:
            self._wait_s += time.perf_counter() - start_s

    def _wait_for(self, region: Region) -> None:
        """Make the computation wait for running copies to a region."""
        if region.ready is not None and region.ready.query():
            region.ready = None  # CUDA graphs cannot query this
        if region.ready is None:
            return
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self.device)
        before.record(stream)
        stream.wait_event(region.ready)
        after.record(stream)
        self._waits.append((before, after))
        while len(self._waits) > _MAX_WAITS and self._waits[0][1].query():
            before, after = self._waits.pop(0)
            self._wait_s += before.elapsed_time(after) / 1000

    def _computes_on_cpu(self, ids_TK: Tensor) -> bool:
        return self._stream is not None and ids_TK.numel() <= self._max_cpu_slots

    def _put_in_memory(self, layer: _Layer) -> None:
        if isinstance(self._source, ExpertsInMemory):
            config = copy.copy(layer.experts.config)
            config._experts_implementation = "zcode_cpu"
            layer.in_memory = with_weights(layer.experts, self._source.layers[layer.name].tensors, config)

    def _compute_with_cpu(
        self,
        layer: _Layer,
        here: list[int],
        missing: list[int],
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        """Compute resident experts on the device and, at the same time, missing ones on the CPU."""
        outputs = _BySlot(hidden_TD, ids_TK, weights_TK, layer.experts)
        hidden, ids, weights = (tensor.cpu() for tensor in outputs.inputs)
        if here:
            outputs.add(self._compute(layer, layer.region, here, *outputs.inputs))
        num_experts = layer.experts.num_experts
        rows = torch.full((num_experts + 1,), num_experts)
        for expert in missing:
            rows[expert] = expert
        outputs.add(layer.in_memory(hidden, rows[ids], weights).to(self.device))
        return outputs.sum()


_MAX_WAITS = 1000
_COUNTERS = (
    "num_calls",
    "num_calls_all_resident",
    "num_hits",
    "num_misses",
    "num_streamed",
    "num_prefetched",
    "num_on_cpu",
    "num_bytes_copied",
)


class _BySlot:
    """Outputs of the (token, expert) slots of a call; each slot is its own token, and some experts compute at a time.

    Attributes:
        inputs: hidden states [T * K, D], experts [T * K, 1] and weights [T * K, 1].
    """

    def __init__(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: Any):
        self._top_k, self._dtype = ids_TK.shape[1], hidden_TD.dtype
        hidden = hidden_TD if self._top_k == 1 else hidden_TD.repeat_interleave(self._top_k, dim=0)
        if hidden.device.type == "cpu" and getattr(experts, "sums_in_float32", False):
            hidden = hidden.float()  # else outputs would be rounded before they are added up
        self.inputs = hidden, ids_TK.reshape(-1, 1), weights_TK.reshape(-1, 1)
        self._outputs = torch.zeros_like(hidden)

    def add(self, outputs: Tensor) -> None:
        """Add the outputs of some experts; each slot is nonzero for only one expert."""
        self._outputs += outputs

    def sum(self) -> Tensor:
        """float[T, D]."""
        if self._top_k == 1:
            return self._outputs.to(self._dtype)
        return self._outputs.unflatten(0, (-1, self._top_k)).sum(dim=1).to(self._dtype)


def _layers(
    experts: Mapping[str, nn.Module], kinds: Mapping[str, int], plan: ResidencePlan, device: torch.device
) -> dict[str, _Layer]:
    """Each layer's part of its kind's pool; the stages of the kind come after all of these."""
    layers: dict[str, _Layer] = {}
    for kind, stage_slots in plan.stage_slots.items():
        names = [name for name in experts if kinds[name] == kind]
        num_kept = sum(plan.num_slots[name] for name in names)
        pool = SlotPool(experts[names[0]], num_kept + 2 * stage_slots, device)
        stage = [Region(num_kept, stage_slots), Region(num_kept + stage_slots, stage_slots)] if stage_slots else []
        start = 0
        for name in names:
            layers[name] = _Layer(name, experts[name], pool, Region(start, plan.num_slots[name]), stage)
            start += plan.num_slots[name]
    encoder = [layers[name] for name in experts if side_of(name) == "encoder"]
    if device.type == "cuda":
        for layer, following in itertools.pairwise(encoder):
            layer.next = following
    return {name: layers[name] for name in experts}


__all__ = ["ExpertCache"]
