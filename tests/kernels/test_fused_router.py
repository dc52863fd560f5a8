"""The router's Triton kernels against float64 and the eager router: on the GPU, or small in Triton's interpreter."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_moe_ted.models.router import Routing, ZCodeM3Router
from hf_moe_ted.testing import tiny_config

pytest.importorskip("triton", reason="needs Triton")

from hf_moe_ted.kernels import fused_router
from hf_moe_ted.kernels.fused_router import can_fuse_router, fused_route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def any_device(monkeypatch):
    """Routers run the kernels wherever the tests run."""
    monkeypatch.setattr(fused_router, "_has_tf32", lambda device: True)


def make_inputs(
    num_tokens: int, width: int, num_experts: int, with_bias: bool = True, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Hidden states, weight and, if there is one, bias."""
    inputs = [torch.randn(num_tokens, width), torch.randn(num_experts, width) * width**-0.5]
    if with_bias:
        inputs.append(torch.randn(num_experts))
    return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in inputs]


def route(inputs: list[Tensor], top_k: int, jitter_noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (*inputs, None)[:3]
    return fused_route(hidden, weight, bias, top_k, jitter_noise)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.isfinite().all(), "there are elements that nobody wrote"
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_equals_float64(inputs: list[Tensor], top_k: int, tolerance: float, grad_tolerance: float) -> None:
    logits, probs, choices = route(inputs, top_k)
    cotangents = [torch.randn_like(logits), torch.randn_like(probs)]
    grads = torch.autograd.grad([logits, probs], inputs, cotangents)
    assert (logits.dtype, probs.dtype, choices.dtype) == (torch.float32, torch.float32, torch.int64)

    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact_logits = torch.nn.functional.linear(*exact_inputs)
    exact_probs = exact_logits.softmax(dim=-1)
    assert relative_error(logits.detach(), exact_logits.detach()) <= tolerance
    # choices by their probabilities, as two that are as good as equal may change places
    assert (choices.sort(dim=-1).values.diff(dim=-1) > 0).all()
    chosen = exact_probs.gather(1, choices)
    torch.testing.assert_close(probs.double(), chosen, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(chosen, exact_probs.topk(top_k).values, rtol=1e-5, atol=1e-7)
    exact_cotangents = [cotangent.double() for cotangent in cotangents]
    exact_grads = torch.autograd.grad([exact_logits, chosen], exact_inputs, exact_cotangents)
    for name, grad, exact, tensor in zip(("hidden", "weight", "bias"), grads, exact_grads, inputs, strict=False):
        assert grad.dtype == tensor.dtype
        error = relative_error(grad, exact)
        assert error <= grad_tolerance, f"gradient of {name}: relative error {error:.1e}"


@pytest.mark.parametrize("num_experts", [4, 5, 16, 40])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_small_case_equals_float64(num_experts, top_k, poisoned_buffers):
    inputs = make_inputs(37, 24 if top_k == 3 else 48, num_experts, with_bias=top_k != 2)
    assert_equals_float64(inputs, top_k, 2e-6, 2e-6)


@pytest.mark.parametrize(
    ("num_tokens", "width", "num_experts"),
    [(1, 16, 4), (600, 80, 6), (5, 72, 140)],
    ids=["one token", "several splits of the tokens", "experts in parts"],
)
def test_small_case_in_other_tiles_equals_float64(num_tokens, width, num_experts, poisoned_buffers):
    assert_equals_float64(make_inputs(num_tokens, width, num_experts), 2, 2e-6, 2e-6)


def test_half_precision(poisoned_buffers):
    # not bfloat16: the interpreter multiplies its bits as integers
    assert_equals_float64(make_inputs(20, 32, 8, dtype=torch.float16), 2, 2e-6, 1e-3)
    hidden, _ = make_inputs(20, 32, 8, with_bias=False, dtype=torch.float16)
    assert_equals_float64([hidden, *make_inputs(20, 32, 8)[1:]], 2, 2e-6, 1e-3)


def test_hidden_states_of_any_strides():
    hidden, weight, bias = make_inputs(24, 20, 6)
    expected = fused_route(hidden, weight, bias, 2)
    strided = hidden.detach().t().contiguous().t()
    assert not strided.is_contiguous()
    for actual, other in zip(fused_route(strided, weight, bias, 2), expected, strict=True):
        assert torch.equal(actual, other)


def test_equal_probabilities_go_to_the_lower_expert():
    weight = torch.zeros(6, 16, device=DEVICE)
    weight[4] = weight[2] = 1.0
    _, probs, choices = fused_route(torch.ones(3, 16, device=DEVICE), weight, None, 4)
    assert choices.tolist() == [[2, 4, 0, 1]] * 3
    assert probs[0, 0] == probs[0, 1] > probs[0, 2]


def test_large_logits_do_not_overflow():
    bias = torch.tensor([-1e4, 1e4, 9e3, 0.0, 1e4], device=DEVICE)
    _, probs, choices = fused_route(torch.zeros(2, 16, device=DEVICE), torch.zeros(5, 16, device=DEVICE), bias, 3)
    assert choices[:, :2].tolist() == [[1, 4]] * 2
    assert probs.tolist() == [[0.5, 0.5, 0.0]] * 2


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_is_seen_and_chooses_experts_that_exist():
    hidden, weight, bias = make_inputs(4, 16, 5)
    with torch.no_grad():
        hidden[1, 3] = torch.nan
        hidden[2, 0] = torch.inf
    logits, probs, choices = fused_route(hidden, weight, bias, 3)
    assert probs[1:3].isnan().all()
    assert choices[1:3].tolist() == [[0, 1, 2]] * 2
    assert logits[[0, 3]].isfinite().all()
    assert probs[[0, 3]].isfinite().all()


def test_two_runs_are_equal():
    inputs = make_inputs(600, 32, 7)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        logits, probs, choices = route(inputs, 2, 0.1)
        grads = torch.autograd.grad([logits, probs], inputs, [logits.detach(), probs.detach()])
        results.append([logits, probs, choices, *grads])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# --- gradients that are not needed


def test_frozen_inputs_get_no_gradient_and_nothing_is_kept_for_them():
    inputs = make_inputs(20, 32, 6)
    logits, probs, _ = route(inputs, 2)
    cotangents = [torch.randn_like(logits), torch.randn_like(probs)]
    expected = torch.autograd.grad([logits, probs], inputs, cotangents)
    for needed in itertools.product([True, False], repeat=3):
        if not any(needed):
            continue
        for tensor, is_needed in zip(inputs, needed, strict=True):
            tensor.requires_grad_(is_needed).grad = None
        logits, probs, _ = route(inputs, 2)
        keeps_hidden = any(saved is not None and saved.shape == (20, 32) for saved in logits.grad_fn.saved_tensors)
        assert keeps_hidden == needed[1]
        torch.autograd.backward([logits, probs], cotangents)
        for tensor, is_needed, grad in zip(inputs, needed, expected, strict=True):
            assert torch.equal(tensor.grad, grad) if is_needed else tensor.grad is None


def test_gradients_of_one_output_alone():
    inputs = make_inputs(20, 32, 6)
    logits, probs, _ = route(inputs, 2)
    cotangents = [torch.randn_like(logits), torch.randn_like(probs)]
    both = torch.autograd.grad([logits, probs], inputs, cotangents, retain_graph=True)
    of_logits = torch.autograd.grad(logits, inputs, cotangents[0], retain_graph=True)
    of_probs = torch.autograd.grad(probs, inputs, cotangents[1])
    for one, other, total in zip(of_logits, of_probs, both, strict=True):
        torch.testing.assert_close(one + other, total, rtol=1e-5, atol=1e-5)
    assert all(grad.count_nonzero() for grad in (*of_logits, *of_probs))


def test_without_gradients():
    with torch.no_grad():
        logits, probs, _ = route(make_inputs(3, 16, 4), 1)
    assert logits.grad_fn is None
    assert probs.grad_fn is None


def test_autocast_changes_nothing():
    inputs = make_inputs(600, 32, 6)
    expected = route(inputs, 2)
    expected_grads = torch.autograd.grad(expected[0], inputs, expected[0].detach())
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = route(inputs, 2)
        grads = torch.autograd.grad(actual[0], inputs, actual[0].detach())
    for one, other in zip((*actual, *grads), (*expected, *expected_grads), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# --- noise


def noise_of(num_tokens: int, width: int, jitter_noise: float) -> Tensor:
    """The noise itself: logits of ones and an identity."""
    ones, identity = torch.ones(num_tokens, width, device=DEVICE), torch.eye(width, device=DEVICE)
    return fused_route(ones, identity, None, 1, jitter_noise)[0]


def test_noise_is_uniform():
    noise = noise_of(500, 40, 0.25)
    assert noise.min() >= 0.75
    assert noise.max() <= 1.25
    sorted_noise = noise.flatten().sort().values
    uniform = torch.linspace(0.75, 1.25, noise.numel(), device=DEVICE)
    # Kolmogorov and Smirnov: 20,000 numbers are beyond 1.95 / sqrt(20,000) of their range once in a thousand times
    assert (sorted_noise - uniform).abs().max() < 0.5 * 1.95 / 20_000**0.5
    centred = noise - 1.0
    for one, other in (
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[:, 4:], centred[:, :-4]),
    ):
        correlation = (one * other).mean() / centred.square().mean()
        assert correlation.abs() < 0.05
    assert noise.unique().numel() > 19_000


def test_noise_depends_on_seed_token_and_column_only():
    torch.manual_seed(3)
    noise = noise_of(300, 20, 0.1)
    torch.manual_seed(3)
    assert torch.equal(noise_of(300, 20, 0.1), noise)
    torch.manual_seed(3)
    assert torch.equal(noise_of(1, 20, 0.1), noise[:1])
    assert (noise_of(300, 20, 0.1) != noise).float().mean() > 0.99  # the next seed of the generator
    assert torch.equal(noise_of(300, 20, 0.0), torch.ones_like(noise))


def test_gradients_have_the_noise_of_forward():
    hidden, weight = make_inputs(600, 20, 6, with_bias=False)
    torch.manual_seed(3)
    noise = noise_of(600, 20, 0.3).double()
    torch.manual_seed(3)
    logits, _, _ = fused_route(hidden, weight, None, 1, 0.3)
    cotangent = torch.randn_like(logits)
    grad_hidden, grad_weight = torch.autograd.grad(logits, [hidden, weight], cotangent)
    exact_hidden, exact_weight = hidden.detach().double(), weight.detach().double()
    assert relative_error(logits.detach(), (exact_hidden * noise) @ exact_weight.T) < 2e-6
    assert relative_error(grad_hidden, (cotangent.double() @ exact_weight) * noise) < 2e-6
    assert relative_error(grad_weight, cotangent.double().T @ (exact_hidden * noise)) < 2e-6


# --- the router


def make_router(
    num_experts: int, d_model: int = 32, dtype: torch.dtype = torch.float32, **overrides: Any
) -> ZCodeM3Router:
    config = tiny_config(
        d_model=d_model, encoder_attention_heads=1, decoder_attention_heads=1, num_experts=num_experts, **overrides
    )
    router = ZCodeM3Router(config, num_experts)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=d_model**-0.5)
    return router.to(DEVICE, dtype)


def without_near_ties(router: ZCodeM3Router, hidden: Tensor) -> Tensor:
    """The tokens whose logits are so far apart that rounding cannot change the choices."""
    bias = None if router.bias is None else router.bias.double()
    logits = torch.nn.functional.linear(hidden.double(), router.weight.double(), bias)
    gaps = -logits.sort(dim=-1, descending=True).values.diff(dim=-1)
    return hidden[gaps[:, : router.top_k].amin(dim=-1) > 1e-5].detach()


def routing_and_gradients(
    router: ZCodeM3Router, hidden: Tensor, mask: Tensor | None = None, call: Callable[..., Any] | None = None
) -> tuple[Routing, list[Tensor]]:
    """What the router, or `call` in its place, returns, and gradients of hidden states and parameters."""
    torch.manual_seed(5)
    hidden = hidden.detach().requires_grad_()
    logits, routing = (router if call is None else call)(hidden, mask)
    generator = torch.Generator(DEVICE).manual_seed(6)
    loss = sum(
        (output * torch.randn(output.shape, device=DEVICE, generator=generator)).sum()
        for output in (logits, routing.weights)
    )
    return routing, list(torch.autograd.grad(loss, [hidden, *(p for p in router.parameters() if p.requires_grad)]))


def assert_fused_equals_eager(
    router: ZCodeM3Router, hidden: Tensor, mask: Tensor | None, patch: pytest.MonkeyPatch, tolerance: float
) -> None:
    assert can_fuse_router(router, hidden)
    fused, fused_grads = routing_and_gradients(router, hidden, mask)
    patch.setattr(fused_router, "_has_tf32", lambda device: False)
    eager, eager_grads = routing_and_gradients(router, hidden, mask)
    assert torch.equal(fused.choices, eager.choices)
    assert torch.equal(fused.expert_ids, eager.expert_ids)
    torch.testing.assert_close(fused.logits, eager.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.weights, eager.weights, rtol=1e-5, atol=1e-6)
    for fused_grad, eager_grad in zip(fused_grads, eager_grads, strict=True):
        assert fused_grad.dtype == eager_grad.dtype
        assert relative_error(fused_grad, eager_grad.double()) < tolerance


@pytest.mark.parametrize(
    "overrides",
    [
        {"token_drop_policy": "random", "router_bias": True},
        {"num_experts_per_tok": 2, "normalize_router_weights": "after_dropping", "token_drop_policy": "position"},
        {"num_experts_per_tok": 2, "second_expert_policy": "random", "token_drop_policy": "position"},
        {"num_experts_per_tok": 3, "normalize_router_weights": "before_dropping", "token_drop_policy": "probability"},
        {"capacity_factor": None, "gating_dropout": 0.5},
    ],
)
@pytest.mark.parametrize("with_mask", [False, True])
def test_fused_router_equals_the_eager_one(overrides, with_mask, any_device, monkeypatch):
    router = make_router(5, **({"capacity_factor": 0.7} | overrides)).train()
    hidden = without_near_ties(router, torch.randn(70, 32, device=DEVICE))
    mask = torch.rand(len(hidden), device=DEVICE) > 0.2 if with_mask else None
    assert_fused_equals_eager(router, hidden, mask, monkeypatch, 1e-5)


def test_jitter_in_training_only(any_device):
    router = make_router(5, router_noise_policy="jitter", router_jitter_noise=0.2)
    hidden = torch.randn(30, 32, device=DEVICE)
    quiet, _ = router.eval()(hidden)
    assert torch.equal(router(hidden)[0], quiet)
    noisy, _ = router.train()(hidden)
    assert 0.01 < relative_error(noisy.detach(), quiet.detach().double()) < 0.3


def test_checkpointing_repeats_the_noise(any_device):
    router = make_router(5, router_noise_policy="jitter", router_jitter_noise=0.2).train()
    hidden = torch.randn(30, 32, device=DEVICE)
    _, expected = routing_and_gradients(router, hidden)
    _, actual = routing_and_gradients(router, hidden, call=lambda *x: checkpoint(router, *x, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("overrides", "is_training", "expected"),
    [
        ({}, True, True),
        ({"num_experts_per_tok": 2}, True, True),
        ({"router_noise_policy": "jitter"}, True, True),
        ({"router_noise_policy": "rsample"}, True, False),
        ({"router_noise_policy": "rsample"}, False, True),
        ({"num_experts_per_tok": 2, "second_expert_policy": "sampling"}, False, False),
        ({"num_experts_per_tok": 2, "second_expert_policy": "random"}, True, True),
        ({"router_dtype": "bfloat16"}, True, False),
    ],
)
def test_routers_that_fuse(overrides, is_training, expected, any_device):
    router = make_router(4, **overrides).train(is_training)
    assert can_fuse_router(router, torch.zeros(3, 32, device=DEVICE)) == expected


def test_other_inputs_do_not_fuse(any_device, monkeypatch):
    class Subclass(Tensor):
        pass

    router = make_router(4)
    hidden = torch.zeros(3, 32, device=DEVICE)
    assert can_fuse_router(router, hidden)
    assert not can_fuse_router(router, hidden[:0])
    assert not can_fuse_router(router, hidden.double())
    assert not can_fuse_router(router, hidden.as_subclass(Subclass))
    assert not can_fuse_router(make_router(513), hidden)
    assert not can_fuse_router(ZCodeM3Router(tiny_config(d_model=32), 4, expert_map=[0, 1, 2, 3, 0]), hidden)
    monkeypatch.undo()
    assert not can_fuse_router(make_router(4).cpu(), hidden.cpu())


def test_no_tokens(any_device):
    logits, routing = make_router(4)(torch.zeros(0, 32, device=DEVICE))
    assert logits.shape == (0, 4)
    assert routing.expert_ids.shape == (0, 1)


# --- torch.compile


def test_operators_are_what_torch_compile_needs():
    hidden, weight, bias = make_inputs(20, 16, 5)
    seed = torch.tensor([7], device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused_router.route_op, (hidden, weight, bias, seed, 0.1, 2), test_utils=checks)
    torch.library.opcheck(fused_router.route_op, (hidden, weight, None, None, 0.0, 1), test_utils=checks)
    logits, probs, choices = (output.detach() for output in fused_router.route(hidden, weight, bias, None, 0.0, 2))
    for needed in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
        arguments = (logits, choices, logits, probs, hidden.detach(), weight.detach(), None, 0.0, hidden.dtype, *needed)
        torch.library.opcheck(fused_router.route_backward_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("has_frozen_weight", [False, True])
def test_compiled_router_equals_the_eager_one(has_frozen_weight, any_device):
    router = make_router(5, num_experts_per_tok=2, capacity_factor=None, router_bias=True)
    router.weight.requires_grad_(not has_frozen_weight)
    hidden = torch.randn(30, 32, device=DEVICE)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    expected, expected_grads = routing_and_gradients(router, hidden)
    actual, grads = routing_and_gradients(router, hidden, call=compiled)
    assert torch.equal(actual.expert_ids, expected.expert_ids)
    torch.testing.assert_close([actual.weights, *grads], [expected.weights, *expected_grads])
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden)[0], expected.logits)


def test_compiled_router_has_noise(any_device):
    router = make_router(5, router_noise_policy="jitter", router_jitter_noise=0.2, capacity_factor=None).train()
    hidden = torch.randn(30, 32, device=DEVICE)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    first, second = compiled(hidden)[0], compiled(hidden)[0]
    assert 0.01 < relative_error(first.detach(), second.detach().double()) < 0.5


# --- on the GPU, in all dtypes and sizes


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("num_tokens", "width", "num_experts", "top_k"),
    [
        (1, 1024, 64, 1),
        (256, 1024, 16, 2),
        (5000, 520, 40, 3),
        (9000, 1024, 128, 1),
        (16384, 1024, 128, 2),
        (20000, 264, 256, 2),
        (3000, 1000, 512, 8),
        (40000, 96, 300, 1),
        (70000, 1024, 64, 1),
        (70000, 1024, 5, 2),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(num_tokens, width, num_experts, top_k, dtype, poisoned_buffers):
    inputs = make_inputs(num_tokens, width, num_experts, dtype=dtype)
    grad_tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert_equals_float64(inputs, top_k, 2e-6, grad_tolerance)
    if dtype != torch.float32:  # under autocast parameters are float32
        parameters = [tensor.detach().float().requires_grad_() for tensor in inputs[1:]]
        assert_equals_float64([inputs[0], *parameters], top_k, 2e-6, grad_tolerance)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("num_tokens", [1, 200, 70000])
@pytest.mark.parametrize("num_experts_per_tok", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_fused_router_equals_the_eager_one(num_tokens, num_experts_per_tok, dtype, monkeypatch):
    router = make_router(
        64,
        1024,
        dtype,
        num_experts_per_tok=num_experts_per_tok,
        capacity_factor=0.8,
        token_drop_policy="position",
        normalize_router_weights="after_dropping",
    ).train()
    hidden = without_near_ties(router, torch.randn(num_tokens, 1024, device=DEVICE, dtype=dtype))
    mask = torch.rand(len(hidden), device=DEVICE) > 0.1
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert_fused_equals_eager(router, hidden, mask, monkeypatch, tolerance)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("num_experts", [16, 64, 128, 512])
def test_large_gradients_have_the_noise_of_forward(num_experts):
    hidden, weight = make_inputs(20000, 512, num_experts, with_bias=False)
    torch.manual_seed(3)
    noise = noise_of(20000, 512, 0.1).double()
    torch.manual_seed(3)
    logits, _, _ = fused_route(hidden, weight, None, 1, 0.1)
    cotangent = torch.randn_like(logits)
    grad_hidden, grad_weight = torch.autograd.grad(logits, [hidden, weight], cotangent)
    assert relative_error(logits.detach(), (hidden.detach().double() * noise) @ weight.detach().double().T) < 2e-6
    assert relative_error(grad_hidden, (cotangent.double() @ weight.detach().double()) * noise) < 1e-5
    assert relative_error(grad_weight, cotangent.double().T @ (hidden.detach().double() * noise)) < 1e-5


@pytest.mark.gpu
@on_gpu
def test_under_inductor_and_cuda_graphs():
    router = make_router(16, 64, num_experts_per_tok=2, capacity_factor=None)
    hidden = without_near_ties(router, torch.randn(500, 64, device=DEVICE))
    expected, expected_grads = routing_and_gradients(router, hidden)
    actual, grads = routing_and_gradients(router, hidden, call=torch.compile(router, fullgraph=True))
    assert torch.equal(actual.expert_ids, expected.expert_ids)
    torch.testing.assert_close([actual.weights, *grads], [expected.weights, *expected_grads], rtol=1e-5, atol=1e-5)

    graph, logits = torch.cuda.CUDAGraph(), None
    with torch.no_grad(), torch.cuda.graph(graph):
        logits, _ = router(hidden)
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    with torch.no_grad():
        assert torch.equal(logits, router(hidden)[0])
