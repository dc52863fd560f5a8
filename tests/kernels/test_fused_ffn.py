"""The Triton kernels against a float64 loop over the experts: on the GPU, or small cases in Triton's interpreter."""

import copy
import functools

import pytest
import torch
from fused_experts_cases import (
    CASES,
    DEVICE,
    assert_near,
    make_experts,
    on_gpu,
    reference,
    routing,
    without_kinks,
)
from torch import Tensor

from hf_moe_ted.models.expert_computation import COMPUTATIONS
from hf_moe_ted.models.experts import ZCodeM3Experts

pytest.importorskip("triton", reason="needs Triton")

from hf_moe_ted.kernels import fused_ffn, row_plan


def fused(experts: ZCodeM3Experts, hidden: Tensor, ids: Tensor, weights: Tensor, cotangent: Tensor) -> list[Tensor]:
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    output = experts(hidden, ids, weights)
    return [output.detach(), *torch.autograd.grad(output, [hidden, weights, *experts.parameters()], cotangent)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_small_case_equals_the_reference(case, top_k, poisoned_buffers):
    experts = make_experts(4, 24, 40, torch.float32)
    hidden, cotangent = torch.randn(2, 37, 24, device=DEVICE)
    ids, weights = routing(case, 37, top_k, 4), torch.rand(37, top_k, device=DEVICE)
    cotangent = without_kinks(experts, hidden, ids, cotangent)
    expected = reference(experts, hidden, ids, weights, cotangent)
    assert_near(fused(experts, hidden, ids, weights, cotangent), expected, 1e-5, cotangent)


def test_several_tiles_of_rows_and_columns(poisoned_buffers):
    experts = make_experts(3, 72, 136, torch.float32)
    hidden, cotangent = torch.randn(2, 300, 72, device=DEVICE)
    ids, weights = routing("some dropped", 300, 2, 3), torch.rand(300, 2, device=DEVICE)
    cotangent = without_kinks(experts, hidden, ids, cotangent)
    expected = reference(experts, hidden, ids, weights, cotangent)
    actual = fused(experts, hidden, ids, weights, cotangent)
    assert_near(actual, expected, 1e-5, cotangent)
    again = fused(experts, hidden, ids, weights, cotangent)
    assert all(torch.equal(one, other) for one, other in zip(actual, again, strict=True)), "not deterministic"


def test_half_precision(poisoned_buffers):
    # not bfloat16: the interpreter multiplies its bits as integers
    experts = make_experts(4, 32, 48, torch.float16)
    hidden, cotangent = torch.randn(2, 50, 32, device=DEVICE, dtype=torch.float16)
    ids, weights = routing("some dropped", 50, 2, 4), torch.rand(50, 2, device=DEVICE, dtype=torch.float16)
    cotangent = without_kinks(experts, hidden, ids, cotangent)
    expected = reference(experts, hidden, ids, weights, cotangent)
    assert_near(fused(experts, hidden, ids, weights, cotangent), expected, 1e-2, cotangent)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has one way to read blocks")
@pytest.mark.parametrize("capability", [(8, 9), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter has no bfloat16
def test_experts_of_other_gpus_equal_the_reference(capability, dtype, poisoned_buffers, monkeypatch):
    monkeypatch.setattr(fused_ffn, "_capability", lambda _: capability)
    experts = make_experts(3, 24, 40, torch.float32)
    hidden, cotangent = torch.randn(2, 201, 24, device=DEVICE)
    ids, weights = routing("some dropped", 201, 1, 3), torch.rand(201, 1, device=DEVICE)
    if dtype != torch.float32:
        experts, hidden, cotangent = experts.to(dtype), hidden.to(dtype), cotangent.to(dtype)
    cotangent = without_kinks(experts, hidden, ids, cotangent)
    expected = reference(experts, hidden, ids, weights, cotangent)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_near(fused(experts, hidden, ids, weights, cotangent), expected, tolerance, cotangent)


def test_weights_of_zero_have_gradients():
    experts = make_experts(2, 16, 16, torch.float32)
    hidden, cotangent = torch.randn(2, 9, 16, device=DEVICE)
    ids, weights = routing("random", 9, 1, 2), torch.zeros(9, 1, device=DEVICE)
    expected = reference(experts, hidden, ids, weights, cotangent)
    actual = fused(experts, hidden, ids, weights, cotangent)
    torch.testing.assert_close(actual[2].double(), expected[2], rtol=1e-5, atol=1e-5)
    assert actual[2].count_nonzero() == 9


def test_frozen_experts_get_no_gradient_and_constant_weights_neither():
    experts = make_experts(3, 16, 24, torch.float32).requires_grad_(False)
    hidden, cotangent = torch.randn(2, 20, 16, device=DEVICE)
    ids, weights = routing("some dropped", 20, 1, 3), torch.rand(20, 1, device=DEVICE)
    expected = reference(experts, hidden, ids, weights, cotangent)
    hidden.requires_grad_()
    (grad_hidden,) = torch.autograd.grad(experts(hidden, ids, weights), hidden, cotangent)
    torch.testing.assert_close(grad_hidden.double(), expected[1], rtol=1e-5, atol=1e-5)
    weights.requires_grad_()
    (grad_weights,) = torch.autograd.grad(experts(hidden, ids, weights), weights, cotangent)
    torch.testing.assert_close(grad_weights.double(), expected[2], rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_refused():
    experts = make_experts(3, 16, 24, torch.float32)
    hidden, ids, weights = torch.randn(20, 16, device=DEVICE), routing("random", 20, 1, 3), torch.rand(20, 1)
    hidden.requires_grad_()
    output = experts(hidden, ids, weights.to(DEVICE))
    (grad_hidden,) = torch.autograd.grad(output.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_hidden.square().sum().backward()


@pytest.mark.parametrize("row_multiple", [1, 8])
@pytest.mark.parametrize(
    ("max_programs", "num_experts", "num_slots"),
    # blocks of eight, four and one step; more blocks than a program reads at once
    [(1, 5, 300), (2, 5, 300), (256, 5, 300), (256, 600, 3000)],
)
def test_plan_of_slots_in_several_blocks(max_programs, num_experts, num_slots, row_multiple, monkeypatch):
    monkeypatch.setattr(row_plan, "_MAX_PROGRAMS", max_programs)
    ids = routing("some dropped", num_slots // 2, 2, num_experts)
    plan = row_plan.plan_rows(ids, num_experts, 16, row_multiple)
    plan = row_plan.RowPlan.of(plan, num_slots, num_experts, 16, row_multiple)
    slots_of_group = [[] for _ in range(num_experts + 1)]
    for slot, expert in enumerate(ids.flatten().clamp(max=num_experts).tolist()):
        slots_of_group[expert].append(slot)
    first, tiles = 0, []
    for group, slots in enumerate(slots_of_group):
        assert plan.offsets[group] == first
        assert plan.row_ends[group] == first + len(slots)
        assert plan.order[first : first + len(slots)].tolist() == slots
        rows = plan.row_of_slot[torch.tensor(slots, dtype=torch.int64, device=DEVICE)].tolist()
        assert rows == (list(range(first, first + len(slots))) if group < num_experts else [-1] * len(slots))
        tiles += [(group, first + tile) for tile in range(0, len(slots), 16)]
        assert plan.tile_ends[group] == len(tiles)
        first += -(-len(slots) // row_multiple) * row_multiple
    assert plan.offsets[num_experts + 1] == first <= plan.num_rows
    assert list(zip(plan.tile_expert.tolist(), plan.tile_row.tolist(), strict=True))[: len(tiles)] == tiles


@pytest.mark.parametrize("overrides", [{"activation_function": "gelu"}, {"activation_dropout": 0.1}])
def test_other_experts_run_as_grouped_products(overrides):
    experts = make_experts(3, 16, 24, torch.float32, **overrides)
    hidden = torch.randn(20, 16, device=DEVICE)
    ids, weights = routing("random", 20, 1, 3), torch.rand(20, 1, device=DEVICE)
    assert COMPUTATIONS["zcode_fused"].why_not_now(experts) == "ReLU without dropout"
    torch.manual_seed(0)
    output = experts(hidden, ids, weights)
    torch.manual_seed(0)
    experts.config._experts_implementation = "zcode_grouped"
    torch.testing.assert_close(output, experts(hidden, ids, weights))


def test_operators_are_what_torch_compile_needs():
    experts = make_experts(3, 16, 24, torch.float32)
    ids, weights = routing("some dropped", 20, 2, 3), torch.rand(20, 2, device=DEVICE)
    plan = row_plan.plan_rows(ids, 3, 64, 32)
    parameters = (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
    tokens = torch.randn(20, 16, device=DEVICE, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(row_plan.plan_rows_op, (ids, 3, 64, 32), test_utils=checks)
    torch.library.opcheck(
        fused_ffn.relu_experts_op,
        (tokens, weights.requires_grad_(), *parameters, plan, 64, 32, True),
        test_utils=checks,
    )


@pytest.mark.parametrize("weights_need_grad", [False, True])
@pytest.mark.parametrize("experts_need_grad", [False, True])
def test_operator_of_backward_is_what_torch_compile_needs(weights_need_grad, experts_need_grad):
    experts = make_experts(3, 16, 24, torch.float32).requires_grad_(False)
    ids, weights = routing("some dropped", 20, 2, 3), torch.rand(20, 2, device=DEVICE)
    plan = row_plan.plan_rows(ids, 3, 64, 32)
    parameters = (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
    tokens = torch.randn(20, 16, device=DEVICE)
    output, *kept = fused_ffn.relu_experts(tokens, weights, *parameters, plan, 64, 32, weights_need_grad)
    torch.library.opcheck(
        fused_ffn.relu_experts_backward_op,
        (output, weights, experts.up_proj, experts.down_proj, *kept, plan, 64, 32, experts_need_grad),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_no_tokens():
    experts = make_experts(3, 16, 24, torch.float32)
    output = experts(
        torch.zeros(0, 16, device=DEVICE), torch.zeros(0, 1, device=DEVICE).long(), torch.zeros(0, 1, device=DEVICE)
    )
    assert output.shape == (0, 16)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "d_model", "ffn_dim"),
    [
        (5000, 1, 16, 256, 520),
        (3000, 2, 64, 136, 1024),
        (700, 1, 8, 1024, 4096),
        (64, 1, 128, 512, 2048),
        (1, 2, 16, 1024, 4096),
        (20000, 1, 300, 64, 72),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_the_reference(case, num_tokens, top_k, num_experts, d_model, ffn_dim, dtype, poisoned_buffers):
    experts = make_experts(num_experts, d_model, ffn_dim, dtype)
    hidden, cotangent = torch.randn(2, num_tokens, d_model, device=DEVICE, dtype=dtype)
    ids = routing(case, num_tokens, top_k, num_experts)
    weights = torch.rand(num_tokens, top_k, device=DEVICE, dtype=dtype)
    cotangent = without_kinks(experts, hidden, ids, cotangent)
    expected = reference(experts, hidden, ids, weights, cotangent)
    actual = fused(experts, hidden, ids, weights, cotangent)
    assert_near(actual, expected, 1e-5 if dtype == torch.float32 else 1e-2, cotangent)
    again = fused(experts, hidden, ids, weights, cotangent)
    assert all(torch.equal(one, other) for one, other in zip(actual, again, strict=True)), "not deterministic"


@pytest.mark.gpu
@on_gpu
def test_under_compile_cuda_graphs_checkpointing_and_autocast():
    experts = make_experts(8, 64, 128, torch.float32)
    rounded = copy.deepcopy(experts).bfloat16()  # what the products take under autocast
    hidden, cotangent = torch.randn(2, 200, 64, device=DEVICE).bfloat16().float()
    ids, weights = routing("some dropped", 200, 2, 8), torch.rand(200, 2, device=DEVICE)
    cotangent = without_kinks(rounded, hidden, ids, without_kinks(experts, hidden, ids, cotangent))
    expected = reference(experts, hidden, ids, weights, cotangent)

    def run(function):
        inputs = hidden.clone().requires_grad_(), ids, weights.clone().requires_grad_()
        output = function(*inputs)
        gradients = torch.autograd.grad(output, [inputs[0], inputs[2], *experts.parameters()], cotangent)
        return [output.detach(), *gradients]

    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, experts, use_reentrant=False)
    assert_near(run(torch.compile(experts, fullgraph=True)), expected, 1e-5, cotangent)
    assert_near(run(checkpointed), expected, 1e-5, cotangent)
    with torch.autocast("cuda", torch.bfloat16):
        actual = run(experts)
    assert_near(actual, reference(rounded, hidden, ids, weights, cotangent), 1e-2, cotangent)

    graph, output = torch.cuda.CUDAGraph(), None
    with torch.no_grad(), torch.cuda.graph(graph):
        output = experts(hidden, ids, weights)
    hidden.copy_(torch.randn_like(hidden))
    ids.copy_(routing("random", 200, 2, 8))
    graph.replay()
    torch.testing.assert_close(output, experts(hidden, ids, weights))
