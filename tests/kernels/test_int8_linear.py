"""Linear layers on int8 weights, against the same arithmetic in float64."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from hf_moe_ted.kernels import int8_linear
from hf_moe_ted.kernels.int8_linear import PackedInt8Weights, has_exact_int8_products

pytestmark = pytest.mark.skipif(not has_exact_int8_products(), reason="needs a processor with exact int8 products")


def random_layer(num_outputs: int, num_inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """int8[O, I], float32[O], float32[O]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (num_outputs, num_inputs), generator=generator, dtype=torch.int8)
    return weight, torch.rand(num_outputs, generator=generator) / 127, torch.randn(num_outputs, generator=generator)


def reference(inputs: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """float64, with activations rounded to 255 levels per row, by hand."""
    step = inputs.float().abs().amax(dim=1, keepdim=True) / 127
    integers = (inputs.float() / step).round()
    return (integers.double() @ weight.double().T) * scale.double() * step.double() + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 2, 9, 64])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 32), (33, 20), (256, 512)])
def test_equals_the_arithmetic_in_float64(num_outputs: int, num_inputs: int, num_rows: int, dtype: torch.dtype) -> None:
    layer = random_layer(num_outputs, num_inputs)
    inputs = torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    output = PackedInt8Weights().linear(inputs, "up", *layer)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), reference(inputs, *layer), rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_others() -> None:
    layer, weights = random_layer(96, 64), PackedInt8Weights()
    inputs = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 40).unsqueeze(-1)
    together = weights.linear(inputs, 0, *layer)
    for row in range(40):
        assert torch.equal(weights.linear(inputs[row : row + 1], 0, *layer)[0], together[row])


def test_zeros_and_numbers_that_are_not_finite() -> None:
    weight, scale, bias = random_layer(8, 16)
    inputs = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    inputs[1] = 0.0
    inputs[2, 3] = torch.nan
    inputs[3, 3] = torch.inf
    output = PackedInt8Weights().linear(inputs, 0, weight, scale, bias)
    assert torch.equal(output[1], bias)
    assert not output[2:4].isfinite().any()
    assert output[[0, 4]].isfinite().all()


def test_changed_weights_are_packed_anew() -> None:
    weight, scale, bias = random_layer(32, 16)
    inputs = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    weights = PackedInt8Weights()
    before = weights.linear(inputs, "a", weight, scale, bias)
    weight.neg_()
    torch.testing.assert_close(weights.linear(inputs, "a", weight, scale, bias) - bias, bias - before)
    other = weight.clone().neg_()
    assert torch.equal(weights.linear(inputs, "a", other, scale, bias), before)


def test_is_packed_once_and_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = random_layer(32, 16), torch.ones(1, 16)
    num_reads = []
    product = int8_linear._product

    def reading(integers: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        num_reads.append(id(packed))
        return product(integers, packed, scale)

    monkeypatch.setattr(int8_linear, "_product", reading)
    weights = PackedInt8Weights()
    for _ in range(2):
        expected = weights.linear(inputs, 0, *layer)
    assert len(set(num_reads)) == 1
    for copied in (copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert copied._packed == {}
        assert torch.equal(copied.linear(inputs, 0, *layer), expected)


def test_inference_mode() -> None:
    with torch.inference_mode():
        layer = random_layer(32, 16)
        inputs = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
        output = PackedInt8Weights().linear(inputs, 0, *layer)
    torch.testing.assert_close(output.double(), reference(inputs, *layer), rtol=1e-5, atol=1e-5)
