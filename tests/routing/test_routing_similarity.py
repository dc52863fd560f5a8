"""How alike languages are for the routers: against a loop over tokens' shares, and by hand."""

from typing import Any

import pytest
import torch

from hf_moe_ted import ExpertStatistics, LayerStatistics
from hf_moe_ted.routing.expert_statistics import ModelFingerprint
from hf_moe_ted.routing.routing_similarity import nearest_languages, routed_shares, routing_similarity

ENCODER, OTHER_ENCODER, DECODER = (
    f"model.{name}.ffn" for name in ("encoder.layers.1", "encoder.layers.3", "decoder.layers.1")
)
PAIRS = (("en", "de"), ("de", "en"), ("fr", "en"), ("fr", "de"))


def statistics(**num_routed: Any) -> ExpertStatistics:
    """Of top-1 routing: pair x expert for each layer."""
    layers = {}
    for name, counts in num_routed.items():
        counts_PKE = torch.tensor(counts).unsqueeze(1)
        rest = {n: torch.zeros(len(PAIRS), 3) for n in ("num_dropped", "gate_mass", "confidence", "gated_norm")}
        layers[globals()[name]] = LayerStatistics(num_routed=counts_PKE, **rest, output_sum=torch.zeros(3, 2))
    fingerprint = ModelFingerprint(dict.fromkeys(layers, 3), 1, 2, "")
    return ExpertStatistics(fingerprint, PAIRS, (1,) * len(PAIRS), layers)


def test_by_hand() -> None:
    of_encoder = [[8, 0, 0], [2, 2, 0], [0, 3, 0], [0, 5, 0]]
    found = statistics(ENCODER=of_encoder, DECODER=[[1, 0, 3], [0, 2, 2], [0, 0, 4], [1, 0, 3]])
    # de, en, fr as sources
    assert routed_shares(found, ENCODER).tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    # de and en as targets
    assert routed_shares(found, DECODER).tolist() == [[0.25, 0.0, 0.75], [0.0, 0.25, 0.75]]
    expected = [[1.0, 0.5, 0.5], [0.5, 1.0, 0.0], [0.5, 0.0, 1.0]]
    assert routing_similarity(found, "encoder").tolist() == expected
    assert nearest_languages(found) == {
        "encoder": {"de": ("en", 0.5), "en": ("de", 0.5), "fr": ("de", 0.5)},
        "decoder": {"de": ("en", 0.75), "en": ("de", 0.75)},
    }


def test_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = {name: torch.randint(0, 9, (4, 3), generator=generator).tolist() for name in ("ENCODER", "OTHER_ENCODER")}
    found = statistics(**counts)
    rows = {"de": [1], "en": [0], "fr": [2, 3]}
    similarity = routing_similarity(found, "encoder")
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            overlaps = []
            for of_layer in counts.values():
                sums = [
                    [sum(of_layer[row][e] for row in rows[language]) for e in range(3)] for language in (one, other)
                ]
                shares = [[count / sum(of_language) for count in of_language] for of_language in sums]
                overlaps.append(sum(min(shares[0][e], shares[1][e]) for e in range(3)))
            assert similarity[i, j].item() == pytest.approx(sum(overlaps) / 2)


def test_a_side_without_layers_or_a_single_language() -> None:
    found = statistics(ENCODER=[[1, 0, 0]] * 4)
    assert routing_similarity(found, "decoder") is None
    assert [*nearest_languages(found)] == ["encoder"]
