"""Which experts matter, and for which languages: pure functions of expert statistics."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..files.named_seed import named_seed
from ..models.configuration_zcode_m3 import Side
from ..models.language_codes import LanguagePair, find_language, unknown_languages
from ..models.layer_names import SIDES, side_of
from ..routing.expert_statistics import ExpertStatistics, LayerStatistics
from .expert_selection import Criterion, ExpertSelection


def utilization(statistics: LayerStatistics) -> Tensor:
    """Tokens that each expert computes, as any choice (Z-code M3, https://huggingface.co/papers/2109.10465)."""
    return statistics.num_computed.sum(dim=0).double()


def activity_confidence(statistics: LayerStatistics) -> Tensor:
    """Share of the tokens whose first choice is the expert, times `exp` of its mean probability for these tokens.

    Source: "Memory-efficient NLLB-200" (https://huggingface.co/papers/2212.09811).
    """
    first = statistics.num_routed[:, 0].sum(dim=0).double()
    mean_confidence = statistics.confidence.sum(dim=0) / first.clamp(min=1)
    return first / first.sum().clamp(min=1) * mean_confidence.exp()


def reap(statistics: LayerStatistics) -> Tensor:
    """Mean, over the tokens that the expert computes, of its weight times the norm of its output; 0 without tokens.

    REAP (https://huggingface.co/papers/2510.13999). The weight is the one that the layer uses: normalized over a
    token's experts if `normalize_router_weights` says so.
    """
    return statistics.gated_norm.sum(dim=0) / statistics.num_computed.sum(dim=0).clamp(min=1)


CRITERIA: dict[str, Criterion] = {
    "utilization": utilization,
    "activity_confidence": activity_confidence,
    "reap": reap,
}


def random_importance(num_experts: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Importance that is drawn uniformly at random: name of each layer -> float64[E] with a sum of 1.

    The numbers of a layer depend on the seed, its name and its number of experts.
    """
    importance = {}
    for layer, count in num_experts.items():
        generator = torch.Generator().manual_seed(named_seed(seed, layer))
        numbers = torch.rand(count, generator=generator, dtype=torch.float64)
        importance[layer] = numbers / numbers.sum()
    return importance


def expert_importance(statistics: ExpertStatistics, selection: ExpertSelection) -> dict[str, Tensor]:
    """Importance of the experts of each layer for a set of languages.

    The language pairs are put into groups. The criterion's numbers for each group are divided by their sum over the
    layer's experts. The importance is the mean over the groups:

    | scope | groups | effect |
    |---|---|---|
    | `"global"` | one of all pairs | a language counts by its number of tokens |
    | `"language_pair"` | one per pair | all pairs count the same |
    | `"language"` | in the encoder per source language, in the decoder per target language | all languages count the
    same |

    Returns:
        name of each MoE layer -> float64[E] with a sum of 1.

    Raises:
        ValueError: an unknown criterion; a language or pair without statistics; a function that does not return one
            finite, non-negative number per expert.
    """
    criterion = selection.criterion
    if isinstance(criterion, str) and criterion not in CRITERIA:
        raise ValueError(f"criterion ({criterion!r}) must be 'random', a function, or one of {sorted(CRITERIA)}")
    function = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    groups = {side: _groups(statistics, side, selection) for side in SIDES}
    importance = {}
    for layer, of_layer in statistics.layers.items():
        numbers = [function(of_layer.of_pairs(group)) for group in groups[side_of(layer)]]
        num_experts = statistics.fingerprint.num_experts[layer]
        shares = [_normalized(n, num_experts, selection.criterion_name, layer) for n in numbers]
        importance[layer] = torch.stack(shares).mean(dim=0)
    return importance


def check_languages_of(statistics: ExpertStatistics, selection: ExpertSelection) -> None:
    """Check the languages as `expert_importance` does, for criteria that do not use statistics.

    Raises:
        ValueError: a language or pair without statistics.
    """
    for side in SIDES:
        _wanted_pairs(statistics, side, selection)


def _groups(statistics: ExpertStatistics, side: Side, selection: ExpertSelection) -> list[list[int]]:
    """Indices of the language pairs in each group."""
    wanted = _wanted_pairs(statistics, side, selection)
    if selection.scope == "global":
        return [wanted]
    if selection.scope == "language_pair":
        return [[index] for index in wanted]
    is_wanted = {*wanted}
    by_language = [[i for i in indices if i in is_wanted] for indices in statistics.languages(side).values()]
    return [group for group in by_language if group]


def _wanted_pairs(statistics: ExpertStatistics, side: Side, selection: ExpertSelection) -> list[int]:
    """Indices of the language pairs that count for a side, encoder or decoder."""
    pairs, languages = statistics.pairs, selection.languages
    if languages is None:
        return list(range(len(pairs)))
    known = sorted({language for pair in pairs for language in pair})
    if all(isinstance(language, str) for language in languages):
        codes = {find_language(str(code), known) or str(code) for code in languages}
        positions = (0, 1) if selection.scope != "language" else (0,) if side == "encoder" else (1,)
        return _pairs_within(pairs, codes, positions)
    asked = {tuple(find_language(code, known) or code for code in pair) for pair in languages}
    if missing := sorted(asked - {*pairs}):
        raise ValueError(
            f"the statistics have no sentences of these language pairs: {missing}; collect statistics of them"
        )
    return [index for index, pair in enumerate(pairs) if pair in asked]


def _pairs_within(pairs: Sequence[LanguagePair], codes: set[str], positions: Sequence[int]) -> list[int]:
    """Indices of the pairs whose source (position 0), target (1) or both are among the codes."""
    if unknown := codes.difference(*pairs):
        known = [language for pair in pairs for language in pair]
        raise ValueError(
            f"the statistics have no sentences in {unknown_languages(unknown, known)}; collect statistics of them"
        )
    wanted = [index for index, pair in enumerate(pairs) if all(pair[position] in codes for position in positions)]
    for position in positions:
        if without := sorted(codes - {pairs[index][position] for index in wanted}):
            raise ValueError(
                f"the statistics have no sentences of languages with {', '.join(without)} as the "
                f"{('source', 'target')[position]}; collect them, or give the pairs to keep, such as [('en', 'de'), "
                "('en', 'fr')]"
            )
    return wanted


def _normalized(numbers: Tensor, num_experts: int, name: str, layer: str) -> Tensor:
    """float64[E] with a sum of 1; equal numbers if all are 0. `name` is the name of the criterion."""
    if not isinstance(numbers, Tensor) or numbers.shape != (num_experts,):
        raise ValueError(f"criterion {name} must return a tensor with {num_experts} numbers for {layer}, got {numbers}")
    numbers = numbers.double()
    if not numbers.isfinite().all() or (numbers < 0).any():
        raise ValueError(
            f"criterion {name} must return finite numbers of at least 0, got {numbers.tolist()} for {layer}"
        )
    return numbers / numbers.sum() if numbers.any() else torch.full_like(numbers, 1 / num_experts)


__all__ = [
    "CRITERIA",
    "activity_confidence",
    "check_languages_of",
    "expert_importance",
    "random_importance",
    "reap",
    "utilization",
]
