"""How many experts stay in which layer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_ted.compression.expert_selection import ExpertSelection
from hf_moe_ted.compression.pruning_plan import KeptExperts, PruningPlan

ENCODER, ENCODER_2, DECODER = (
    f"model.{name}.ffn" for name in ("encoder.layers.1", "encoder.layers.3", "decoder.layers.1")
)


def importance(**layers: list[int]) -> dict[str, Tensor]:
    names = {"e": ENCODER, "e2": ENCODER_2, "d": DECODER}
    numbers = {names[layer]: torch.tensor(values, dtype=torch.float64) for layer, values in layers.items()}
    return {layer: values / values.sum() for layer, values in numbers.items()}


def kept_bytes(kept: KeptExperts) -> int:
    """1 MB besides the experts, and 1 MB per expert."""
    return 10**6 * (1 + sum(map(len, kept.values())))


def choose(keep: Any, layers: dict[str, Tensor] | None = None, **options: Any) -> KeptExperts:
    return PruningPlan(layers or EIGHT, ExpertSelection(keep=keep, **options), kept_bytes).choose()


def counts(kept: KeptExperts) -> list[int]:
    return [len(kept.get(layer, [])) for layer in (ENCODER, ENCODER_2, DECODER)]


# 80% of e's importance is in one expert, e2 is even
EIGHT = importance(e=[1, 1, 40, 1, 2, 3, 1, 1], e2=[10, 11, 10, 12, 10, 10, 13, 10], d=[0, 0, 9, 9, 0, 8, 0, 7])
PYRAMID = importance(e=[4, 3, 2, 1], e2=[1, 2, 3, 4, 5, 6, 7, 8], d=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])


def test_most_important_in_order_of_ids() -> None:
    assert choose(4) == {ENCODER: [0, 2, 4, 5], ENCODER_2: [0, 1, 3, 6], DECODER: [2, 3, 5, 7]}
    assert choose(1) == {ENCODER: [2], ENCODER_2: [6], DECODER: [2]}
    assert choose(8) == choose(1.0) == {layer: [*range(8)] for layer in EIGHT}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(0.25, [2, 2, 2]), (0.3, [2, 2, 2]), (0.32, [3, 3, 3]), (0.0625, [1, 1, 1]), (0.9375, [8, 8, 8])],
)
def test_fraction_is_rounded(keep: float, expected: list[int]) -> None:
    assert counts(choose(keep)) == expected


def test_fraction_of_a_pyramid_is_a_share_of_each_layer() -> None:
    assert counts(choose(0.5, PYRAMID)) == [2, 4, 6]
    assert counts(choose(3, PYRAMID)) == [3, 3, 3]


def test_adaptive_keeps_the_highest_shares_anywhere() -> None:
    kept = choose(0.5, per_layer="adaptive", min_experts=2)
    # e: one expert with 80% and, as min_experts says, the next; the other 9 of 12: e2's shares are 10/86 to 13/86
    assert kept == {ENCODER: [2, 5], ENCODER_2: [0, 1, 2, 3, 4, 6], DECODER: [2, 3, 5, 7]}
    assert sum(counts(choose(4, per_layer="adaptive"))) == 12
    assert choose(4, per_layer="adaptive") == {ENCODER: [2], ENCODER_2: [0, 1, 2, 3, 4, 5, 6], DECODER: [2, 3, 5, 7]}


def test_adaptive_floor_of_a_small_layer_is_all_of_it() -> None:
    kept = choose(0.5, PYRAMID, per_layer="adaptive", min_experts=4)
    assert kept[ENCODER] == [0, 1, 2, 3]
    assert sum(counts(kept)) == 12


def test_ratio() -> None:
    # 12 of 24: the decoder's 12 / 7 are 2, an encoder layer's three times as many are 5
    assert counts(choose(0.5, encoder_decoder_ratio=3.0)) == counts(choose(4, encoder_decoder_ratio=3.0)) == [5, 5, 2]
    assert counts(choose(3, encoder_decoder_ratio=0.5)) == [2, 2, 5]
    adaptive = counts(choose(0.5, per_layer="adaptive", encoder_decoder_ratio=3.0))
    assert (adaptive[0] + adaptive[1], adaptive[2]) == (10, 2)


def test_ratio_of_nllb_moe() -> None:
    """36 and 12 of 128 in 6 + 6 layers, as in https://huggingface.co/papers/2212.09811."""
    even = torch.full((128,), 1 / 128).double()
    layers = {f"model.{side}.layers.{4 * i + 3}.ffn": even for side in ("encoder", "decoder") for i in range(6)}
    for keep in (24, 0.1875):
        found = choose(keep, layers, encoder_decoder_ratio=3.0)
        assert [len(experts) for experts in found.values()] == [36] * 6 + [12] * 6


@pytest.mark.parametrize(
    ("size", "expected"), [("25MB", [8, 8, 8]), ("24.9MB", [7, 7, 7]), ("10MB", [3, 3, 3]), ("4 MB", [1, 1, 1])]
)
def test_size(size: str, expected: list[int]) -> None:
    assert counts(choose(size)) == expected


def test_size_is_used_up() -> None:
    assert sum(counts(choose("11MB", per_layer="adaptive"))) == 10
    assert counts(choose("13MB", encoder_decoder_ratio=3.0)) == [5, 5, 2]
    assert counts(choose("40MB", encoder_decoder_ratio=3.0)) == [8, 8, 3]
    assert choose("2MB", importance(e=[1, 3, 2])) == {ENCODER: [1]}  # one expert of the one layer there is


@pytest.mark.parametrize(
    ("keep", "options", "message"),
    [
        (0.05, {}, r"keep \(0.05\) rounds to zero of the 8 experts of model.encoder.layers.1.ffn; keep more"),
        (0.01, {"per_layer": "adaptive"}, rf"to zero of the 24 experts of 3 layers \({ENCODER} to {DECODER}\)"),
        (1, {"min_experts": 2}, r"keep \(1\) leaves 1 of the 8 experts .* fewer than min_experts \(2\)"),
        (
            3,
            {"min_experts": 4, "per_layer": "adaptive"},
            r"leaves 9 of the 24 experts of 3 layers .* min_experts \(4\)",
        ),
        (9, {}, r"keep \(9\) asks for 9 experts of model.encoder.layers.1.ffn, which has 8; keep fewer"),
        (0.9, {"encoder_decoder_ratio": 3.0}, "asks for 9 experts .* or change encoder_decoder_ratio"),
        (0, {}, r"keep \(0\) must be a fraction"),
        (-0.5, {}, r"keep \(-0.5\) must be a fraction"),
        (float("nan"), {}, r"keep \(nan\) must be a fraction"),
        (True, {}, r"keep \(True\) must be a fraction"),
        (None, {}, r"keep \(None\) must be a fraction"),
        (2.0, {}, r"keep \(2.0\) is a fraction of more than 1; a number of experts per layer is an int"),
        ("8 experts", {}, r"keep \('8 experts'\) is not a size"),
        ("3.9MB", {}, r"less than the 4,000,000 bytes of the smallest model with min_experts \(1\)"),
        (2, {"per_layer": "some"}, r"per_layer \('some'\) must be one of"),
        (2, {"encoder_decoder_ratio": 0.0}, r"encoder_decoder_ratio \(0.0\) must be a positive number"),
        (2, {"encoder_decoder_ratio": float("inf")}, r"encoder_decoder_ratio \(inf\) must be a positive number"),
        (
            2,
            {"encoder_decoder_ratio": 2.0, "layers": importance(e=[1, 2, 3])},
            "needs MoE layers in the encoder and in",
        ),
    ],
)
def test_wrong_input(keep: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(keep, **options)
