"""Kernels of quantized experts, in Triton's interpreter, against a float64 loop over their rounded weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_experts_cases import CASES, assert_near
from quantized_experts_cases import expected_output, make_quantized, random_inputs
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from hf_moe_ted.kernels import quantized_ffn
from hf_moe_ted.kernels.quantized_small_batch import MAX_SLOTS

# bits, weights per scale, d_model, inner width; scales are those of rows, of what is summed at once, or of single weights
FORMATS = [
    (8, None, 24, 40),
    (8, None, 34, 21),
    (8, 32, 64, 32),
    (8, 11, 22, 33),
    (4, None, 34, 22),
    (4, 32, 32, 96),
    (4, 64, 192, 64),
    (4, 128, 128, 128),
    (4, 6, 36, 42),
    (4, 3, 18, 24),
]
FEW, MANY = (3, 2), (33, 2)  # tokens and experts per token, for each of the two ways


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernels run."""
    ways = []

    def record(name: str) -> None:
        function = getattr(quantized_ffn, name)

        def recorded(*args: Any, **options: Any) -> Any:
            ways.append(name)
            return function(*args, **options)

        monkeypatch.setattr(quantized_ffn, name, recorded)

    record("small_batch_quantized_linear")
    record("quantized_grouped_linear")
    return ways


@torch.no_grad()
def run(experts: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [experts(*inputs)]


@pytest.mark.parametrize(("num_tokens", "top_k"), [FEW, MANY])
@pytest.mark.parametrize(("bits", "group_size", "d_model", "ffn_dim"), FORMATS)
def test_each_format_equals_the_reference(
    bits, group_size, d_model, ffn_dim, num_tokens, top_k, ways, poisoned_buffers
):
    quantized, experts = make_quantized(bits, group_size, 3, d_model, ffn_dim, torch.float32)
    inputs = random_inputs("some dropped", num_tokens, top_k, experts, torch.float32)
    assert_near(run(quantized, inputs), expected_output(experts, inputs), 1e-5)
    assert ways == 2 * [
        "small_batch_quantized_linear" if num_tokens * top_k <= MAX_SLOTS else "quantized_grouped_linear"
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), [(1, 1, 4), (20, 2, 2), (6, 2, 20), (40, 3, 4), (80, 1, 20)]
)
def test_each_routing_equals_the_reference(case, num_tokens, top_k, num_experts, ways, poisoned_buffers):
    quantized, experts = make_quantized(4, 32, num_experts, 32, 32, torch.float32)
    inputs = random_inputs(case, num_tokens, top_k, experts, torch.float32)
    assert_near(run(quantized, inputs), expected_output(experts, inputs), 1e-5)
    assert len(ways) == 2


@pytest.mark.parametrize(("num_tokens", "top_k"), [FEW, MANY])
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32), (4, None)])
def test_half_precision(bits, group_size, num_tokens, top_k, ways, poisoned_buffers):
    # not bfloat16: the interpreter multiplies its bits as integers
    quantized, experts = make_quantized(bits, group_size, 3, 96, 32, torch.float16)
    inputs = random_inputs("some dropped", num_tokens, top_k, experts, torch.float16)
    (output,) = run(quantized, inputs)
    assert output.dtype == torch.float16
    assert_near([output], expected_output(experts, inputs), 2e-3)
    assert len(ways) == 2
