"""The routing of a language pair in another model, and the table that compares what it costs."""

import pytest
import torch
from least_loaded import MOVES, print_ratios, route_as, routing_of_pair

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.testing import tiny_config

ROUTING = {
    "pair": "en-de",
    "encoder": [[0.0, 1.0, 0.0, 0.0], [0.25, 0.0, 0.0, 0.75]],
    "decoder": [[0.5, 0.5, 0.0, 0.0]],
}


def test_routing_is_that_of_the_shipped_model() -> None:
    routing = routing_of_pair("en-de", num_sentences=4)
    assert [len(routing[side]) for side in ("encoder", "decoder")] == [4, 1]
    for shares in routing["encoder"] + routing["decoder"]:
        assert len(shares) == 8 and sum(shares) == pytest.approx(1.0)
    assert max(routing["decoder"][0]) > 0.25  # words of German go to some experts more than to others
    of_japanese = routing_of_pair("en-ja", num_sentences=4)["decoder"][0]
    assert sum(abs(a - b) for a, b in zip(routing["decoder"][0], of_japanese, strict=True)) > 0.5  # and these to others


@pytest.mark.parametrize("pair", ["de-fr", "en-xx", "en"])
def test_pairs_without_text_are_refused(pair: str) -> None:
    with pytest.raises(ValueError, match=f"--pair {pair}: no such text in .*; give en-XX or XX-en"):
        routing_of_pair(pair, num_sentences=1)


def test_tokens_go_where_the_shares_say() -> None:
    model = ZCodeM3ForConditionalGeneration(tiny_config(encoder_layers=6)).eval()
    route_as(model, ROUTING, seed=0)
    seen = []
    layers = [model.model.encoder.layers[i] for i in (1, 3, 5)] + [model.model.decoder.layers[1]]
    for layer in layers:
        layer.ffn.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    ids = torch.randint(5, 96, (20, 40))
    for _ in range(2):
        with torch.no_grad():
            model(input_ids=ids, labels=ids)
    assert len(seen) == 8 and all(map(torch.equal, seen[:4], seen[4:]))
    counts = [ids.flatten().bincount(minlength=4).tolist() for ids in seen]
    expected = [*ROUTING["encoder"], ROUTING["encoder"][0], ROUTING["decoder"][0]]
    assert counts[:4] == [[round(800 * share) for share in shares] for shares in expected]
    assert seen[1].flatten().tolist() != sorted(seen[1].flatten().tolist())
    with pytest.raises(ValueError, match=r"num_experts \(2\) must be 4"):
        route_as(ZCodeM3ForConditionalGeneration(tiny_config(num_experts=2)), ROUTING, seed=0)


def test_ratios_are_of_cases_that_differ_in_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    plain = {
        "name": "ours", "num_gpus": 2, "base": "tiny", "num_experts": 4, "layout": {"expert_parallel_size": 2},
        "checkpointing": None, "batch_size": 2, "length": 8, "forward": False, "routing": ROUTING, "step_ms": 30.0,
        "largest_peak_gib": 8.0, "all_to_all_mb_of_all": 1.0, "loss": 2.5,
    }  # fmt: skip
    moving = plain | {"layout": {"expert_parallel_size": 2, MOVES: True}, "step_ms": 20.0, "largest_peak_gib": 4.0}
    print_ratios([plain, plain | {"forward": True}, moving, plain | {"routing": None}, {"error": "out of memory"}])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "ours" in line]
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["ours", "2", "1.50 to 2.00", "30.0", "20.0", "1.50", "2.00", "1.0 / 1.0", "2.5000 / 2.5000"]
    print_ratios([plain, moving | {"batch_size": 4}])
    assert capsys.readouterr().out == ""
