"""Check what must hold for expert statistics of any text.

Shape letters: P language pairs, K experts per token, E experts, D model width.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.layer_names import FFN_PATTERN, side_of

COUNTS = ("num_routed", "num_dropped")
# tolerance for sums of probabilities, which routers may compute in 16 bits
TOLERANCE = 0.02

_LAYER = re.compile(rf"model\.{FFN_PATTERN}")


def check_fingerprint(num_experts: Any, num_experts_per_tok: Any, d_model: Any, router_hash: Any) -> None:
    """
    Raises:
        ValueError: a field of a `ModelFingerprint` has another type or is out of its range.
    """
    if not isinstance(num_experts, Mapping) or not num_experts:
        raise ValueError(f"num_experts ({num_experts!r}) must map the name of each MoE layer to its number of experts")
    for layer, count in num_experts.items():
        if not isinstance(layer, str) or not _LAYER.fullmatch(layer):
            raise ValueError(f"num_experts has {layer!r}, which is not a name such as model.encoder.layers.1.ffn")
        if not _is_count(count):
            raise ValueError(f"num_experts of {layer} ({count!r}) must be an integer of at least 1")
    for name, value in (("num_experts_per_tok", num_experts_per_tok), ("d_model", d_model)):
        if not _is_count(value):
            raise ValueError(f"{name} ({value!r}) must be an integer of at least 1")
    if not isinstance(router_hash, str):
        raise ValueError(f"router_hash ({router_hash!r}) must be a string")


def check_pairs(pairs: Sequence[Any], num_sentences: Sequence[Any]) -> None:
    """
    Raises:
        ValueError: a pair is not two codes or occurs twice; a pair has no positive number of sentences.
    """
    if not pairs:
        raise ValueError("pairs is empty: there is no sentence in the statistics")
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(code, str) for code in pair)):
            raise ValueError(f"pairs has {pair!r}, which is not a pair of a source and a target language")
    if len({tuple(pair) for pair in pairs}) != len(pairs):
        raise ValueError(f"pairs has a pair twice: {pairs}")
    if len(num_sentences) != len(pairs) or not all(map(_is_count, num_sentences)):
        raise ValueError(
            f"num_sentences ({num_sentences}) must be an integer of at least 1 for each of {len(pairs)} pairs"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_layers(layers: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    """
    Args:
        layers: name of each MoE layer -> `LayerStatistics` of the right shapes and dtypes.
        pairs: P, for messages.

    Raises:
        ValueError: numbers are impossible: not finite, negative, more dropped than routed, sums of probabilities that
            do not fit the tokens, or different numbers of tokens in layers of one side.
    """
    first_of_side: dict[str, tuple[str, Tensor]] = {}
    for layer, statistics in layers.items():
        _check_numbers(layer, statistics)
        _check_sums(layer, statistics)
        tokens_P = statistics.num_routed[:, 0].sum(dim=-1)
        if without := [pair for pair, count in zip(pairs, tokens_P.tolist(), strict=True) if count == 0]:
            raise ValueError(f"{layer} has no token of {', '.join(map('-'.join, without))}")
        first, tokens_of_first_P = first_of_side.setdefault(side_of(layer), (layer, tokens_P))
        if not torch.equal(tokens_P, tokens_of_first_P):
            raise ValueError(
                f"{layer} has first choices of {tokens_P.tolist()} tokens by pair, but {first} of "
                f"{tokens_of_first_P.tolist()}; every layer of a side sees the same tokens"
            )


def _check_numbers(layer: str, statistics: Any) -> None:
    for name, tensor in vars(statistics).items():
        if not tensor.isfinite().all():
            raise ValueError(f"{layer}.{name} has NaN or infinity")
        if name != "output_sum" and (tensor < 0).any():
            raise ValueError(f"{layer}.{name} has the negative number {tensor.min().item():g}")


def _check_sums(layer: str, statistics: Any) -> None:
    """Check sums within a layer; numbers are known to be finite and not negative."""
    first_PE = statistics.num_routed[:, 0].double()
    tokens_P = first_PE.sum(dim=-1)
    computed_PE = statistics.num_computed
    problems = {
        "num_routed has more later choices than tokens": (statistics.num_routed.sum(dim=-1) > tokens_P[:, None]).any(),
        "num_dropped is more than num_routed": (computed_PE < 0).any(),
        "gate_mass does not sum to the number of tokens": not _close(statistics.gate_mass.sum(dim=-1), tokens_P),
        "confidence is more than the number of first choices": _exceeds(statistics.confidence, first_PE),
        "confidence is more than gate_mass": _exceeds(statistics.confidence, statistics.gate_mass),
        "gated_norm is not 0 for experts that computed nothing": statistics.gated_norm[computed_PE == 0].any(),
        "output_sum is not 0 for experts that computed nothing": statistics.output_sum[computed_PE.sum(0) == 0].any(),
    }
    if found := [problem for problem, is_there in problems.items() if is_there]:
        raise ValueError(f"{layer}: {'; '.join(found)}")


def _close(numbers: Tensor, others: Tensor) -> bool:
    return bool(((numbers - others).abs() <= TOLERANCE * (1 + others)).all())


def _exceeds(numbers: Tensor, limits: Tensor) -> bool:
    return bool((numbers > limits + TOLERANCE * (1 + limits)).any())


__all__ = ["COUNTS", "check_fingerprint", "check_layers", "check_pairs"]
