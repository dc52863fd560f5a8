"""Linear layers in 8 bits whose weights become floats, as they do on GPUs."""

import pytest
import torch
from torch import nn

from hf_moe_ted.compression import quantized_linear
from hf_moe_ted.compression.quantized_linear import QuantizedLinear
from hf_moe_ted.compression.rounding import dequantize_weight


@pytest.mark.parametrize(("bias", "max_floats"), [(True, 8 * 24), (False, 8 * 24), (True, 1), (True, 37 * 24)])
def test_large_weights_become_floats_in_parts(bias: bool, max_floats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 37, bias=bias)
    quantized = QuantizedLinear(linear)
    quantized.quantize_from(linear.weight, "weight")
    whole = dequantize_weight(quantized.weight_packed, quantized.weight_scale, 8)
    inputs = torch.randn(2, 3, 24)
    sizes: list[int] = []

    def counted(packed: torch.Tensor, *args: object) -> torch.Tensor:
        sizes.append(packed.numel())
        return dequantize_weight(packed, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(quantized_linear, "dequantize_weight", counted)
    monkeypatch.setattr(quantized_linear, "_MAX_FLOATS", max_floats)
    monkeypatch.setattr(QuantizedLinear, "_multiplies_integers", lambda self: False)
    with torch.no_grad():
        outputs = quantized(inputs)
        torch.testing.assert_close(outputs, nn.functional.linear(inputs, whole, linear.bias), rtol=0, atol=1e-5)
    assert sum(sizes) == 37 * 24
    assert max(sizes) <= max(max_floats, 24)  # a row at least

    sizes.clear()
    quantized(inputs.requires_grad_()).sum().backward()  # with gradients all at once
    assert sizes == [37 * 24]
    torch.testing.assert_close(inputs.grad, whole.sum(0).expand_as(inputs), rtol=0, atol=1e-5)
