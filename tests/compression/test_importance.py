"""Criteria, scopes and sets of languages, with numbers worked out by hand."""

import math
from typing import Any

import pytest
import torch

from hf_moe_ted.compression import importance
from hf_moe_ted.compression.expert_selection import ExpertSelection
from hf_moe_ted.compression.importance import activity_confidence, random_importance, reap, utilization
from hf_moe_ted.routing.expert_statistics import ExpertStatistics, LayerStatistics, ModelFingerprint

ENCODER, DECODER = "model.encoder.layers.1.ffn", "model.decoder.layers.1.ffn"
PAIRS = (("en", "de"), ("de", "en"), ("en", "fr"))
# tokens of each pair that go to experts 0, 1, 2; de-en has a hundred times the text
TOKENS = {ENCODER: [[6, 2, 0], [0, 400, 400], [1, 1, 2]], DECODER: [[0, 0, 8], [600, 200, 0], [0, 4, 0]]}


def layer_statistics(first: Any, **others: Any) -> LayerStatistics:
    """One choice per token, nothing dropped, zeros for what is not given; `first` is [P, E]."""
    num_routed = torch.tensor(first).unsqueeze(1)
    zeros = torch.zeros(num_routed.sum(1).shape)
    fields = {"num_dropped": zeros.long(), **dict.fromkeys(("gate_mass", "confidence", "gated_norm"), zeros.double())}
    fields |= {name: torch.as_tensor(value) for name, value in others.items()}
    return LayerStatistics(**{"num_routed": num_routed, "output_sum": torch.zeros(zeros.shape[1], 4), **fields})


@pytest.fixture
def statistics() -> ExpertStatistics:
    fingerprint = ModelFingerprint({ENCODER: 3, DECODER: 3}, 1, 4, "")
    layers = {layer: layer_statistics(tokens) for layer, tokens in TOKENS.items()}
    return ExpertStatistics(fingerprint, PAIRS, (1, 100, 1), layers)


# --- criteria


def test_utilization_counts_what_is_computed() -> None:
    routed = torch.tensor([[[4, 1], [1, 4]], [[2, 0], [0, 2]]])
    statistics = layer_statistics([[0, 0]] * 2, num_routed=routed, num_dropped=[[1, 0], [0, 2]])
    assert utilization(statistics).tolist() == [6.0, 5.0]


def test_activity_confidence() -> None:
    routed = torch.tensor([[[3, 1, 0], [9, 9, 9]], [[3, 1, 0], [9, 9, 9]]])  # second choices do not count
    confidence = torch.tensor([[1.0, 0.5, 0.0], [2.0, 0.5, 0.0]]).double()
    found = activity_confidence(layer_statistics([[0] * 3] * 2, num_routed=routed, confidence=confidence))
    torch.testing.assert_close(found, torch.tensor([0.75 * math.exp(0.5), 0.25 * math.exp(0.5), 0.0]).double())


def test_reap_is_a_mean_over_computed_tokens() -> None:
    gated_norm = torch.tensor([[6.0, 1.0, 0.0], [2.0, 0.0, 0.0]]).double()
    statistics = layer_statistics([[3, 1, 0], [2, 0, 0]], num_dropped=[[1, 0, 0], [0, 0, 0]], gated_norm=gated_norm)
    assert reap(statistics).tolist() == [2.0, 1.0, 0.0]


def test_random() -> None:
    layers = {ENCODER: 64, DECODER: 8}
    first, again, other = random_importance(layers, 0), random_importance(layers, 0), random_importance(layers, 1)
    assert [len(numbers) for numbers in first.values()] == [64, 8]
    assert all(torch.equal(first[layer], again[layer]) for layer in layers)
    assert not torch.equal(first[ENCODER], other[ENCODER])
    assert torch.equal(random_importance({DECODER: 8}, 0)[DECODER], first[DECODER])  # whatever other layers there are
    # each of 8 experts is among the best 4 in about half of 400 draws; 5 standard deviations are 50
    best = torch.stack([random_importance({DECODER: 8}, seed)[DECODER].topk(4).indices for seed in range(400)])
    assert ((best.flatten().bincount(minlength=8) - 200).abs() < 50).all()


# --- scopes and languages


def expert_importance(statistics: ExpertStatistics, criterion: Any, **options: Any) -> dict[str, torch.Tensor]:
    return importance.expert_importance(statistics, ExpertSelection(keep=1.0, criterion=criterion, **options))


@pytest.mark.parametrize(
    ("scope", "languages", "encoder", "decoder"),
    [
        ("global", None, [7 / 812, 403 / 812, 402 / 812], [600 / 812, 204 / 812, 8 / 812]),
        ("global", ["en", "de"], [6 / 808, 402 / 808, 400 / 808], [600 / 808, 200 / 808, 8 / 808]),
        ("global", [("en", "de"), ("en", "fr")], [7 / 12, 3 / 12, 2 / 12], [0, 4 / 12, 8 / 12]),
        ("language_pair", None, [1 / 3, 1 / 3, 1 / 3], [0.75 / 3, 1.25 / 3, 1 / 3]),
        ("language_pair", ["en", "de"], [0.375, 0.375, 0.25], [0.375, 0.125, 0.5]),
        # the encoder of English: 7, 3, 2 of 12 tokens
        ("language", None, [7 / 24, 1 / 8 + 1 / 4, 1 / 12 + 1 / 4], [0.75 / 3, 1.25 / 3, 1 / 3]),
        ("language", ["en", "de"], [7 / 24, 1 / 8 + 1 / 4, 1 / 12 + 1 / 4], [0.375, 0.125, 0.5]),
        ("language", [("en", "fr")], [0.25, 0.25, 0.5], [0, 1, 0]),
    ],
)
def test_scopes(
    scope: str, languages: Any, encoder: list[float], decoder: list[float], statistics: ExpertStatistics
) -> None:
    found = expert_importance(statistics, "utilization", scope=scope, languages=languages)
    torch.testing.assert_close(found[ENCODER], torch.tensor(encoder, dtype=torch.float64))
    torch.testing.assert_close(found[DECODER], torch.tensor(decoder, dtype=torch.float64))


def test_callable(statistics: ExpertStatistics) -> None:
    seen: list[list[int]] = []

    def rarest(layer: LayerStatistics) -> torch.Tensor:
        seen.append(layer.num_routed.flatten().tolist())
        return 1 / (1 + layer.num_routed.sum(dim=(0, 1)))

    found = expert_importance(statistics, rarest, scope="language_pair", languages=[("en", "fr")])
    assert seen == [[1, 1, 2], [0, 4, 0]]
    torch.testing.assert_close(found[ENCODER], torch.tensor([3 / 8, 3 / 8, 2 / 8]).double())


def test_nothing_known_of_a_layer_is_even(statistics: ExpertStatistics) -> None:
    found = expert_importance(statistics, lambda layer: torch.zeros(3))
    torch.testing.assert_close(found[ENCODER], torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "magic"}, r"criterion \('magic'\) must be 'random', a function, or one of \['activity"),
        ({"scope": "world"}, r"scope \('world'\) must be one of"),
        ({"languages": "en,de"}, "must be a list of codes or a list of pairs"),
        ({"languages": []}, "must be a list of codes or a list of pairs"),
        ({"languages": ["en", ("en", "de")]}, "must be a list of codes or a list of pairs"),
        ({"languages": ["en", "sw"]}, "the statistics have no sentences in sw; collect"),
        ({"languages": ["en", "fr"]}, "no sentences of languages with fr as the source"),
        ({"languages": ["en", "fr"], "scope": "language"}, "with fr as the source"),
        ({"languages": [("de", "fr"), ("en", "de")]}, r"no sentences of these language pairs: \[\('de', 'fr'\)\]"),
        ({"criterion": lambda layer: torch.ones(2)}, "must return a tensor with 3 numbers for model.encoder"),
        ({"criterion": lambda layer: [1, 2, 3]}, "must return a tensor with 3 numbers for model.encoder"),
        ({"criterion": lambda layer: torch.tensor([1.0, -1.0, 2.0])}, "must return finite numbers of at least 0"),
        ({"criterion": lambda layer: torch.tensor([1.0, math.nan, 2.0])}, "must return finite numbers of at least 0"),
    ],
)
def test_wrong_input(arguments: dict[str, Any], message: str, statistics: ExpertStatistics) -> None:
    with pytest.raises(ValueError, match=message):
        expert_importance(statistics, **{"criterion": "utilization", **arguments})
