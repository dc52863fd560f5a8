"""How similarly the routers of a model treat languages.

Shape letters: L languages, E experts.
"""

import torch
from torch import Tensor

from ..models.configuration_zcode_m3 import Side
from ..models.layer_names import SIDES, side_of
from .expert_statistics import ExpertStatistics


def routed_shares(statistics: ExpertStatistics, layer: str) -> Tensor:
    """float64[L, E], the share of each language's (token, choice) slots that goes to each expert of a layer.

    Languages are in the order of `statistics.languages` for the side of the layer: source languages for the encoder,
    target languages for the decoder.
    """
    num_routed = statistics.layers[layer].num_routed.sum(dim=1).double()
    rows = [num_routed[pairs].sum(dim=0) for pairs in statistics.languages(side_of(layer)).values()]
    counts_LE = torch.stack(rows)
    return counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)


def routing_similarity(statistics: ExpertStatistics, side: Side) -> Tensor | None:
    """float64[L, L], how much of two languages' tokens goes to the same experts, from 0 to 1.

    It is the overlap of their shares, `sum(min(share, other_share))`, as a mean over the MoE layers of the side: 1 for
    equal shares, 0 if no expert has tokens of both. `None` for a side without MoE layers.
    """
    overlaps = [
        torch.minimum(shares_LE.unsqueeze(0), shares_LE.unsqueeze(1)).sum(dim=-1)
        for shares_LE in (routed_shares(statistics, layer) for layer in statistics.layers if side_of(layer) == side)
    ]
    return torch.stack(overlaps).mean(dim=0) if overlaps else None


def nearest_languages(statistics: ExpertStatistics) -> dict[str, dict[str, tuple[str, float]]]:
    """`"encoder"` and `"decoder"` -> language -> the most similar other language, with its `routing_similarity`."""
    nearest: dict[str, dict[str, tuple[str, float]]] = {}
    for side in SIDES:
        similarity_LL = routing_similarity(statistics, side)
        languages = list(statistics.languages(side))
        if similarity_LL is None or len(languages) < 2:
            continue
        highest_L, index_L = similarity_LL.fill_diagonal_(-1).max(dim=1)
        nearest[side] = {
            language: (languages[index], value)
            for language, index, value in zip(languages, index_L.tolist(), highest_L.tolist(), strict=True)
        }
    return nearest


__all__ = ["nearest_languages", "routed_shares", "routing_similarity"]
