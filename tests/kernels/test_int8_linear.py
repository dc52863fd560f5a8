"""Linear layers on int8 weights, against the same arithmetic in float64."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_ted.kernels import int8_linear
from hf_moe_ted.kernels.int8_linear import Int8Layer, PackedInt8Weights, has_exact_int8_products, int8_levels
from hf_moe_ted.kernels.private_torch import has_fbgemm


@pytest.fixture(params=["processor", "processor, large", "fbgemm", "float32"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels of the processor, those for large matrices, of one without VNNI, and of one without int8 products."""
    if request.param == "processor, large":
        monkeypatch.setattr(int8_linear, "_MAX_SMALL_NUMEL", 0)
    elif request.param == "fbgemm":
        if not has_fbgemm():
            pytest.skip("needs FBGEMM, which is for x86 with AVX2")
        monkeypatch.setattr(int8_linear, "has_exact_int8_products", lambda: False)
        monkeypatch.setattr(int8_linear, "int8_levels", lambda: 63)
    elif request.param == "float32":
        monkeypatch.setattr(int8_linear, "int8_levels", lambda: None)
    return request.param


def random_layer(num_outputs: int, num_inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """int8[O, I], float32[O], float32[O]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (num_outputs, num_inputs), generator=generator, dtype=torch.int8)
    return weight, torch.rand(num_outputs, generator=generator) / 127, torch.randn(num_outputs, generator=generator)


def reference(inputs: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """float64, with activations rounded to the levels of the processor per row, by hand."""
    levels = int8_linear.int8_levels()
    if levels is None:
        return inputs.double() @ (weight.double() * scale.double().unsqueeze(-1)).T + bias.double()
    step = inputs.float().abs().amax(dim=1, keepdim=True) / levels
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
    atol = 1e-4 if int8_linear.int8_levels() is None else 1e-5  # sums of float32 are rounded
    torch.testing.assert_close(output.double(), reference(inputs, *layer), rtol=1e-5, atol=atol)


def test_a_row_does_not_depend_on_the_others(kernel: str) -> None:
    if kernel == "float32":
        pytest.skip("a product of float32 may round a row otherwise in a batch")
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
    torch.testing.assert_close(output[1], bias)
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
    num_packed = []
    pack = int8_linear._packed

    def packing(*arguments: Any) -> Any:
        num_packed.append(1)
        return pack(*arguments)

    monkeypatch.setattr(int8_linear, "_packed", packing)
    weights = PackedInt8Weights()
    for _ in range(2):
        expected = weights.linear(inputs, 0, *layer)
    assert num_packed == [1]
    for copied in (copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert copied._packed == {}
        assert torch.equal(copied.linear(inputs, 0, *layer), expected)


def test_inference_mode() -> None:
    with torch.inference_mode():
        layer = random_layer(32, 16)
        inputs = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
        output = PackedInt8Weights().linear(inputs, 0, *layer)
    torch.testing.assert_close(output.double(), reference(inputs, *layer), rtol=1e-5, atol=1e-5)


def test_several_layers_of_the_same_inputs() -> None:
    layers = [random_layer(32, 16, seed=seed) for seed in range(3)]
    inputs = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    weights = PackedInt8Weights()
    without_bias = Int8Layer(*layers[1][:2], None)
    together = weights.layers(inputs, "all", [Int8Layer(*layers[0]), without_bias, Int8Layer(*layers[2])])
    biases = [layers[0][2], torch.zeros(32), layers[2][2]]
    alone = [weights.linear(inputs, index, *layer[:2], biases[index]) for index, layer in enumerate(layers)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


def test_kernels_have_the_levels_that_they_can_add_up(kernel: str) -> None:
    if kernel == "processor":
        assert int8_levels() == (127 if has_exact_int8_products() else 63 if has_fbgemm() else None)
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    inputs = torch.full((2, 64), 3.0)  # the largest number in each place: sums are as large as they can be
    output = PackedInt8Weights().linear(inputs, 0, weight, torch.ones(32), torch.zeros(32))
    torch.testing.assert_close(output, torch.full((2, 32), 127 * 3.0 * 64))
