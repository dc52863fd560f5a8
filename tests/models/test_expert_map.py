"""Routers with more rows than there are experts, against a loop over rows that each have an expert of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration
from hf_moe_ted.models.moe_layer import ZCodeM3MoELayer
from hf_moe_ted.models.router import Routing
from hf_moe_ted.testing import tiny_config

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "zcode_grouped")
D_MODEL, FFN_DIM, NUM_TOKENS = 32, 24, 40
MAP = (1, 0, 1, 2, 0)
MAP_WITH_REMOVED = (1, 3, 0, 2, 3, 1)  # 3 is no expert


def make_layer(expert_map: tuple[int, ...], implementation: str = "eager", **overrides: Any) -> ZCodeM3MoELayer:
    """Three experts behind the rows of the map."""
    # the fields of the layer under test are given by hand, so num_experts of the config only has to be valid
    config = tiny_config(router_bias=True, **overrides)
    config._experts_implementation = implementation
    layer = ZCodeM3MoELayer(config, 3, FFN_DIM, expert_map)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer.eval()


def route(layer: ZCodeM3MoELayer, hidden: Tensor) -> tuple[Tensor, Routing]:
    output, routing = layer(hidden.unsqueeze(0))
    return output.squeeze(0), routing


def inputs() -> Tensor:
    return torch.randn(NUM_TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1), requires_grad=True)


def reference(layer: ZCodeM3MoELayer, hidden_TD: Tensor, capacity: int | None = None) -> Tensor:
    """Token by token and choice by choice; experts are filled in the order of first choices, then second ones."""
    experts, router = layer.experts, layer.router
    probs_TE = (hidden_TD @ router.weight.T + router.bias).softmax(dim=-1)
    num_taken = [0] * 3
    weights: dict[tuple[int, int], Tensor] = {}
    chosen = [
        sorted((r for r in range(len(router.expert_map)) if router.expert_map[r] < 3), key=lambda r: -probs[r])
        for probs in probs_TE.tolist()
    ]
    for choice in range(router.top_k):
        for token in range(len(hidden_TD)):
            row = chosen[token][choice]
            expert = router.expert_map[row]
            num_taken[expert] += 1
            if capacity is None or num_taken[expert] <= capacity:
                weights[token, choice] = probs_TE[token, row]
    rows = []
    for token, hidden_D in enumerate(hidden_TD):
        of_token = {choice: w for choice in range(router.top_k) if (w := weights.get((token, choice))) is not None}
        total = sum(of_token.values()) if router.normalize_router_weights == "after_dropping" else 1.0
        output_D = torch.zeros_like(hidden_D)
        for choice, weight in of_token.items():
            expert = router.expert_map[chosen[token][choice]]
            inner = (experts.up_proj[expert] @ hidden_D + experts.up_proj_bias[expert]).relu()
            output_D = output_D + weight / total * (experts.down_proj[expert] @ inner + experts.down_proj_bias[expert])
        rows.append(output_D)
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("expert_map", [MAP, MAP_WITH_REMOVED])
def test_equals_dense_loop(implementation: str, top_k: int, expert_map: tuple[int, ...]) -> None:
    """Outputs and gradients."""
    normalize = None if top_k == 1 else "after_dropping"  # the one weight would be 1, without a gradient
    layer = make_layer(expert_map, implementation, num_experts_per_tok=top_k, normalize_router_weights=normalize)
    gradients = []
    for run in (lambda hidden: route(layer, hidden)[0], lambda hidden: reference(layer, hidden)):
        hidden = inputs()
        layer.zero_grad()
        output = run(hidden)
        output.square().sum().backward()
        gradients.append([output, hidden.grad, *(p.grad.clone() for p in layer.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("expert_map", [MAP, MAP_WITH_REMOVED])
def test_capacity_is_that_of_an_expert(expert_map: tuple[int, ...]) -> None:
    """Rows of one expert share its places, which are a share of the experts, not of the rows."""
    options = {"eval_capacity_factor": 0.6, "min_capacity": 0, "token_drop_policy": "position"}
    layer = make_layer(expert_map, num_experts_per_tok=2, **options)
    output, routing = route(layer, inputs())
    torch.testing.assert_close(output, reference(layer, inputs(), capacity=16))  # 40 * 2 / 3 * 0.6
    assert routing.num_tokens_per_expert().max() == 16
    assert 0 < routing.dropped_share() < 1


def test_routing_of_rows_and_experts() -> None:
    layer = make_layer(MAP, num_experts_per_tok=2)
    _, routing = route(layer, inputs())
    assert routing.num_experts == 3 and routing.logits.shape == (NUM_TOKENS, 5)
    assert torch.equal(routing.expert_ids, torch.tensor(MAP)[routing.choices])
    assert (routing.choices[:, 0] != routing.choices[:, 1]).all()
    assert (routing.expert_ids[:, 0] == routing.expert_ids[:, 1]).any()  # the case that weights add up
    assert routing.num_tokens_per_expert().sum() == 2 * NUM_TOKENS


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts_per_tok": 2, "second_expert_policy": "sampling"},
        {"router_noise_policy": "rsample", "token_drop_policy": "random"},
        {"num_experts_per_tok": 2, "second_expert_policy": "random", "token_drop_policy": "probability"},
        {"num_experts_per_tok": 3, "token_drop_policy": "random"},
    ],
)
def test_removed_rows_are_never_chosen(options: dict[str, Any]) -> None:
    layer = make_layer(MAP_WITH_REMOVED, **options).train()
    with torch.no_grad():
        layer.router.bias[[1, 4]] = 5.0
    _, routing = route(layer, inputs())
    assert not torch.isin(routing.choices, torch.tensor([1, 4])).any()
    probs_TK = routing.logits.softmax(dim=-1).gather(1, routing.choices)  # those over all rows
    torch.testing.assert_close(routing.weights, probs_TK * (routing.expert_ids < 3))


# --- configuration and checkpoints

FULL_MAP = [[1, 0, 1, 2], [0, 1, 2, 2, 3], [0, 0, 1, 2]]


def mapped_config(**overrides: Any) -> ZCodeM3Config:
    return tiny_config(**{"num_experts": 3, "expert_map": FULL_MAP, **overrides})


def test_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ZCodeM3ForConditionalGeneration(mapped_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    assert [p.shape[0] for name, p in model.named_parameters() if name.endswith("router.weight")] == [4, 5, 4]
    assert not any("expert_of_row" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded, info = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.expert_map == FULL_MAP
    tokens = torch.randint(4, 90, (3, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        outputs = [m(input_ids=tokens, decoder_input_ids=tokens).logits for m in (model, loaded)]
    assert torch.equal(*outputs)
    loaded.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_without_a_map_nothing_is_saved(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    assert "expert_map" not in (tmp_path / "config.json").read_text()
    assert ZCodeM3Config.from_pretrained(tmp_path).expert_map is None
    assert tiny_config().expert_map_per_layer("encoder") == {}
    assert mapped_config().expert_map_per_layer("encoder") == {1: FULL_MAP[0], 3: FULL_MAP[1]}
    assert mapped_config().expert_map_per_layer("decoder") == {1: FULL_MAP[2]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"expert_map": FULL_MAP[:2]}, r"expert_map lists 2 layers, but the model has 3 sparse layers"),
        ({"expert_map": [[0, 1, 2, 4], *FULL_MAP[1:]]}, r"expert_map\[0\] \(\[0, 1, 2, 4\]\) must have every expert"),
        ({"expert_map": [[0, 1, 1, 0], *FULL_MAP[1:]]}, r"every expert from 0 to 2"),
        ({"expert_map": [[0, 1, -1, 2], *FULL_MAP[1:]]}, r"every expert from 0 to 2"),
        ({"expert_map": [[0, 1, 2, 3]] * 3, "num_experts_per_tok": 4}, r"more than the rows with an expert \(3\)"),
        ({"num_experts": [3, 3, 4]}, r"expert_map\[2\] \(\[0, 0, 1, 2\]\) must have every expert from 0 to 3"),
    ],
)
def test_wrong_maps(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mapped_config(**overrides)


def test_more_experts_per_token_than_experts() -> None:
    """A token's rows may be those of one expert."""
    config = mapped_config(num_experts=1, expert_map=[[0, 0, 0]] * 3, num_experts_per_tok=2)
    assert config.num_experts_per_layer("decoder") == {1: 1}
