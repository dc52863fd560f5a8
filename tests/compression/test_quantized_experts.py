"""Quantized experts on integer products (what they run on without being asked to), beside those on rounded weights."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration
from hf_moe_ted.compression.quantize import quantize_experts
from hf_moe_ted.compression.quantized_experts import ExpertQuantizationConfig, QuantizedExperts
from hf_moe_ted.kernels import int8_linear

MakeModel = Callable[..., ZCodeM3ForConditionalGeneration]
EXPERTS = "model.encoder.layers.1.ffn.experts"


def tokens() -> Tensor:
    return torch.randint(4, 270, (3, 9), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(model: Any, implementation: str = "grouped_mm") -> Tensor:
    model.set_experts_implementation(implementation)
    return model(input_ids=tokens(), decoder_input_ids=tokens().flip(0)).logits


def exact_output(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """float64[T, D], every token through every expert."""
    up, down = experts.up_proj.double(), experts.down_proj.double()
    inner = torch.einsum("td,efd->tef", hidden.double(), up) + experts.up_proj_bias
    outputs = torch.einsum("tef,edf->ted", inner.relu(), down) + experts.down_proj_bias
    factor = torch.zeros(len(hidden), experts.num_experts + 1, dtype=torch.float64)
    return (outputs * factor.scatter_add(1, ids, weights.double())[:, :-1, None]).sum(dim=1)


@pytest.fixture(params=["processor", "no VNNI"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The integer products of the processor, and those of one without VNNI."""
    if int8_linear.int8_levels() is None:
        pytest.skip("needs a processor with integer products")
    if request.param == "no VNNI":
        monkeypatch.setattr(int8_linear, "has_exact_int8_products", lambda: False)
        monkeypatch.setattr(int8_linear, "int8_levels", lambda: 63)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 16, 128])
@torch.no_grad()
def test_relative_error_is_under_three_percent(num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    config = ZCodeM3Config(
        vocab_size=8, d_model=256, encoder_layers=2, decoder_layers=1, encoder_ffn_dim=1024, decoder_sparse_step=0,
        num_experts=8, max_position_embeddings=8,
    )  # fmt: skip
    model = ZCodeM3ForConditionalGeneration(config).eval()
    experts: Any = model.get_submodule(EXPERTS)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    quantized = quantize_experts(model.to(dtype))
    hidden = torch.randn(num_tokens, 256, generator=generator).to(dtype)
    ids = torch.rand(num_tokens, 9, generator=generator).topk(2).indices  # the id 8 is a dropped slot
    weights = torch.rand(num_tokens, 2, generator=generator).to(dtype)
    output = quantized.get_submodule(EXPERTS)(hidden, ids, weights)
    expected = exact_output(experts, hidden, ids, weights)
    assert output.dtype == dtype
    assert 0.005 < (output.double() - expected).norm() / expected.norm() < 0.03
    assert output[(ids == 8).all(dim=1)].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model(dtype: torch.dtype, make_model: MakeModel, tmp_path: Path) -> None:
    capacity = {"eval_capacity_factor": 0.8, "min_capacity": 0, "token_drop_policy": "position"}
    model = make_model(num_experts=[2, 4, 3], num_experts_per_tok=2, **capacity).to(dtype)
    quantized = quantize_experts(model, output_dir=tmp_path / "small")
    names = [*quantized.state_dict()]
    on_floats = logits_of(quantized, "eager")
    on_integers = logits_of(quantized)
    assert not torch.equal(on_integers, on_floats)
    assert (on_integers - on_floats).norm() / on_floats.norm() < 0.05
    assert torch.equal(logits_of(quantized, "eager"), on_floats)
    # packed weights are neither stored nor copied
    assert [*quantized.state_dict()] == names
    assert torch.equal(logits_of(copy.deepcopy(quantized)), on_integers)
    loaded = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        again = loaded(input_ids=tokens(), decoder_input_ids=tokens().flip(0)).logits
    assert torch.equal(again, on_integers)


@torch.no_grad()
def test_a_token_does_not_depend_on_its_batch(make_model: MakeModel) -> None:
    quantized = quantize_experts(make_model())
    experts: Any = quantized.get_submodule(EXPERTS)
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(3))
    ids, weights = torch.arange(20).unsqueeze(-1) % 4, torch.ones(20, 1)
    together = experts(hidden, ids, weights)
    alone = torch.cat([experts(hidden[t : t + 1], ids[t : t + 1], weights[t : t + 1]) for t in range(20)])
    assert torch.equal(together, alone)


def test_changed_weights_count(make_model: MakeModel) -> None:
    model, other = make_model(), make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5)
    quantized, expected = quantize_experts(model), quantize_experts(other)
    assert not torch.equal(logits_of(quantized), logits_of(expected))
    quantized.load_state_dict(expected.state_dict())
    assert torch.equal(logits_of(quantized), logits_of(expected))
    for parameter in quantized.parameters():
        parameter.data.zero_()  # which PyTorch does not count
    assert not torch.equal(logits_of(copy.deepcopy(quantized)), logits_of(expected))


def test_generates(make_model: MakeModel) -> None:
    model = make_model()
    quantized = quantize_experts(model)
    options = {"input_ids": tokens(), "num_beams": 2, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(quantized.generate(**options), model.generate(**options))


@pytest.mark.parametrize(
    "options",
    [{"bits": 4.0}, {"bits": True}, {"group_size": True}, {"group_size": 2.0}, {"group_size": "32"}, {"group_size": 0}],
)
def test_options_are_integers(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name} \({value!r}\) must be"):
        ExpertQuantizationConfig(**options)


@pytest.mark.parametrize(("bits", "group_size"), [(8, 16), (4, None), (4, 8)])
def test_other_formats_use_rounded_weights(bits: int, group_size: int | None, make_model: MakeModel) -> None:
    quantized = quantize_experts(make_model(), bits, group_size)
    assert torch.equal(logits_of(quantized), logits_of(quantized, "eager"))


def test_with_gradients_or_without_exact_products_weights_are_rounded_only(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = quantize_experts(make_model())
    expected = logits_of(quantized, "eager")
    batch = {"input_ids": tokens(), "decoder_input_ids": tokens().flip(0)}
    logits = quantized(**batch).logits
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert quantized.model.shared.weight.grad is not None
    monkeypatch.setattr(int8_linear, "int8_levels", lambda: None)
    torch.testing.assert_close(logits_of(quantized), expected)
    assert isinstance(quantized.get_submodule(EXPERTS), QuantizedExperts)
