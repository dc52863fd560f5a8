"""What a pruning did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .compression_report import CompressionReport
from .expert_statistics import SIDES, ExpertStatistics, side_of


@dataclass(frozen=True, kw_only=True)
class PruningReport(CompressionReport):
    """What a pruning was asked for and what came of it.

    Attributes:
        num_experts_before, num_experts_after: name of each MoE layer -> its experts.
        kept_experts: name of each MoE layer -> ids of the experts it keeps.
        dense_layers: names of the layers that have one expert left and are dense now.
        routed_share_kept: `"encoder"` -> source language, and `"decoder"` -> target language -> the share of the
            language's routed (token, expert) slots, over all MoE layers of the side, whose expert is kept; empty
            without statistics.
    """

    operation: ClassVar[str] = "prune_experts"

    num_experts_before: dict[str, int]
    num_experts_after: dict[str, int]
    kept_experts: dict[str, list[int]]
    dense_layers: tuple[str, ...]
    routed_share_kept: dict[str, dict[str, float]]

    def lines(self) -> list[str]:
        lines = [
            f"{self.source}: {sum(self.num_experts_after.values()):,} of {sum(self.num_experts_before.values()):,} "
            "experts kept",
            *super().lines(),
            "experts of the MoE layers: " + ", ".join(map(str, self.num_experts_after.values())),
        ]
        for side, shares in self.routed_share_kept.items():
            shown = ", ".join(
                f"{language} {share:.1%}" for language, share in sorted(shares.items(), key=lambda x: x[1])
            )
            lines.append(f"routed tokens whose expert is kept, {side}: {shown}")
        return lines


def routed_share_kept(
    statistics: ExpertStatistics | None, kept_experts: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, float]]:
    """See [`PruningReport`]."""
    if statistics is None:
        return {}
    shares: dict[str, dict[str, float]] = {}
    for side in SIDES:
        layers = [layer for layer in kept_experts if side_of(layer) == side]
        for language, pairs in statistics.languages(side).items() if layers else ():
            num_routed = {layer: statistics.layers[layer].num_routed[pairs].sum(dim=(0, 1)) for layer in layers}
            kept = sum(num_routed[layer][list(kept_experts[layer])].sum().item() for layer in layers)
            shares.setdefault(side, {})[language] = kept / sum(routed.sum().item() for routed in num_routed.values())
    return shares


__all__ = ["PruningReport", "routed_share_kept"]
