"""Which experts are kept, by hand."""

from typing import Any

import pytest
import torch

from hf_moe_ted.expert_memory.residence_plan import LayerSize, plan_residence
from hf_moe_ted.expert_memory.slots import Region

ENCODER, DECODER = "model.encoder.layers.1.ffn", "model.decoder.layers.1.ffn"
LAYERS = {ENCODER: LayerSize(8, 10, 0), DECODER: LayerSize(4, 10, 0)}


def test_all_are_kept_where_there_is_room() -> None:
    plan = plan_residence(LAYERS, 120, None)
    assert plan.num_slots == {ENCODER: 8, DECODER: 4} and plan.stage_slots == {0: 0}
    assert plan.first == {ENCODER: list(range(8)), DECODER: list(range(4))}


def test_the_decoder_comes_first_without_statistics() -> None:
    plan = plan_residence(LAYERS, 89, None)  # 8 slots, two of which are for those that pass through
    assert plan.num_slots == {ENCODER: 2, DECODER: 4} and plan.stage_slots == {0: 1}
    assert plan.first == {ENCODER: [], DECODER: [0, 1, 2, 3]}  # which ones of the encoder is up to the texts
    assert plan_residence(LAYERS, 20, None).num_slots == {ENCODER: 0, DECODER: 0}
    assert plan_residence(LAYERS, 50, None).num_slots == {ENCODER: 0, DECODER: 3}


def test_those_that_are_used_most_come_first() -> None:
    """An expert of the decoder counts 16 times: 1% of its layer is less than 20% of a layer of the encoder."""
    importance: Any = {
        ENCODER: torch.tensor([0.0, 0.3, 0.0, 0.0, 0.2, 0.2, 0.2, 0.1]),
        DECODER: torch.tensor([0.01, 0.0, 0.5, 0.49]),
    }
    plan = plan_residence(LAYERS, 70, importance)
    assert plan.first == {ENCODER: [1, 4, 5], DECODER: [2, 3]}
    assert plan.num_slots == {ENCODER: 3, DECODER: 2} and plan.stage_slots == {0: 1}


def test_experts_of_several_sizes() -> None:
    layers = {ENCODER: LayerSize(64, 10, 0), DECODER: LayerSize(64, 20, 1)}
    plan = plan_residence(layers, 1000, None)
    taken = sum(
        (plan.num_slots[name] + 2 * plan.stage_slots[layer.kind]) * layer.slot_bytes for name, layer in layers.items()
    )
    assert plan.stage_slots == {0: 2, 1: 2} and taken <= 1000 and taken > 980
    with pytest.raises(ValueError, match=r"expert_memory \(59 bytes\) is too small: experts need at least 60 bytes"):
        plan_residence(layers, 59, None)
    assert plan_residence(layers, 60, None).num_slots == {ENCODER: 0, DECODER: 0}


def test_those_used_longest_ago_make_room() -> None:
    region = Region(10, 3)
    assert region.make_room([("a", 0), ("a", 1)], keep=()) == [10, 11]
    assert region.make_room([("a", 2)], keep=[("a", 0)]) == [12]
    region.touch([("a", 0)])
    assert region.make_room([("a", 3)], keep=()) == [11]
    assert region.make_room([("a", 4), ("a", 5)], keep=[("a", 0)]) == [12, 11]
    assert region.slot_of == {("a", 0): 10, ("a", 4): 12, ("a", 5): 11}
    region.forget([("a", 4)])
    assert region.make_room([("a", 6)], keep=()) == [12]
    region.forget()
    assert region.slot_of == {} and region.make_room([("b", 0)], keep=()) == [10]
