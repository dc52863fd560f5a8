"""Experts for few slots against a float64 loop over the experts, and against the kernels for many slots."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_experts_cases import CASES, DEVICE, assert_near, make_experts, on_gpu, reference, routing
from torch import Tensor

from hf_moe_ted.models.experts import ZCodeM3Experts

pytest.importorskip("triton", reason="needs Triton")

import triton

from hf_moe_ted.kernels import fused_ffn
from hf_moe_ted.kernels.small_batch_ffn import MAX_SLOTS, small_batch_relu_experts_op

# tokens, experts per token, experts: fewer and more experts than slots, and each padded size
SMALL_SHAPES = [(1, 1, 4), (1, 3, 4), (5, 3, 20), (16, 1, 20), (17, 1, 4), (16, 2, 40), (21, 3, 4), (64, 1, 4)]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Plans of rows, which only the kernels for many slots need."""
    plan_rows, plans = fused_ffn.plan_rows, []

    def recorded(*args: Any) -> Tensor:
        plans.append(plan_rows(*args))
        return plans[-1]

    monkeypatch.setattr(fused_ffn, "plan_rows", recorded)
    return plans


def random_inputs(
    case: str, num_tokens: int, top_k: int, experts: ZCodeM3Experts, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, expert ids and weights."""
    hidden = torch.randn(num_tokens, experts.up_proj.shape[2], device=DEVICE, dtype=dtype)
    weights = torch.rand(num_tokens, top_k, device=DEVICE, dtype=dtype)
    return hidden, routing(case, num_tokens, top_k, experts.num_experts), weights


@torch.no_grad()
def run(experts: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [experts(*inputs)]


def expected_output(experts: ZCodeM3Experts, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    return reference(experts, *inputs, torch.zeros_like(inputs[0]))[:1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), SMALL_SHAPES)
def test_small_case_equals_the_reference(case, num_tokens, top_k, num_experts, plans, poisoned_buffers):
    experts = make_experts(num_experts, 24, 40, torch.float32)
    inputs = random_inputs(case, num_tokens, top_k, experts, torch.float32)
    assert_near(run(experts, inputs), expected_output(experts, inputs), 1e-5)
    assert not plans


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), SMALL_SHAPES)
def test_half_precision(num_tokens, top_k, num_experts, plans, poisoned_buffers):
    # not bfloat16: the interpreter multiplies its bits as integers
    experts = make_experts(num_experts, 136, 264, torch.float16)
    inputs = random_inputs("some dropped", num_tokens, top_k, experts, torch.float16)
    assert_near(run(experts, inputs), expected_output(experts, inputs), 2e-3)
    assert not plans


def test_each_number_of_slots(plans, poisoned_buffers):
    experts = make_experts(3, 8, 16, torch.float32)
    for num_tokens in range(1, MAX_SLOTS + 1):
        inputs = random_inputs("empty experts", num_tokens, 1, experts, torch.float32)
        assert_near(run(experts, inputs), expected_output(experts, inputs), 1e-5)
    assert not plans


@pytest.mark.parametrize("num_experts", [3, 20])
def test_without_any_expert_the_output_is_zero(num_experts, poisoned_buffers):
    experts = make_experts(num_experts, 16, 24, torch.float32)
    hidden, ids, weights = random_inputs("random", 10, 2, experts, torch.float32)
    assert run(experts, (hidden, ids.fill_(num_experts + 1), weights))[0].count_nonzero() == 0


def test_tokens_and_experts_do_not_touch_others():
    experts = make_experts(6, 16, 24, torch.float32)
    hidden, ids, weights = random_inputs("random", 9, 1, experts, torch.float32)
    ids[:, 0] = torch.tensor([0, 4, 4, 0, 6, 2, 4, 2, 0])
    expected = run(experts, (hidden, ids, weights))[0]
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[[1, 3, 5]] = torch.nan
    hidden[[1, 4]] = torch.nan
    output = run(experts, (hidden, ids, weights))[0]
    others = [0, 2, 3, 4, 5, 6, 7, 8]  # token 4 has no expert
    assert torch.equal(output[others], expected[others])


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
def test_equals_the_kernels_for_many_slots(top_k, dtype, tolerance, plans):
    experts = make_experts(5, 32, 48, dtype)
    inputs = random_inputs("some dropped", 20, top_k, experts, dtype)
    with_gradient = experts(*inputs)
    assert len(plans) == 1
    assert_near(run(experts, inputs), [with_gradient.detach().double()], tolerance)
    assert len(plans) == 1


def test_many_slots_and_gradients_take_the_other_kernels(plans):
    experts = make_experts(3, 16, 24, torch.float32)
    run(experts, random_inputs("random", MAX_SLOTS + 1, 1, experts, torch.float32))
    run(experts, random_inputs("random", MAX_SLOTS // 3 + 1, 3, experts, torch.float32))
    assert len(plans) == 2
    hidden, ids, weights = random_inputs("random", 4, 1, experts, torch.float32)
    assert experts(hidden, ids, weights).requires_grad
    assert len(plans) == 3
    experts.requires_grad_(False)
    assert experts(hidden.clone().requires_grad_(), ids, weights).requires_grad
    assert experts(hidden, ids, weights.clone().requires_grad_()).requires_grad
    assert len(plans) == 5
    experts(hidden, ids, weights)
    with torch.inference_mode():
        experts(hidden, ids, weights)
    assert len(plans) == 5


def test_operator_is_what_torch_compile_needs():
    experts = make_experts(3, 16, 24, torch.float32).requires_grad_(False)
    hidden, ids, weights = inputs = random_inputs("some dropped", 7, 2, experts, torch.float32)
    arguments = (ids.contiguous(), hidden, weights, *experts.parameters())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(small_batch_relu_experts_op, arguments, test_utils=checks)
    assert torch.equal(small_batch_relu_experts_op(*arguments).sum(dim=1), run(experts, inputs)[0])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "d_model", "ffn_dim"),
    [
        (1, 1, 16, 1024, 4096),
        (8, 2, 16, 1024, 4096),
        (64, 1, 16, 1024, 4096),
        (21, 3, 8, 520, 136),
        (32, 1, 64, 512, 2048),
        (17, 1, 300, 64, 72),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_the_reference(case, num_tokens, top_k, num_experts, d_model, ffn_dim, dtype, plans, poisoned_buffers):
    experts = make_experts(num_experts, d_model, ffn_dim, dtype)
    inputs = random_inputs(case, num_tokens, top_k, experts, dtype)
    output = run(experts, inputs)
    assert_near(output, expected_output(experts, inputs), 1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(run(experts, inputs)[0], output[0]), "not deterministic"
    assert not plans


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(4, 1, 16), (30, 2, 16)])
def test_replayed_with_other_routing(num_tokens, top_k, num_experts, dtype, plans):
    experts = make_experts(num_experts, 256, 512, dtype)
    inputs = random_inputs("random", num_tokens, top_k, experts, dtype)
    run(experts, inputs)  # Triton compiles and loads kernels, which a graph cannot record
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(experts, inputs)
    for case in CASES:
        for buffer, value in zip(inputs, random_inputs(case, num_tokens, top_k, experts, dtype), strict=True):
            buffer.copy_(value)
        graph.replay()
        assert_near(output, expected_output(experts, inputs), 1e-5 if dtype == torch.float32 else 1e-2)
    assert not plans


@torch.no_grad()
@pytest.mark.parametrize(("num_tokens", "is_small"), [(4, True), (5, False)])
def test_compiled_takes_the_kernels_for_many_slots_earlier(num_tokens, is_small):
    experts = make_experts(3, 16, 24, torch.float32)
    inputs = random_inputs("some dropped", num_tokens, 2, experts, torch.float32)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    torch.testing.assert_close(torch.compile(experts, backend=backend, fullgraph=True)(*inputs), experts(*inputs))
    assert len(graphs) == 1
    assert ("small_batch_relu_experts" in graphs[0]) == is_small


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("num_tokens", [4, 20])
def test_compiled_with_inductor_and_under_autocast(num_tokens, plans):
    experts = make_experts(8, 64, 128, torch.float32)
    inputs = random_inputs("some dropped", num_tokens, 2, experts, torch.float32)
    expected = expected_output(experts, inputs)
    assert_near(run(torch.compile(experts, fullgraph=True), inputs), expected, 1e-5)
    with torch.autocast("cuda", torch.bfloat16):
        assert_near(run(experts, inputs), expected, 1e-2)
    assert not plans


@pytest.mark.gpu
@on_gpu
def test_triton_compiles_once_per_padded_size(monkeypatch):
    experts = make_experts(4, 88, 104, torch.bfloat16)  # widths of no other test
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **kernel: compiled.append(kernel["repr"]))
    for num_tokens in range(5, MAX_SLOTS + 1):
        run(experts, random_inputs("random", num_tokens, 1, experts, torch.bfloat16))
    assert len(compiled) == 2 * 3, compiled
