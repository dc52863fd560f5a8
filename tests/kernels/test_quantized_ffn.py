"""Kernels of quantized experts, in Triton's interpreter, against a float64 loop over their rounded weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_experts_cases import CASES, DEVICE, assert_near
from quantized_experts_cases import expected_output, make_quantized, random_inputs
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from hf_moe_ted.kernels import quantized_ffn
from hf_moe_ted.kernels.quantized_small_batch import MAX_SLOTS

# bits, weights per scale, d_model, inner width; scales are of rows, of what is summed at once, or of single weights
FORMATS = [
    (8, None, 24, 40),
    (8, None, 34, 21),
    (8, 11, 22, 33),
    (4, None, 34, 22),
    (4, 32, 32, 96),
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


@pytest.mark.parametrize(
    ("case", "num_tokens", "top_k", "num_experts"),
    [
        *((case, *shape) for case in CASES for shape in ((6, 2, 20), (150, 1, 2))),
        ("random", 1, 1, 4),
        ("some dropped", 20, 2, 2),
        ("all on one", 20, 2, 2),
    ],
)
def test_each_routing_equals_the_reference(case, num_tokens, top_k, num_experts, ways, poisoned_buffers):
    quantized, experts = make_quantized(4, 16, num_experts, 16, 32, torch.float32)
    inputs = random_inputs(case, num_tokens, top_k, experts, torch.float32)
    assert_near(run(quantized, inputs), expected_output(experts, inputs), 1e-5)
    assert len(ways) == 2


@pytest.mark.parametrize(
    ("bits", "group_size", "num_tokens", "top_k"), [(8, None, *FEW), (4, 32, *FEW), (4, None, *MANY), (4, 32, *MANY)]
)
def test_half_precision(bits, group_size, num_tokens, top_k, ways, poisoned_buffers):
    # not bfloat16: the interpreter multiplies its bits as integers
    quantized, experts = make_quantized(bits, group_size, 3, 96, 32, torch.float16)
    inputs = random_inputs("some dropped", num_tokens, top_k, experts, torch.float16)
    (output,) = run(quantized, inputs)
    assert output.dtype == torch.float16
    assert_near([output], expected_output(experts, inputs), 2e-3)
    assert len(ways) == 2


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("num_tokens", [3, 70])
def test_other_activations_run_between_the_kernels(activation, num_tokens, ways, poisoned_buffers):
    quantized, experts = make_quantized(4, 32, 3, 32, 64, torch.float32, activation_function=activation)
    inputs = random_inputs("some dropped", num_tokens, 1, experts, torch.float32)
    (output,) = run(quantized, inputs)
    assert len(ways) == 2
    experts.config._experts_implementation = "eager"
    with torch.no_grad():
        torch.testing.assert_close(output, experts(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [3, 70])
def test_experts_and_tokens_do_not_touch_others(num_tokens, ways):
    quantized, _ = make_quantized(8, None, 4, 16, 24, torch.float32)
    hidden = torch.randn(num_tokens, 16, device=DEVICE)
    ids = torch.arange(num_tokens, device=DEVICE).remainder(2).mul(2).unsqueeze(-1)  # experts 0 and 2
    weights = torch.rand(num_tokens, 1, device=DEVICE)
    expected = run(quantized, (hidden, ids, weights))[0]
    for name in ("up_proj_scale", "down_proj_scale", "up_proj_bias", "down_proj_bias"):
        quantized.get_parameter(name)[[1, 3]] = torch.nan
    hidden[1] = torch.nan
    output = run(quantized, (hidden, ids, weights))[0]
    others = torch.arange(num_tokens, device=DEVICE) != 1
    assert torch.equal(output[others], expected[others])
    assert len(ways) == 4


def test_without_any_expert_or_token(ways, poisoned_buffers):
    quantized, experts = make_quantized(4, None, 3, 16, 24, torch.float32)
    for num_tokens in (10, 70):
        hidden, ids, weights = random_inputs("random", num_tokens, 1, experts, torch.float32)
        assert run(quantized, (hidden, ids.fill_(4), weights))[0].count_nonzero() == 0
    assert len(ways) == 4
    assert run(quantized, (hidden[:0], ids[:0], weights[:0]))[0].shape == (0, 16)


def test_gradients_and_the_loop_take_other_ways(ways):
    quantized, experts = make_quantized(4, None, 3, 16, 24, torch.float32)
    hidden, ids, weights = random_inputs("random", 5, 1, experts, torch.float32)
    output = quantized(hidden.clone().requires_grad_(), ids, weights)
    assert output.requires_grad
    assert quantized(hidden, ids, weights.clone().requires_grad_()).requires_grad
    quantized.config._experts_implementation = "eager"
    quantized(hidden, ids, weights)
    assert not ways
    quantized.config._experts_implementation = "zcode_fused"
    assert_near([quantized(hidden, ids, weights)], [output.detach().double()], 1e-5)
    assert len(ways) == 2
    with pytest.raises(ValueError, match="cannot be trained"):
        quantized.train()(hidden, ids, weights)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [3, 70])
def test_compiled_into_one_graph(num_tokens):
    quantized, experts = make_quantized(4, None, 3, 16, 24, torch.float32)
    inputs = random_inputs("some dropped", num_tokens, 1, experts, torch.float32)
    compiled = torch.compile(quantized, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), quantized(*inputs))


def test_operator_is_what_torch_compile_needs():
    quantized, experts = make_quantized(4, None, 3, 16, 24, torch.float32)
    _, ids, weights = random_inputs("some dropped", 3, 1, experts, torch.float32)
    no_plan = torch.empty(0, dtype=torch.int32, device=DEVICE)  # so few slots need none
    matrix = [quantized.get_parameter(f"down_proj_{kind}") for kind in ("packed", "scale", "bias")]
    arguments = (torch.rand(3, 24, device=DEVICE), ids.contiguous(), no_plan, weights, *matrix, False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(quantized_ffn.quantized_linear_op, arguments, test_utils=checks)
