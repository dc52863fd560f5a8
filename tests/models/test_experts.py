"""The stacked experts against separate feed-forward networks, in every implementation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.models.experts import ActivationWithDropout, ZCodeM3Experts
from hf_moe_ted.testing import tiny_config

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "zcode_grouped", "zcode_cpu")
NUM_EXPERTS, D_MODEL, FFN_DIM = 4, 32, 24


def _experts(implementation: str, seed: int = 0, **overrides: Any) -> ZCodeM3Experts:
    config = tiny_config(**overrides)
    config._experts_implementation = implementation
    experts = ZCodeM3Experts(config, NUM_EXPERTS, FFN_DIM)
    experts._is_expert_parallel = True  # as the layer sets it: skip ids of `num_experts`
    torch.manual_seed(seed)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def _separate_networks(experts: ZCodeM3Experts) -> list[nn.Sequential]:
    """The same weights as E ordinary networks."""
    networks = []
    for expert in range(NUM_EXPERTS):
        network = nn.Sequential(nn.Linear(D_MODEL, FFN_DIM), nn.ReLU(), nn.Linear(FFN_DIM, D_MODEL))
        values = (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
        for parameter, value in zip(network.parameters(), values, strict=True):
            parameter.data.copy_(value[expert])
        networks.append(network)
    return networks


# two experts per token, or one, or (id 4) none; expert 3 is never chosen
TOP_2_IDS = torch.tensor([[0, 1], [2, 4], [4, 0], [4, 4], [1, 2], [0, 2]])
TOP_2_WEIGHTS = torch.tensor([[0.7, 0.2], [0.5, 0.0], [0.0, 0.4], [0.0, 0.0], [0.6, 0.3], [1.0, 1.0]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_equal_separate_networks(implementation: str, top_k: int) -> None:
    experts = _experts(implementation)
    networks = _separate_networks(experts)
    ids = TOP_2_IDS[:, :top_k].contiguous()
    hidden, cotangent = torch.randn(2, 6, D_MODEL)
    inputs, weights = hidden.clone().requires_grad_(), TOP_2_WEIGHTS[:, :top_k].clone().requires_grad_()
    reference_inputs, reference_weights = hidden.clone().requires_grad_(), weights.detach().clone().requires_grad_()

    output = experts(inputs, ids, weights)
    (output * cotangent).sum().backward()
    rows = []
    for token in range(6):
        row = torch.zeros(D_MODEL)
        for slot in range(top_k):
            if ids[token, slot] < NUM_EXPERTS:
                row = row + networks[ids[token, slot]](reference_inputs[token]) * reference_weights[token, slot]
        rows.append(row)
    reference = torch.stack(rows)
    (reference * cotangent).sum().backward()

    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(output, reference, **close)
    assert output[3].count_nonzero() == 0, "a token without expert"
    torch.testing.assert_close(inputs.grad, reference_inputs.grad, **close)
    torch.testing.assert_close(weights.grad, reference_weights.grad, **close)
    for index, name in enumerate(("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")):
        gradient = experts.get_parameter(name).grad
        assert gradient is not None
        for expert, network in enumerate(networks):
            expected = list(network.parameters())[index].grad
            if expected is None:  # never used
                assert gradient[expert].count_nonzero() == 0
            else:
                torch.testing.assert_close(gradient[expert], expected, **close)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_token_at_any_expert(implementation: str) -> None:
    experts = _experts(implementation)
    inputs = torch.randn(6, D_MODEL, requires_grad=True)
    output = experts(inputs, torch.full((6, 2), NUM_EXPERTS), torch.zeros(6, 2))
    assert output.count_nonzero() == 0
    (output * torch.randn(6, D_MODEL)).sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.count_nonzero() == 0
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad.count_nonzero() == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_stands_in_a_skipped_token_does_not_matter(implementation: str) -> None:
    experts = _experts(implementation)
    hidden = torch.randn(6, D_MODEL)
    expected = experts(hidden, TOP_2_IDS, TOP_2_WEIGHTS)
    hidden[3] = 1e30
    torch.testing.assert_close(experts(hidden, TOP_2_IDS, TOP_2_WEIGHTS), expected)


def test_shapes_of_the_stacked_parameters() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in _experts("eager").named_parameters()}
    assert shapes == {
        "up_proj": (NUM_EXPERTS, FFN_DIM, D_MODEL),
        "up_proj_bias": (NUM_EXPERTS, FFN_DIM),
        "down_proj": (NUM_EXPERTS, D_MODEL, FFN_DIM),
        "down_proj_bias": (NUM_EXPERTS, D_MODEL),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_activation_dropout_runs_inside_the_experts_in_training_only(implementation: str) -> None:
    hidden = torch.randn(6, D_MODEL)

    def run(training: bool, dropout: float) -> Tensor:
        experts = _experts(implementation, activation_dropout=dropout).train(training)
        return experts(hidden, TOP_2_IDS, TOP_2_WEIGHTS)

    expected = run(training=False, dropout=0.0)
    torch.testing.assert_close(run(training=False, dropout=0.5), expected)
    torch.testing.assert_close(run(training=True, dropout=0.0), expected)
    assert (run(training=True, dropout=0.5) - expected).abs().max() > 0.1


def test_activation_with_dropout() -> None:
    module = ActivationWithDropout(tiny_config(activation_function="relu", activation_dropout=0.25))
    values = torch.linspace(-1.0, 1.0, 1000)
    assert torch.equal(module.eval()(values), values.relu())
    dropped = module.train()(values)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], values.relu()[kept] / 0.75)
    assert 0.65 < kept[values > 0].float().mean() < 0.85
    assert torch.equal(module.activation(values), values.relu())


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_other_activations(implementation: str, activation: str) -> None:
    experts = _experts(implementation, activation_function=activation)
    hidden = torch.randn(1, D_MODEL)
    function = getattr(nn.functional, activation)
    inner = function(hidden @ experts.up_proj[2].T + experts.up_proj_bias[2])
    expected = 0.5 * (inner @ experts.down_proj[2].T + experts.down_proj_bias[2])
    torch.testing.assert_close(experts(hidden, torch.tensor([[2]]), torch.tensor([[0.5]])), expected)


def test_default_implementation_is_grouped_mm_and_can_be_changed() -> None:
    calls: list[int] = []

    def counting(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        calls.append(hidden_states.shape[0])
        return torch.zeros_like(hidden_states)

    model = ZCodeM3ForConditionalGeneration(tiny_config()).eval()
    assert model.config._experts_implementation == ("zcode_fused" if torch.cuda.is_available() else "grouped_mm")
    ALL_EXPERTS_FUNCTIONS["counting"] = counting
    try:
        model.set_experts_implementation("counting")
        model(input_ids=torch.full((1, 5), 7), decoder_input_ids=torch.full((1, 3), 7))
    finally:
        del ALL_EXPERTS_FUNCTIONS["counting"]
    assert calls == [5, 5, 3]
    with pytest.raises(ValueError, match="no_such"):
        model.set_experts_implementation("no_such")


@pytest.mark.parametrize("implementation", ["grouped_mm", "zcode_grouped", "zcode_fused"])
def test_grouped_products_refuse_widths_that_their_kernels_cannot_read(implementation: str) -> None:
    for name in ("d_model", "encoder_ffn_dim", "decoder_ffn_dim"):
        width = 36 if name == "d_model" else 60
        message = (
            rf"'{implementation}' needs widths that are multiples of 8, got {{'{name}': {width}}}; use 'zcode_cpu'"
        )
        config = tiny_config(**{name: width}, experts_implementation=implementation)
        with pytest.raises(ValueError, match=message):
            ZCodeM3ForConditionalGeneration(config)
        model = ZCodeM3ForConditionalGeneration(tiny_config(**{name: width}))
        with pytest.raises(ValueError, match=message):
            model.set_experts_implementation(implementation)
    ZCodeM3ForConditionalGeneration(tiny_config(encoder_ffn_dim=60, encoder_sparse_step=0)).set_experts_implementation(
        implementation
    )


@pytest.mark.parametrize("has_gpu", [False, True])
def test_default_implementation_takes_the_widths(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    of_even = ZCodeM3ForConditionalGeneration(tiny_config()).config._experts_implementation
    assert of_even == ("zcode_fused" if has_gpu else "grouped_mm")
    monkeypatch.undo()
    ids = torch.full((1, 5), 7)
    for implementation in (None, "eager", "batched_mm", "zcode_cpu"):
        config = tiny_config(encoder_ffn_dim=60, d_model=36, experts_implementation=implementation)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: has_gpu)
            model = ZCodeM3ForConditionalGeneration(config)
        assert model.config._experts_implementation == (implementation or "eager")
        assert model(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()


def test_default_implementation_takes_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.full((1, 5), 7)
    torch.set_default_dtype(torch.float64)
    try:
        model = ZCodeM3ForConditionalGeneration(tiny_config())
        with pytest.raises(ValueError, match="'grouped_mm' needs at most float32, got"):
            model.set_experts_implementation("grouped_mm")
        assert model(input_ids=ids, decoder_input_ids=ids).logits.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "case",
    [
        {"d_model": 36, "ffn_dim": 66},
        {"dtype": torch.float64},
        {"num_experts": 1},
        {"num_tokens": 0},
        {"d_model": 36, "ffn_dim": 66, "num_tokens": 0},
        {"activation_function": "gelu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["zcode_grouped", "zcode_fused", "zcode_cpu"])
def test_our_implementations_take_what_the_loop_takes(implementation: str, case: dict[str, Any]) -> None:
    """Widths such as a tensor-parallel rank's share, dtypes such as `model.double()`'s, which no config foretells."""
    sizes = {"d_model": D_MODEL, "ffn_dim": FFN_DIM, "num_experts": NUM_EXPERTS, "num_tokens": 9} | case
    dtype, fields = case.get("dtype", torch.float32), {"d_model": sizes["d_model"]}
    if "activation_function" in case:
        fields["activation_function"] = case["activation_function"]
    results = []
    for name in ("eager", implementation):
        torch.manual_seed(0)
        config = tiny_config(**fields)
        config._experts_implementation = name
        experts = ZCodeM3Experts(config, sizes["num_experts"], sizes["ffn_dim"])
        experts._is_expert_parallel = True
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.3)
        experts.to(dtype)
        hidden = torch.randn(sizes["num_tokens"], sizes["d_model"], dtype=dtype, requires_grad=True)
        ids = torch.randint(sizes["num_experts"] + 1, (sizes["num_tokens"], 2))
        weights = torch.rand(ids.shape, dtype=dtype) * (ids < sizes["num_experts"])
        output = experts(hidden, ids, weights)
        output.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(experts(hidden, ids, weights), output, atol=1e-5, rtol=1e-5)
        results.append([output, hidden.grad, *(parameter.grad for parameter in experts.parameters())])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
