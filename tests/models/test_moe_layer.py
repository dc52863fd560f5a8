"""The sparse layer against a dense reference: every expert on every token, weighted, in float64.

The reference shares no code with the package but draws the random numbers of Random Token Selection the same way.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_moe_ted import ZCodeM3Config
from hf_moe_ted.models.losses import load_balancing_loss, router_z_loss
from hf_moe_ted.models.moe_layer import ZCodeM3DenseFFN, ZCodeM3MoELayer
from hf_moe_ted.testing import tiny_config

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "zcode_grouped")
BATCH, LENGTH, D_MODEL, FFN_DIM, NUM_EXPERTS = 3, 7, 32, 24, 4
AUX_COEF, Z_COEF = 0.5, 0.1  # large, so that a wrong gradient of a router loss shows


def _config(implementation: str = "eager", **overrides: Any) -> ZCodeM3Config:
    config = tiny_config(router_bias=True, **overrides)
    config._experts_implementation = implementation
    return config


def _layer(config: ZCodeM3Config, seed: int = 0) -> ZCodeM3MoELayer:
    layer = ZCodeM3MoELayer(config, NUM_EXPERTS, FFN_DIM)
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.train()


def _inputs(padding: str | None, seed: int = 1) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(BATCH, LENGTH, D_MODEL, generator=generator)
    if padding is None:
        return hidden, None
    lengths = torch.tensor([7, 3, 5]).unsqueeze(1)
    positions = torch.arange(LENGTH)
    return hidden, positions < lengths if padding == "right" else positions >= LENGTH - lengths


# --- the reference


@dataclass
class Reference:
    output_TD: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    kept: list[tuple[int, int]]  # (token, choice)
    num_slots: int  # of real tokens


def _choices(probs_TE: Tensor, top_k: int) -> list[list[int]]:
    return [sorted(range(NUM_EXPERTS), key=lambda e: -row[e])[:top_k] for row in probs_TE.tolist()]


def _kept_slots(
    choices: list[list[int]], real: list[bool], capacity: float, random_TE: Tensor | None
) -> list[tuple[int, int]]:
    """(token, choice) of every slot that is computed: each expert serves its queue until it is full."""
    kept = []
    for expert in range(NUM_EXPERTS):
        queue = []
        for token, chosen in enumerate(choices):
            if real[token] and expert in chosen:
                order = token if random_TE is None else -random_TE[token, expert].item()
                queue.append((chosen.index(expert), order, token))
        queue.sort()
        kept += [(token, choice) for choice, _, token in queue[: int(min(capacity, len(queue)))]]
    return kept


def _reference(
    config: ZCodeM3Config, parameters: dict[str, Tensor], hidden_TD: Tensor, real: list[bool], random_TE: Tensor
) -> Reference:
    """Loop over all experts on all tokens, in the dtype of the arguments."""
    top_k = config.num_experts_per_tok
    logits_TE = hidden_TD @ parameters["router.weight"].T + parameters["router.bias"]
    probs_TE = logits_TE.exp() / logits_TE.exp().sum(dim=1, keepdim=True)
    choices = _choices(probs_TE, top_k)

    capacity = math.inf
    if config.capacity_factor is not None:
        capacity = max(math.ceil(sum(real) * top_k / NUM_EXPERTS * config.capacity_factor), config.min_capacity)
    kept = _kept_slots(choices, real, capacity, random_TE if config.token_drop_policy == "random" else None)

    def zero_one(slots: list[tuple[int, int]]) -> Tensor:
        matrix = torch.zeros_like(probs_TE)
        for token, choice in slots:
            matrix[token, choices[token][choice]] = 1.0
        return matrix

    all_slots = [(token, choice) for token in range(len(choices)) for choice in range(top_k)]
    weights_TE = probs_TE * zero_one(kept)
    if config.normalize_router_weights == "before_dropping":
        weights_TE = weights_TE / (probs_TE * zero_one(all_slots)).sum(dim=1, keepdim=True)
    elif config.normalize_router_weights == "after_dropping":
        total_T1 = weights_TE.sum(dim=1, keepdim=True)
        weights_TE = weights_TE / torch.where(total_T1 > 0, total_T1, torch.ones_like(total_T1))

    output_TD = torch.zeros_like(hidden_TD)
    for expert in range(NUM_EXPERTS):
        inner = hidden_TD @ parameters["experts.up_proj"][expert].T + parameters["experts.up_proj_bias"][expert]
        outer = inner.clamp(min=0) @ parameters["experts.down_proj"][expert].T
        outer = outer + parameters["experts.down_proj_bias"][expert]
        output_TD = output_TD + weights_TE[:, expert : expert + 1] * outer

    real_tokens = [token for token, is_real in enumerate(real) if is_real]
    first_choices = zero_one([(token, 0) for token in real_tokens])
    share_E = first_choices.sum(dim=0) / len(real_tokens)
    aux_loss = NUM_EXPERTS * (probs_TE[real_tokens].mean(dim=0) * share_E).sum()
    z_loss = (logits_TE[real_tokens].exp().sum(dim=1).log() ** 2).mean()
    return Reference(output_TD, aux_loss, z_loss, kept, num_slots=len(real_tokens) * top_k)


# --- comparisons


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("dropping", [None, "position", "random"])
@pytest.mark.parametrize("normalize", [None, "before_dropping", "after_dropping"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layer_equals_dense_reference(
    implementation: str, top_k: int, normalize: str | None, dropping: str | None, padding: str | None
) -> None:
    config = _config(
        implementation,
        num_experts_per_tok=top_k,
        normalize_router_weights=normalize,
        capacity_factor=None if dropping is None else 0.7,
        min_capacity=1,
        token_drop_policy=dropping or "random",
    )
    layer = _layer(config)
    hidden, mask = _inputs(padding)
    cotangent = torch.randn(BATCH * LENGTH, D_MODEL, generator=torch.Generator().manual_seed(2))

    torch.manual_seed(5)
    inputs = hidden.clone().requires_grad_()
    output, routing = layer(inputs, mask)
    aux_loss = load_balancing_loss(routing.logits, routing.choices, routing.token_mask)
    z_loss = router_z_loss(routing.logits, routing.token_mask)
    output_TD = output.view(-1, D_MODEL)
    loss = (output_TD * cotangent).sum() + AUX_COEF * aux_loss + Z_COEF * z_loss
    loss.backward()

    torch.manual_seed(5)
    random_TE = torch.rand(BATCH * LENGTH, NUM_EXPERTS)
    parameters = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    reference_inputs = hidden.double().requires_grad_()
    real = [True] * (BATCH * LENGTH) if mask is None else mask.flatten().tolist()
    expected = _reference(config, parameters, reference_inputs.view(-1, D_MODEL), real, random_TE)
    expected_loss = (expected.output_TD * cotangent).sum() + AUX_COEF * expected.aux_loss + Z_COEF * expected.z_loss
    expected_loss.backward()

    if dropping is None:
        assert len(expected.kept) == expected.num_slots
    else:
        assert 0.5 < len(expected.kept) / expected.num_slots < 0.95, "the case drops nothing, or too much"
    computed = (routing.expert_ids < NUM_EXPERTS).nonzero().tolist()
    assert sorted(map(tuple, computed)) == sorted(expected.kept)

    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(output_TD, expected.output_TD.float(), **close)
    torch.testing.assert_close(aux_loss, expected.aux_loss.float(), **close)
    torch.testing.assert_close(z_loss, expected.z_loss.float(), **close)
    torch.testing.assert_close(loss, expected_loss.float(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(inputs.grad, reference_inputs.grad.float(), **close)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        expected_gradient = parameters[name].grad.float()
        assert expected_gradient.abs().max() > 1e-3, f"{name}: nothing to compare"
        # sums over tokens, rounded where they are largest
        close["atol"] = max(1e-5, 1e-6 * expected_gradient.abs().max().item())
        torch.testing.assert_close(parameter.grad, expected_gradient, msg=lambda m, n=name: f"{n}: {m}", **close)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_expert_has_a_gradient_and_it_is_zero_without_tokens(implementation: str, top_k: int) -> None:
    layer = _layer(_config(implementation, num_experts_per_tok=top_k, capacity_factor=None))
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([0.0, 0.0, -100.0, 0.0]))
    hidden, _ = _inputs(None)
    output, routing = layer(hidden)
    (output * torch.randn_like(output)).sum().backward()
    num_tokens = routing.num_tokens_per_expert()
    assert (num_tokens > 0).tolist() == [True, True, False, True]
    for name, parameter in layer.experts.named_parameters():
        assert parameter.grad is not None, name
        has_gradient = parameter.grad.flatten(1).abs().amax(dim=1) > 1e-3
        assert has_gradient.tolist() == [True, True, False, True], name


def test_router_learns_from_the_output_only_if_a_weight_depends_on_it() -> None:
    """With one expert per token, normalised weights are 1: only the router losses train the router then."""
    for normalize, learns in ((None, True), ("after_dropping", False)):
        layer = _layer(_config(normalize_router_weights=normalize, capacity_factor=None))
        (layer(_inputs(None)[0])[0] ** 2).sum().backward()
        assert (layer.router.weight.grad.abs().max() > 1e-3) == learns


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropped_and_padding_tokens_get_zeros(implementation: str) -> None:
    layer = _layer(_config(implementation, capacity_factor=0.5, min_capacity=0, token_drop_policy="position"))
    hidden, mask = _inputs("right")
    output, routing = layer(hidden, mask)
    skipped = (routing.expert_ids == NUM_EXPERTS).view(BATCH, LENGTH)
    assert (skipped & mask).any(), "a token is dropped"
    assert skipped[~mask].all()
    assert output[skipped].count_nonzero() == 0
    assert (output[~skipped].abs().amax(dim=-1) > 1e-2).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_changes_nothing_for_real_tokens(implementation: str, padding: str) -> None:
    """In training with capacity, too: what stands in the padding, and how much of it, does not matter."""
    config = _config(implementation, capacity_factor=0.7, min_capacity=0, token_drop_policy="position")
    layer = _layer(config)
    hidden, mask = _inputs(padding)
    output, routing = layer(hidden, mask)
    alone, alone_routing = layer(hidden[mask].unsqueeze(0))
    torch.testing.assert_close(output[mask], alone[0])
    assert alone_routing.dropped_share() > 0
    torch.testing.assert_close(routing.dropped_share(), alone_routing.dropped_share())
    for loss, alone_loss in (
        (
            load_balancing_loss(routing.logits, routing.choices, routing.token_mask),
            load_balancing_loss(alone_routing.logits, alone_routing.choices),
        ),
        (router_z_loss(routing.logits, routing.token_mask), router_z_loss(alone_routing.logits)),
    ):
        torch.testing.assert_close(loss, alone_loss)

    noisy = torch.where(mask.unsqueeze(-1), hidden, 100.0 * torch.randn_like(hidden))
    torch.testing.assert_close(layer(noisy, mask)[0], output)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batch_of_padding_only(implementation: str) -> None:
    layer = _layer(_config(implementation, capacity_factor=1.0, num_experts_per_tok=2))
    hidden = _inputs(None)[0].requires_grad_()
    output, _ = layer(hidden, torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    assert output.count_nonzero() == 0
    (output * torch.randn_like(output)).sum().backward()
    for gradient in [hidden.grad, *(parameter.grad for parameter in layer.parameters())]:
        assert gradient is not None
        assert gradient.count_nonzero() == 0


def test_evaluation_does_not_depend_on_the_other_tokens() -> None:
    layer = _layer(_config(capacity_factor=0.5, min_capacity=0)).eval()
    hidden, _ = _inputs(None)
    together, _ = layer(hidden)
    for sentence in range(BATCH):
        torch.testing.assert_close(layer(hidden[sentence : sentence + 1])[0], together[sentence : sentence + 1])


def test_experts_see_the_input_without_jitter() -> None:
    config = _config(router_noise_policy="jitter", router_jitter_noise=0.5, capacity_factor=None)
    layer = _layer(config)
    seen: list[Tensor] = []
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    hidden, _ = _inputs(None)
    before = hidden.clone()
    _, routing = layer(hidden)
    assert not torch.equal(routing.logits, hidden.view(-1, D_MODEL) @ layer.router.weight.T + layer.router.bias)
    assert torch.equal(seen[0], before.view(-1, D_MODEL))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_layer_keeps_its_dtype_and_the_values(implementation: str) -> None:
    layer = _layer(_config(implementation, num_experts_per_tok=2, capacity_factor=None)).bfloat16()
    hidden = _inputs(None)[0].bfloat16()
    output, routing = layer(hidden)
    assert output.dtype == torch.bfloat16
    assert routing.weights.dtype == torch.float32
    expected, _ = layer.float()(hidden.float())
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_residual_branch_is_mixed_in_by_learned_coefficients(implementation: str) -> None:
    layer = _layer(_config(implementation, use_residual=True, capacity_factor=None))
    hidden, mask = _inputs("right")
    output, _ = layer(hidden, mask)
    residual, layer.residual = layer.residual, None
    assert residual is not None
    coefficients = (hidden @ residual.coefficient.weight.T + residual.coefficient.bias).softmax(dim=-1)
    mlp = residual.mlp
    dense = (hidden @ mlp.fc1.weight.T + mlp.fc1.bias).clamp(min=0) @ mlp.fc2.weight.T + mlp.fc2.bias
    expected = layer(hidden, mask)[0] * coefficients[..., :1] + dense * coefficients[..., 1:]
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_expert_output_masking(implementation: str) -> None:
    """In training whole expert outputs are left out, unscaled; in evaluation all are scaled by the kept share."""
    probability = 0.25
    options = {"num_experts_per_tok": 2, "capacity_factor": None, "normalize_router_weights": "before_dropping"}
    layer = _layer(_config(implementation, moe_token_dropout=probability, **options))
    plain = _layer(_config(implementation, **options))
    plain.load_state_dict(layer.state_dict())
    hidden = torch.randn(1, 2000, D_MODEL)

    torch.testing.assert_close(layer.eval()(hidden)[0], plain.eval()(hidden)[0] * (1 - probability))

    _, routing = plain(hidden)
    torch.manual_seed(5)
    output, _ = layer.train()(hidden)
    torch.manual_seed(5)
    kept_TK = torch.rand(2000, 2) >= probability
    assert kept_TK.float().mean().item() == pytest.approx(1 - probability, abs=0.03)
    expected = plain.experts(hidden[0], routing.expert_ids, routing.weights * kept_TK)
    torch.testing.assert_close(output[0], expected)


def test_dense_feed_forward() -> None:
    torch.manual_seed(0)
    layer = ZCodeM3DenseFFN(tiny_config(), FFN_DIM)
    hidden, mask = _inputs("right")
    expected = (hidden @ layer.fc1.weight.T + layer.fc1.bias).clamp(min=0) @ layer.fc2.weight.T + layer.fc2.bias
    torch.testing.assert_close(layer(hidden), expected)
    torch.testing.assert_close(layer(hidden, mask), expected)


CHANGES: dict[str, Any] = {
    "capacity_factor": 2.0,
    "min_capacity": 1,
    "token_drop_policy": "position",
    "num_experts_per_tok": 2,
    "router_noise_policy": "rsample",
    "router_jitter_noise": 0.9,
    "router_dtype": "bfloat16",
    "normalize_router_weights": "before_dropping",
    "moe_token_dropout": 0.5,
    "gating_dropout": 0.99,
    "activation_dropout": 0.5,
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_change_of_the_config_acts(field: str) -> None:
    """As if the layer had been made with it."""
    fields: dict[str, Any] = {"activation_function": "gelu", "capacity_factor": 0.7, "min_capacity": 6}

    def output(layer: ZCodeM3MoELayer) -> Tensor:
        torch.manual_seed(1)
        return layer(torch.randn(3, 9, 32))[0]

    def layer(**overrides: Any) -> ZCodeM3MoELayer:
        torch.manual_seed(0)
        config = tiny_config(**fields, **overrides)
        layer = ZCodeM3MoELayer(config, 4, 24).train()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        return layer

    changed = layer()
    before = output(changed)
    setattr(changed.router.config, field, CHANGES[field])
    fields.pop(field, None)
    expected = output(layer(**{field: CHANGES[field]}))
    assert torch.equal(output(changed), expected)
    assert not torch.equal(before, expected), "or this test could not fail"


def test_forward_leaves_no_trace() -> None:
    layer = _layer(_config(), seed=0)
    before = {name: {**vars(module)} for name, module in layer.named_modules()}
    layer(*_inputs("right"))
    assert {name: {**vars(module)} for name, module in layer.named_modules()} == before
