"""Plan how many experts of each layer the device keeps, and which it loads first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..models.layer_names import side_of

# An expert of the decoder may be needed for every token of a translation, an expert of the encoder once per batch.
DECODER_WEIGHT = 16.0
_STAGE_SHARE = 16  # share of the slots for each of the two groups of experts in transit


@dataclass(frozen=True)
class LayerSize:
    """
    Attributes:
        num_experts: number of experts of the layer.
        slot_bytes: bytes on the device per expert.
        kind: equal for layers whose experts have the same tensors and share memory.
    """

    num_experts: int
    slot_bytes: int
    kind: int


@dataclass(frozen=True)
class ResidencePlan:
    """
    Attributes:
        num_slots: name of each MoE layer -> number of experts that are kept.
        first: name of each MoE layer -> experts that are loaded at the start, at most that number.
        stage_slots: kind of layer -> experts in each of the two groups that pass through; 0 if all experts are kept.
    """

    num_slots: dict[str, int]
    first: dict[str, list[int]]
    stage_slots: dict[int, int]


def plan_residence(
    layers: Mapping[str, LayerSize], max_bytes: int, importance: Mapping[str, Tensor] | None
) -> ResidencePlan:
    """Keep as many experts as fit in memory, the most used first.

    Args:
        layers: layers by name.
        max_bytes: most bytes of all experts on the device.
        importance: name of each layer -> float[E], the share of the layer's tokens that each expert computes; `None` if
            unknown; then layers of the decoder get all their experts before layers of the encoder get any.

    Raises:
        ValueError: two experts of each kind do not fit.
    """
    total = sum(layer.num_experts * layer.slot_bytes for layer in layers.values())
    if total <= max_bytes:
        everything = {name: list(range(layer.num_experts)) for name, layer in layers.items()}
        counts = {name: layer.num_experts for name, layer in layers.items()}
        return ResidencePlan(counts, everything, dict.fromkeys((layer.kind for layer in layers.values()), 0))
    stage_slots = _stage_slots(layers, max_bytes, total)
    bytes_of_kind = {layer.kind: layer.slot_bytes for layer in layers.values()}
    free = max_bytes - sum(2 * count * bytes_of_kind[kind] for kind, count in stage_slots.items())
    if free < 0:
        least = sum(2 * num_bytes for num_bytes in bytes_of_kind.values())
        raise ValueError(
            f"expert_memory ({max_bytes:,} bytes) is too small: experts need at least {least:,} bytes, two of each "
            f"size, and all of them {total:,}"
        )
    first: dict[str, list[int]] = {name: [] for name in layers}
    for name, expert in _by_worth(layers, importance):
        if layers[name].slot_bytes <= free:
            free -= layers[name].slot_bytes
            first[name].append(expert)
    num_slots = {name: len(experts) for name, experts in first.items()}
    if importance is None:  # texts decide which experts, unless all fit
        first = {name: e if len(e) == layers[name].num_experts else [] for name, e in first.items()}
    return ResidencePlan(num_slots, first, stage_slots)


def _stage_slots(layers: Mapping[str, LayerSize], max_bytes: int, total: int) -> dict[int, int]:
    """A part of the slots that the kind would have if memory were shared evenly; at least one."""
    counts: dict[int, int] = {}
    largest: dict[int, int] = {}
    for layer in layers.values():
        counts[layer.kind] = counts.get(layer.kind, 0) + layer.num_experts
        largest[layer.kind] = max(largest.get(layer.kind, 0), layer.num_experts)
    return {
        kind: max(1, min(largest[kind], int(count * max_bytes / total) // _STAGE_SHARE))
        for kind, count in counts.items()
    }


def _by_worth(layers: Mapping[str, LayerSize], importance: Mapping[str, Tensor] | None) -> Sequence[tuple[str, int]]:
    """All experts, ordered by how many copies it saves to keep them."""
    worth: list[tuple[float, int, str]] = []
    for name, layer in layers.items():
        weight = DECODER_WEIGHT if side_of(name) == "decoder" else 1.0
        shares = [1.0] * layer.num_experts if importance is None else importance[name].tolist()
        worth += [(-weight * share, expert, name) for expert, share in enumerate(shares)]
    return [(name, expert) for _, expert, name in sorted(worth)]


__all__ = ["LayerSize", "ResidencePlan", "plan_residence"]
