"""Device memory for some experts, and modules that compute with its content.

A slot holds the tensors of one expert. Slots of experts with the same tensors are in one pool, so a part of the pool is
a stack of experts, [slots, ...]. Modules that hold all of their experts have such stacks, too, so they compute
unchanged with slots instead of experts.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[str, int]  # layer and expert


class Region:
    """Slots `start` to `start + size` of a pool, and their content.

    Attributes:
        slot_of: key -> its slot.
        readers: slot -> stream -> event after the last computation that reads the slot; on GPUs only.
        ready: event after the last copy to the region; on GPUs only.
    """

    def __init__(self, start: int, size: int):
        self.start, self.size = start, size
        self.slot_of: dict[Key, int] = {}
        self.readers: dict[int, dict[int, torch.cuda.Event]] = {}
        self.ready: torch.cuda.Event | None = None
        self._used: dict[Key, int] = {}  # the most recently used are last

    def touch(self, keys: Iterable[Key]) -> None:
        """Record that the keys are used now."""
        for key in keys:
            self._used[key] = self._used.pop(key)

    def make_room(self, new: Sequence[Key], keep: Iterable[Key]) -> list[int]:
        """Slots for new keys: unused ones first, then those of the least recently used keys that may be dropped.

        Args:
            new: keys that are not here; together with `keep` at most `size`.
            keep: keys that must stay.
        """
        kept = set(keep)
        taken = set(self.slot_of.values())
        free = [slot for slot in range(self.start, self.start + self.size) if slot not in taken]
        old = [key for key in self._used if key not in kept]
        while len(free) < len(new):
            free.append(self.slot_of.pop(old[0]))
            del self._used[old.pop(0)]
        slots = free[: len(new)]
        for key, slot in zip(new, slots, strict=True):
            self.slot_of[key] = slot
            self._used[key] = slot
        return slots

    def forget(self, keys: Iterable[Key] | None = None) -> None:
        """Remove keys; by default all."""
        for key in list(self.slot_of) if keys is None else keys:
            self.slot_of.pop(key, None)
            self._used.pop(key, None)


class SlotPool:
    """Slots of experts with the same tensors.

    Args:
        experts: a module of these experts on the meta device; its parameters are stacks [E, ...].
        num_slots: number of slots.
        device: device of the pool.
    """

    def __init__(self, experts: nn.Module, num_slots: int, device: torch.device):
        self.num_slots = num_slots
        self.tensors = {
            name: torch.empty((num_slots, *stack.shape[1:]), dtype=stack.dtype, device=device)
            for name, stack in experts.named_parameters()
        }
        self._windows: dict[tuple[int, int], Any] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def at(self, slot: int) -> dict[str, Tensor]:
        """The tensors of a slot by name. After changing them, call `changed`."""
        return {name: tensor[slot] for name, tensor in self.tensors.items()}

    def changed(self, slots: Iterable[int]) -> None:
        """Drop data that was derived from the slots' old content."""
        for (start, num_rows), window in self._windows.items():
            forget_packed = getattr(window, "forget_packed", None)
            if forget_packed is not None:
                forget_packed([slot - start for slot in slots if 0 <= slot - start < num_rows])

    def window(self, region: Region, experts: Any) -> tuple[int, Any]:
        """A module whose weights are slots, with as many experts as a layer has; returns its first slot and the module.

        It has that number if the pool is large enough, because kernels choose tiles by the number of experts.

        Args:
            region: the region in the window; not larger than the layer.
            experts: experts of the layer, on the meta device.
        """
        num_rows = min(experts.num_experts, self.num_slots)
        start = min(region.start, self.num_slots - num_rows)
        window = self._windows.get((start, num_rows))
        if window is None:
            stacks = {name: tensor[start : start + num_rows] for name, tensor in self.tensors.items()}
            window = self._windows[start, num_rows] = with_weights(experts, stacks)
        return start, window


def with_weights(experts: Any, stacks: Mapping[str, Tensor], config: Any = None) -> Any:
    """A module like another one with the same config, but with other weights: stacks [E, ...], which are not copied."""
    others: Any = copy.deepcopy(experts, {id(experts.config): config or experts.config})
    for name, stack in stacks.items():
        setattr(others, name, nn.Parameter(stack, requires_grad=False))
        others.num_experts = len(stack)
    return others.eval()


__all__ = ["Key", "Region", "SlotPool", "with_weights"]
