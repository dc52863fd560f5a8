"""How many experts each layer keeps, and which."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from accelerate.utils import convert_file_size_to_int
from torch import Tensor

from ..models.layer_names import side_of
from .expert_selection import ExpertSelection

KeptExperts = dict[str, list[int]]
"""Name of each MoE layer -> ids of the experts that it keeps, ascending."""


@dataclass(frozen=True)
class PruningPlan:
    """Chooses the experts to keep by their importance.

    Attributes:
        importance: name of each MoE layer -> float64[E] with a sum of 1, the encoder's layers first.
        selection: how many are kept.
        num_bytes: size of the weights of the pruned model.
    """

    importance: Mapping[str, Tensor]
    selection: ExpertSelection
    num_bytes: Callable[[KeptExperts], int]

    def choose(self) -> KeptExperts:
        """Raises: ValueError: `keep` leaves fewer experts than `min_experts`, or asks for more than there are; there is
        a ratio, but the model has MoE layers on one side only.
        """
        keep, ratio = self.selection.keep, self.selection.encoder_decoder_ratio
        if ratio is not None and len({side_of(layer) for layer in self.importance}) < 2:
            raise ValueError(
                f"encoder_decoder_ratio ({ratio}) needs MoE layers in the encoder and in the decoder; leave it out"
            )
        if isinstance(keep, str):
            return self._largest_within(keep)
        counts = self._counts(keep)
        if problem := self._problem(counts):
            raise ValueError(f"keep ({keep}) {problem}")
        return self._most_important(counts)

    def _largest_within(self, size: str) -> KeptExperts:
        try:
            max_bytes = convert_file_size_to_int(size.strip())
        except ValueError:
            raise ValueError(f"keep ({size!r}) is not a size; write it like '8GB' or '500MB'") from None
        num_all = sum(map(len, self.importance.values()))
        num_bytes: float = math.inf
        for num_kept in range(num_all, 0, -1):
            counts = self._counts(num_kept / num_all)
            if self._problem(counts):
                continue
            kept = self._most_important(counts)
            num_bytes = self.num_bytes(kept)
            if num_bytes <= max_bytes:
                return kept
        raise ValueError(
            f"keep ({size!r}) is less than the {num_bytes:,} bytes of the smallest model with min_experts "
            f"({self.selection.min_experts}); keep more, or convert the model to a smaller dtype first"
        )

    def _counts(self, keep: float | int) -> dict[tuple[str, ...], int]:
        """Number of experts that each group of layers keeps. Each layer is its own group unless layers compete."""
        layers = tuple(self.importance)
        num_all = {layer: len(self.importance[layer]) for layer in layers}
        total = keep * (sum(num_all.values()) if isinstance(keep, float) else len(layers))
        totals = {layers: total}
        if self.selection.encoder_decoder_ratio is not None:
            encoder = tuple(layer for layer in layers if side_of(layer) == "encoder")
            decoder = layers[len(encoder) :]
            decoder_mean = total / (len(encoder) * self.selection.encoder_decoder_ratio + len(decoder))
            totals = {decoder: len(decoder) * decoder_mean, encoder: total - len(decoder) * decoder_mean}
        if self.selection.per_layer == "adaptive":
            return {group: _rounded(total) for group, total in totals.items()}
        counts: dict[tuple[str, ...], int] = {}
        for group, total in totals.items():
            num_in_group = sum(num_all[layer] for layer in group)
            for layer in group:
                share = num_all[layer] / num_in_group if isinstance(keep, float) else 1 / len(group)
                counts[(layer,)] = _rounded(total * share)
        return counts

    def _floor(self, layer: str) -> int:
        return min(self.selection.min_experts, len(self.importance[layer]))

    def _problem(self, counts: Mapping[tuple[str, ...], int]) -> str:
        """A message that says what is wrong with the counts; empty if they are right."""
        for group, count in counts.items():
            where = group[0] if len(group) == 1 else f"{len(group)} layers ({group[0]} to {group[-1]})"
            num_all = sum(len(self.importance[layer]) for layer in group)
            if count == 0:
                return f"rounds to zero of the {num_all} experts of {where}; keep more"
            if count < sum(map(self._floor, group)):
                return (
                    f"leaves {count} of the {num_all} experts of {where}, fewer than min_experts "
                    f"({self.selection.min_experts}) in each layer; keep more"
                )
            if count > num_all:
                return f"asks for {count} experts of {where}, which has {num_all}; keep fewer" + (
                    "" if self.selection.encoder_decoder_ratio is None else " or change encoder_decoder_ratio"
                )
        return ""

    def _most_important(self, counts: Mapping[tuple[str, ...], int]) -> KeptExperts:
        """The most important experts of each group, with at least `min_experts` of each layer."""
        kept: KeptExperts = {layer: [] for layer in self.importance}
        for group, count in counts.items():
            others: list[tuple[float, str, int]] = []
            for layer in group:
                importance = self.importance[layer].tolist()
                in_order = sorted(range(len(importance)), key=lambda expert: -importance[expert])
                kept[layer] = in_order[: self._floor(layer)]
                others += [(-importance[expert], layer, expert) for expert in in_order[self._floor(layer) :]]
            others.sort(key=lambda other: other[0])
            for _, layer, expert in others[: count - sum(map(self._floor, group))]:
                kept[layer].append(expert)
        return {layer: sorted(experts) for layer, experts in kept.items()}


def _rounded(number: float) -> int:
    return math.floor(number + 0.5)


__all__ = ["KeptExperts", "PruningPlan"]
